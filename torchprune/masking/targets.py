"""A spec met with a model: the printable list of what becomes what, and what is left alone, why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchprune.errors import SpecError, TargetError
from torchprune.masking.mask import Mask, mask_of, obstacle, original_of
from torchprune.masking.matrices import View, is_asked_for, prunable_names, view_of
from torchprune.masking.reading import Reading
from torchprune.masking.selection import (
    Layer,
    as_selectors,
    check_used,
    every_layer,
    is_exact,
    matches,
    output_head,
    repeated_blocks,
    tied_to,
)
from torchprune.specs.goals import Goal
from torchprune.specs.patterns import NM, check_shape, prune_count
from torchprune.specs.spec import Selector, Spec


@dataclass(frozen=True, eq=False)
class Target:
    """A layer that will be pruned, how, its weight's view as matrices, and how the model was seen
    to read it (None where nobody looked)."""

    layer: Layer
    goal: Goal
    view: View
    reading: Reading | None = None

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def weight(self) -> Tensor:
        """The parameter behind the layer, without its mask."""
        return original_of(self.layer.module, self.layer.tensor)

    @property
    def mask(self) -> Mask | None:
        """The mask the layer already carries, if any."""
        return mask_of(self.layer.module, self.layer.tensor)


@dataclass(frozen=True)
class Plan:
    """Targets in registration order, the layers left dense with their reasons, the blocks."""

    targets: list[Target]
    skipped: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, nn.Module] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{t.name}  {t.view.groups}x{t.view.rows}x{t.view.cols}  {t.goal}" for t in self.targets
        ]
        return "\n".join([*lines, *(f"{k}  dense: {why}" for k, why in self.skipped.items())])


def make_plan(model: nn.Module, spec: Spec, readings: Mapping[int, Reading] | None = None) -> Plan:
    """Decide every layer's fate before anything is touched.

    Args:
        readings: how the model reads its parameters, by their identity, where that was looked at.

    Raises:
        TargetError: a selector matches nothing, or names a layer that cannot be pruned.
        SpecError: a layer's shape cannot hold its pattern, or it is already sparser.
    """
    readings = readings or {}
    blocks = repeated_blocks(model)
    targets, ignore = as_selectors(spec.targets), as_selectors(spec.ignore)
    layers = _candidates(model, (*targets, *spec.overrides), readings)
    for what, selectors in (("targets", targets), ("ignore", ignore)):
        for selector in selectors:
            check_used(what, selector, model, layers)
    goals = {}
    for key in spec.overrides:
        check_used("overrides", key, model, layers)
        goals[key] = spec.override_goal(key)

    inside = {id(m) for block in blocks.values() for m in block.modules()}
    head, ties = output_head(model), tied_to(model)
    chosen: list[Target] = []
    skipped: dict[str, str] = {}
    for layer in layers:
        named = any(is_exact(s, layer) for s in targets)
        if targets and not any(matches(s, layer) for s in targets):
            continue
        if any(matches(s, layer) for s in ignore):
            skipped[layer.name] = "ignored"
            continue
        if not targets and blocks and id(layer.module) not in inside:
            skipped[layer.name] = "outside the repeated blocks"
            continue
        if layer.module is head and not named:
            skipped[layer.name] = "output head (name it in targets to prune it)"
            continue
        if reason := obstacle(layer, ties):
            if named:
                raise TargetError(f"targets: {layer.name!r} cannot be pruned: {reason}")
            skipped[layer.name] = reason
            continue
        override = next((k for k in goals if matches(k, layer)), None)
        goal = spec.goal if override is None else goals[override]
        if goal is None:
            skipped[layer.name] = f"dense by overrides[{override!r}]"
            continue
        weight = original_of(layer.module, layer.tensor)
        reading = readings.get(id(weight))
        view = view_of(layer.module, weight.shape) if reading is None else reading.view
        chosen.append(_checked(Target(layer, goal, view, reading), spec))
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise TargetError(
            f"nothing to prune in this {type(model).__name__}: "
            + (why or "it holds no Linear, Conv or fused expert weights")
        )
    if spec.scope == "global":
        _check_global(chosen, spec)
    return Plan(chosen, skipped, blocks)


def _candidates(
    model: nn.Module, asked: Sequence[Selector], readings: Mapping[int, Reading]
) -> list[Layer]:
    """The layers that their modules tell of, those seen to multiply, and those asked for by name
    or type."""
    found = []
    for layer in every_layer(model):
        weight = original_of(layer.module, layer.tensor)
        known = layer.tensor in prunable_names(layer.module)
        if isinstance(layer.module, nn.Embedding) and id(weight) not in readings:
            continue  # a lookup, which multiplies nothing
        seen = id(weight) in readings and not is_asked_for(layer.module)
        if known or seen or any(_asks(selector, layer) for selector in asked):
            found.append(layer)
    return found


def _asks(selector: Selector, layer: Layer) -> bool:
    """Whether a selector is a layer's own name, or its module's type."""
    kind = isinstance(selector, type) and selector is not nn.Module
    return is_exact(selector, layer) or (kind and matches(selector, layer))


def _checked(target: Target, spec: Spec) -> Target:
    view, goal, name = target.view, target.goal, target.name
    if isinstance(goal.pattern, NM):
        check_shape(goal.pattern, view.rows, view.axis, name)
    check_shape(goal.pattern, view.rows, view.cols, name)
    mask = target.mask
    if mask is not None and not isinstance(goal.pattern, NM):
        already = mask.mask.numel() - int(torch.count_nonzero(mask.mask))
        wanted = prune_count(mask.mask.numel(), goal.sparsity)
        if already > wanted and spec.scope != "global":
            raise SpecError(
                f"{name}: it is already {already / mask.mask.numel():.4g} sparse and "
                f"{goal.sparsity:.4g} was asked; masks only grow: torchprune.densify(model) first"
            )
    return target


def _check_global(targets: list[Target], spec: Spec) -> None:
    goals = {str(t.goal) for t in targets}
    if len(goals) > 1 or isinstance(targets[0].goal.pattern, NM):
        raise SpecError(
            f'{type(spec).__name__}: scope "global" shares one budget, so every layer needs the '
            f"same unstructured or block goal, got {', '.join(sorted(goals))}"
        )
