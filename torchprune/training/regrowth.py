"""Regrowth: masks that give back some weights for others, at the same counts and patterns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune.errors import SpecError
from torchprune.masking.projection import (
    BARRED,
    keep_largest_overall,
    project_each,
    project_partly,
)
from torchprune.specs.goals import Goal
from torchprune.specs.options import Checked
from torchprune.specs.patterns import NM
from torchprune.training.straight_through import StraightThrough


@dataclass(frozen=True)
class RigL(Checked):
    """Exchange the weakest weights for those of the largest gradient (Evci et al., arXiv
    1911.11134).

    At each change of the schedule a share of the kept weights, those that the spec scores lowest,
    gives way to pruned ones of the largest gradient, taken over the last step's batches as if
    nothing were pruned. What grows starts at 0. The share falls from `fraction` to 0 by half a
    cosine up to the schedule's end. What is dropped and grown at once just stays.

    Args:
        fraction: share of kept weights that is exchanged at first.
    """

    fraction: float = 0.3

    def __post_init__(self) -> None:
        _check_fraction(self, self.fraction)

    def share(self, progress: float) -> float:
        """The share that is exchanged after so much of the way to the end."""
        return self.fraction / 2 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class SET(Checked):
    """Exchange the weakest weights for random ones (Mocanu et al., arXiv 1707.04780).

    At each change of the schedule. What grows starts at 0.

    Args:
        fraction: share of kept weights that is exchanged.
    """

    fraction: float = 0.3

    def __post_init__(self) -> None:
        _check_fraction(self, self.fraction)

    def share(self, progress: float) -> float:
        """The share that is exchanged, always the same."""
        return self.fraction


@dataclass(frozen=True)
class MagnitudeRegrowth(Checked):
    """Choose masks anew from all weights, pruned ones with the values that they had.

    So a weight that was pruned comes back, with its old value, once those that were kept have
    shrunk below it: what Zhu & Gupta's own code does (arXiv 1710.01878).
    """


Exchange = RigL | SET
Regrowth = RigL | SET | MagnitudeRegrowth | StraightThrough


def _check_fraction(where: Checked, fraction: object) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
        raise SpecError(
            f"{type(where).__name__}: fraction is a share of the kept weights in [0, 1), got "
            f"{fraction!r}"
        )


def exchanged(
    worth: Sequence[Tensor],
    promise: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    goal: Goal,
    scope: str,
    share: float,
) -> list[Tensor]:
    """Masks that have the goal's counts and pattern, after some weights gave way to others.

    Args:
        worth: (rows, cols) float32 scores of each matrix, at least 0: of those kept now the lowest
            go.
        promise: likewise, of those that do not stay the highest come; None where nothing may come.
        kept: (rows, cols) bool, the masks now.
        goal: of all matrices.
        scope: "row", "layer" or "global", where counts are exact.
        share: of the weights that the goal keeps, how many go at least in a matrix.

    Returns:
        (rows, cols) bool masks. Where a mask keeps less than the goal and nothing may come it stays
        so.
    """
    own = [w.masked_fill(~k, BARRED) for w, k in zip(worth, kept, strict=True)]
    stays = [m & k for m, k in zip(_projected(own, goal, scope), kept, strict=True)]
    if all(p is None for p in promise):
        return stays
    safe = stays if share <= 0 else _fewer(own, stays, goal, scope, share)
    safe = [s if p is None else f for s, f, p in zip(stays, safe, promise, strict=True)]
    wanted = [
        torch.where(s, torch.inf, torch.full_like(w, BARRED) if p is None else _finite(p))
        for s, w, p in zip(safe, worth, promise, strict=True)
    ]
    grown = _projected(wanted, goal, scope)
    return [s if p is None else g for s, g, p in zip(stays, grown, promise, strict=True)]


def _projected(scores: Sequence[Tensor], goal: Goal, scope: str) -> list[Tensor]:
    """The goal's masks by scores."""
    if goal.share < 1:
        return [project_partly(s, goal.pattern, goal.sparsity, "layer", goal.share) for s in scores]
    return project_each(scores, goal.pattern, goal.sparsity, scope)


def _fewer(
    own: Sequence[Tensor], stays: Sequence[Tensor], goal: Goal, scope: str, share: float
) -> list[Tensor]:
    """What stays when a share of it goes, too."""
    left = [w.masked_fill(~s, BARRED) for w, s in zip(own, stays, strict=True)]
    if isinstance(goal.pattern, NM):
        fewer = []
        for score, stay in zip(left, stays, strict=True):
            count = stay.numel() - int(torch.count_nonzero(stay))
            gone = count + int(share * (stay.numel() - count))
            fewer += keep_largest_overall([score], gone)
    else:
        sparser = 1 - (1 - float(goal.sparsity)) * (1 - share)
        fewer = project_each(left, goal.pattern, sparser, scope)
    return [f & s for f, s in zip(fewer, stays, strict=True)]


def _finite(promise: Tensor) -> Tensor:
    """Magnitudes, of which none is as good as certain."""
    most = torch.finfo(torch.float32).max
    found: Tensor = promise.detach().float().abs().nan_to_num(0.0, most, most)
    return found
