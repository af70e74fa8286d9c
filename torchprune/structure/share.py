"""How many units of each group go, and which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchprune.structure.specs import StructuredSpec, standardised


def uniform(score: Tensor, spec: StructuredSpec, width: int = 1) -> Tensor:
    """(count,) bool: the units that go, the lowest scores of one group; of equals the later.

    Args:
        width: of one unit, in channels.
    """
    count = len(score)
    order = score.double().argsort(descending=True, stable=True)
    gone = torch.ones(count, dtype=torch.bool)
    gone[order[: spec.kept(count, width)]] = False
    return gone


def across(
    scores: Sequence[Tensor], spec: StructuredSpec, widths: Sequence[int] = ()
) -> list[Tensor]:
    """A mask a group as by `uniform`, with one budget: sparsity times all units, rounded down.

    Units go in steps that leave a multiple of `spec.multiple` in each group, the step with the
    lowest mean of standardised scores first; the last step of a group stays.

    Args:
        widths: of one unit of each group, in channels; 1 by default.
    """
    steps: list[tuple[float, int, int, int]] = []  # mean score, group, place, units
    orders = []
    for at, score in enumerate(scores):
        normal = standardised(score)
        order = normal.argsort(stable=True)
        orders.append(order)
        width = spec.multiple(len(score), widths[at] if widths else 1)
        start, first = 0, len(score) % width or width
        while start + first < len(score):
            mean = float(normal[order[start : start + first]].mean())
            steps.append((mean, at, start, first))
            start, first = start + first, width
    budget = int(spec.sparsity * sum(len(score) for score in scores) + 1e-9)
    gone = [torch.zeros(len(score), dtype=torch.bool) for score in scores]
    full: set[int] = set()
    for _, at, start, units in sorted(steps):
        if at in full or units > budget:
            full.add(at)  # what is later in this group is worth more, and can only follow
            continue
        gone[at][orders[at][start : start + units]] = True
        budget -= units
    return gone
