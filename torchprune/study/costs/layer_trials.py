"""One layer pruned at one level: its goal, its weights, and the model with them in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.calibration.moments import Moments
from torchprune.errors import SpecError
from torchprune.masking.packing import masked
from torchprune.masking.targets import Target, misfit_of
from torchprune.methods.decide import Decider
from torchprune.specs.goals import Goal, read_override
from torchprune.specs.patterns import NM, Pattern, Unstructured
from torchprune.specs.spec import Spec

Level = float | str | Pattern | tuple[str | Pattern, float]

USUAL = (0.3, 0.5, 0.7)


@dataclass(frozen=True, eq=False)
class Trial:
    """A layer at a level.

    Attributes:
        keep: bool, the weight's shape.
        values: the kept weights' new values, or None where they stay.
    """

    target: Target
    keep: Tensor
    values: Tensor | None

    @property
    def zeros(self) -> int:
        return self.keep.numel() - int(torch.count_nonzero(self.keep))

    @property
    def weight(self) -> Tensor:
        """The layer's weight as this trial has it."""
        dense = self.target.weight.data
        return masked(dense if self.values is None else self.values.to(dense.dtype), self.keep)


def goals_of(levels: Sequence[Level] | None, spec: Spec | None) -> dict[str, Goal]:
    """The goals that levels ask for, by what they are called.

    Args:
        spec: whose pattern they take, or None where they are shares of units.

    Raises:
        SpecError: there are none, or one is not understood.
    """
    if isinstance(levels, str | int | float) or not (levels is None or len(levels)):
        raise SpecError(f"levels must be sparsities or patterns, such as {USUAL}, got {levels!r}")
    pattern = Unstructured() if spec is None else spec.goal.pattern
    if levels is None:
        levels = (pattern,) if isinstance(pattern, NM) else USUAL
    usual = Goal(Unstructured() if isinstance(pattern, NM) else pattern, 0.5)
    found: dict[str, Goal] = {}
    for level in levels:
        goal = read_override("levels", level, usual)
        if goal is None:
            raise SpecError('levels: "dense" prunes nothing; give sparsities or patterns')
        if spec is None and not isinstance(goal.pattern, Unstructured):
            raise SpecError(f"levels: {level!r} is no share of units")
        plain = goal.pattern == usual.pattern and not isinstance(goal.pattern, NM)
        found[f"{float(goal.sparsity):g}" if plain else str(goal)] = goal
    return found


def at_goal(target: Target, goal: Goal, spec: Spec) -> Target | str:
    """The layer with that goal, or why it cannot have it."""
    found = replace(target, goal=goal)
    return misfit_of(found) or spec.misfit(target.view.cols) or found


def tried(target: Target, moments: Moments, decider: Decider, *, solve: bool) -> Trial:
    """The layer pruned as its goal says: by scores alone, or as the method solves it."""
    view, shape = target.view, target.weight.shape
    with modes.exact():
        if not solve:
            keep = decider.keep(target, moments)
            return Trial(target, view.from_matrix(keep, shape), None)
        (change,) = decider.changes([(target, moments)])
        return Trial(target, change.mask, change.values)


@contextmanager
def in_place(weights: Mapping[nn.Parameter | Tensor, Tensor]) -> Iterator[None]:
    """The model with other values in some parameters; theirs are back at the end."""
    dense = {parameter: parameter.data for parameter in weights}
    try:
        for parameter, other in weights.items():
            parameter.data = other
        yield
    finally:
        for parameter, data in dense.items():
            parameter.data = data
