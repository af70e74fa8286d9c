"""Which groups of a model a spec would prune, the layers that hold them, and what of them stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from torchprune.errors import TargetError
from torchprune.graph.groups import Group, Member, Structure, in_the_way
from torchprune.masking.mask import mask_of, obstacle, original_of
from torchprune.masking.matrices import is_stock, view_of
from torchprune.masking.reading import Reading
from torchprune.masking.scales import is_coded
from torchprune.masking.selection import (
    Layer,
    as_selectors,
    check_used,
    layers_of,
    maskable_of,
    matches,
    tied_to,
)
from torchprune.masking.targets import Target
from torchprune.reports.report import RunRecord
from torchprune.specs.goals import Goal
from torchprune.specs.patterns import Unstructured
from torchprune.structure.specs import StructuredSpec


@dataclass(eq=False)
class Choice:
    """A group to prune: what asks for it, its layers, those that read it, and what was decided."""

    spec: StructuredSpec
    group: Group
    layers: dict[str, Layer]
    readers: list[Target]
    gone: Tensor | None = None

    @property
    def reading(self) -> list[Member]:
        """The members that read it, in the order of `readers`."""
        return [member for member in self.group.members if member.reads]


def choose(
    model: nn.Module, spec: StructuredSpec, structure: Structure, run: RunRecord
) -> list[Choice]:
    """The groups that a spec would prune; what it would not, and why, is noted.

    Raises:
        TargetError: a selector matches nothing.
    """
    spread = (y for y in maskable_of(model) if isinstance(y.module, _ConvTransposeNd))
    layers = [*layers_of(model), *(y for y in spread if y.tensor == "weight")]
    targets, ignore = as_selectors(spec.targets), as_selectors(spec.ignore)
    for what, selectors in (("targets", targets), ("ignore", ignore)):
        for selector in selectors:
            check_used(what, selector, model, layers)
    by_key = {layer.key: layer for layer in layers}
    ties = tied_to(model)
    choices = []
    for group in structure.groups:
        if group.kind != spec.kind:
            continue
        own = {m.key: by_key[m.key] for m in group.members if m.key in by_key}
        if targets and not any(matches(s, y) for s in targets for y in own.values()):
            continue
        if any(matches(s, y) for s in ignore for y in own.values()):
            run.skipped[group.name] = "ignored"
            continue
        readers = [m for m in group.members if m.reads]
        problem = next((p for y in own.values() if (p := obstacle(y, ties) or _coded(y))), None)
        if any(m.key not in own for m in readers) or not readers:
            problem = "a weight that is no layer's reads it, so it cannot be observed or masked"
        if problem:
            run.skipped[group.name] = problem
            continue
        choices.append(Choice(spec, group, own, [_target(own[m.key]) for m in readers]))
    return choices


def no_choice(
    model: nn.Module, spec: StructuredSpec, structure: Structure, run: RunRecord
) -> TargetError:
    """What to say where a spec has nothing to prune."""
    there = ", ".join(sorted({g.kind for g in structure.groups})) or "nothing"
    why = "; ".join(f"{k}: {v}" for k, v in list(run.skipped.items())[:3])
    return TargetError(
        f"{type(spec).__name__}: no {spec.kind} to prune in this {type(model).__name__}; it "
        f"has groups of {there}"
        + (f" ({why})" if why else "")
        + f". In the way stood {'; '.join(in_the_way(structure))}"
    )


def _coded(layer: Layer) -> str | None:
    """Why units cannot be cut from a weight of codes, or None."""
    weight = original_of(layer.module, layer.tensor)
    if not is_coded(weight):
        return None
    return f"its {layer.tensor} is {weight.dtype}, whose scales would not follow; dequantize first"


def _target(layer: Layer) -> Target:
    view = view_of(layer.module, original_of(layer.module, layer.tensor).shape)
    reading = Reading(view) if _read_past_its_forward(layer.module) else None
    if isinstance(layer.module, nn.RNNCellBase):  # as often as there are steps
        reading = Reading(view, None)
    return Target(layer, Goal(Unstructured(), 0.0), view, reading=reading)


def _read_past_its_forward(module: nn.Module) -> bool:
    """Whether to look for the products with a weight: torch's own attention calls no forward of its
    output layer, and of recurrent nets each weight reads something else."""
    inherits = type(module).forward is nn.Linear.forward and not is_stock(module)
    return inherits or isinstance(module, _ConvTransposeNd | nn.RNNBase)


def columns_of(target: Target, member: Member) -> Tensor:
    """(cols,) the unit of each column of the layer's matrix, or -1."""
    shape = target.weight.shape
    place = [len(member.units) if a == member.axis else 1 for a in range(len(shape))]
    return target.view.to_matrix(member.units.reshape(place).expand(shape))[0, 0]


def keeps_of(choices: Sequence[Choice]) -> dict[str, tuple[Layer, Tensor]]:
    """What stays of every layer, for all the decided groups it belongs to and its mask so far."""
    keeps: dict[str, tuple[Layer, Tensor]] = {}
    for choice in choices:
        assert choice.gone is not None
        for member in choice.group.members:
            layer = choice.layers.get(member.key)
            if layer is None:
                continue
            weight = original_of(layer.module, layer.tensor)
            if member.key not in keeps:
                keeps[member.key] = layer, _present(layer, weight)
            index = member.indices(choice.gone).nonzero().flatten().to(weight.device)
            keeps[member.key][1].index_fill_(member.axis, index, False)
    return keeps


def _present(layer: Layer, weight: Tensor) -> Tensor:
    mask = mask_of(layer.module, layer.tensor)
    if mask is None:
        return torch.ones_like(weight, dtype=torch.bool, memory_format=torch.contiguous_format)
    return mask.mask
