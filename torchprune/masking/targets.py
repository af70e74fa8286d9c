"""A spec met with a model: the printable list of what becomes what, and what is left alone, why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from torchprune.errors import SpecError, TargetError
from torchprune.masking.coverage import coverage_of
from torchprune.masking.defaults import surroundings_of, why_dense
from torchprune.masking.left_dense import Left, lost_of, nothing_left, uncovered_of, unknown_of
from torchprune.masking.mask import Mask, mask_of, obstacle, original_of
from torchprune.masking.matrices import View, feeds_back, is_asked_for, prunable_names, view_of
from torchprune.masking.reading import Reading
from torchprune.masking.request import Request
from torchprune.masking.scales import is_coded
from torchprune.masking.selection import (
    Layer,
    every_layer,
    output_head,
    repeated_blocks,
    tied_to,
)
from torchprune.specs.goals import Goal
from torchprune.specs.patterns import NM, misfit, prune_count
from torchprune.specs.spec import Spec


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
    def feeds_back(self) -> bool:
        """Whether what the layer gives comes back to it a step later, as in recurrent nets."""
        seen = self.reading is not None and self.reading.feeds_back
        return seen or feeds_back(self.layer.module, self.layer.tensor)

    @property
    def view_text(self) -> str:
        """The view in a line, or nothing where the layer's module tells it."""
        told = view_of(self.layer.module, self.weight.shape)
        return "" if replace(self.view, kind=told.kind) == told else self.view.text()

    @property
    def mask(self) -> Mask | None:
        """The mask the layer already carries, if any."""
        return mask_of(self.layer.module, self.layer.tensor)


@dataclass(frozen=True)
class Plan:
    """Targets in registration order, the layers left dense with their reasons, the blocks, and
    what the user must know of what stays dense by no choice of his."""

    targets: list[Target]
    skipped: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{t.name}  {t.view.groups}x{t.view.rows}x{t.view.cols}  {t.goal}" for t in self.targets
        ]
        return "\n".join([*lines, *(f"{k}  dense: {why}" for k, why in self.skipped.items())])


def make_plan(
    model: nn.Module,
    spec: Spec,
    readings: Mapping[int, Reading] | None = None,
    watched: Mapping[int, str] | None = None,
) -> Plan:
    """Decide every layer's fate before anything is touched.

    What cannot be pruned, or is not by default (`defaults.py`), stays dense with its reason; only
    what the user names himself, in full, is an error.

    Args:
        readings: id of a parameter -> how the model reads it, where that was looked at.
        watched: id of a parameter -> why it is a router or a gate, of those seen at work.

    Raises:
        TargetError: a selector matches nothing, or names a layer that cannot be pruned; nothing is
            left to prune, or less than half of what should be.
        SpecError: a shape cannot hold the pattern and the layer is named or the only one, a layer
            is already sparser, or it holds codes that the method cannot write.
    """
    readings, blocks, request = readings or {}, repeated_blocks(model), Request.of(spec)
    layers = _candidates(model, request, readings)
    request.check(model, layers)
    inside = {id(m) for block in blocks.values() for m in block.modules()}
    head, ties = output_head(model), tied_to(model)
    barred = {y.key: why for y in layers if (why := obstacle(y, ties))}
    views = {y.key: _view(y, readings) for y in layers if y.key not in barred}
    around = surroundings_of(model, layers, blocks, views, watched)
    found = ((y.key, why_dense(y, views[y.key], around)) for y in layers if y.key in views)
    dense = {key: why for key, why in found if why is not None}

    def fate(layer: Layer) -> Target | Left:
        named = request.named(layer)
        if request.ignores(layer):
            return Left(layer, "choice", "ignored")
        if not request.targets and blocks and id(layer.module) not in inside:
            return Left(layer, "choice", "outside the repeated blocks")
        if layer.module is head and named != "targets":
            return Left(layer, "choice", "output head (name it in targets to prune it)")
        goal = request.goal_of(layer)
        if goal is None:
            return Left(layer, "choice", f"dense by overrides[{request.override(layer)!r}]")
        if why := barred.get(layer.key):
            if named:
                raise TargetError(f"{named}: {layer.name!r} cannot be pruned: {why}")
            return Left(layer, "obstacle", why)
        if layer.key in dense and not request.means(layer, layers, dense):
            return Left(layer, "rule", dense[layer.key])
        reading = readings.get(id(original_of(layer.module, layer.tensor)))
        target = Target(layer, goal, views[layer.key], reading)
        if why := misfit_of(target) or spec.misfit(target.view.cols):
            if named:
                raise SpecError(f"{layer.name}: {why}; ignore the layer or override its pattern")
            return Left(layer, "misfit", why)
        return target

    fates = [fate(layer) for layer in layers if request.picks(layer)]
    targets = [_checked(one, spec) for one in fates if isinstance(one, Target)]
    left = [one for one in fates if isinstance(one, Left)]
    masked = {id(t.weight): t.weight.numel() for t in targets}
    lost = lost_of(left, kept=sum(masked.values()))
    if not targets:
        raise nothing_left(model, left)
    if spec.scope == "global":
        _check_global(targets, spec)
    coverage = coverage_of(model, masked)
    unknown = unknown_of(model, request, left, coverage)
    skipped = {one.layer.name: one.why for one in left}
    skipped |= {tensor.name: why for tensor, why in unknown.items()}
    warnings = [lost, uncovered_of(request, left, coverage, unknown)]
    return Plan(targets, skipped, blocks, [w for w in warnings if w is not None])


def _view(layer: Layer, readings: Mapping[int, Reading]) -> View:
    weight = original_of(layer.module, layer.tensor)
    reading = readings.get(id(weight))
    return view_of(layer.module, weight.shape) if reading is None else reading.view


def misfit_of(target: Target) -> str | None:
    """Why a layer's shape cannot hold its pattern, or None."""
    view, pattern = target.view, target.goal.pattern
    along = misfit(pattern, view.rows, view.axis) if isinstance(pattern, NM) else None
    return along or misfit(pattern, view.rows, view.cols)


def _candidates(model: nn.Module, request: Request, readings: Mapping[int, Reading]) -> list[Layer]:
    """The layers that their modules tell of, those seen to multiply, and those asked for by name
    or type."""
    found = []
    for layer in every_layer(model):
        weight = original_of(layer.module, layer.tensor)
        known = layer.tensor in prunable_names(layer.module)
        if isinstance(layer.module, nn.Embedding) and id(weight) not in readings:
            continue  # a lookup, which multiplies nothing
        seen = id(weight) in readings and not is_asked_for(layer.module)
        if known or seen or request.asks_for(layer):
            found.append(layer)
    return found


def _checked(target: Target, spec: Spec) -> Target:
    """The target, if its weights can become what is asked."""
    goal, name = target.goal, target.name
    if is_coded(target.weight):
        _check_coded(target, spec)
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


def _check_coded(target: Target, spec: Spec) -> None:
    """Eight-bit codes are masked and never rewritten, since their scales would have to follow."""
    what = next(
        (
            what
            for what, asked in (
                (f"{spec.label} changes weights", spec.fits_weights),
                ("reconstruct trains weights", spec.reconstruct),
                ("permute moves weights between the blocks of a scale", spec.permute),
            )
            if asked
        ),
        None,
    )
    if what is not None:
        raise SpecError(
            f"{target.name}: its weight is {target.weight.dtype}, and {what}; use MagnitudeSpec, "
            "WandaSpec or RIASpec without refit, or dequantize the model first, prune it and "
            "quantize it again"
        )


def _check_global(targets: list[Target], spec: Spec) -> None:
    goals = {str(t.goal) for t in targets}
    if len(goals) > 1 or isinstance(targets[0].goal.pattern, NM):
        raise SpecError(
            f'{type(spec).__name__}: scope "global" shares one budget, so every layer needs the '
            f"same unstructured or block goal, got {', '.join(sorted(goals))}"
        )
