"""One budget of zeros for many layers: from wished sparsities to whole counts that meet it exactly.

A layer's zeros come in steps: one more count of scope "row" is one weight in every row, of a block
pattern a whole tile. A `Share` says how many weights a count is, and which counts are allowed. The
budget is what the uniform counts prune in all, so it can always be met, whatever the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from torchprune.specs.patterns import prune_count


@dataclass(frozen=True)
class Share:
    """One layer's part in a budget.

    Attributes:
        step: weights that one count prunes.
        total: counts that would prune every weight.
        uniform: the count of uniform allocation.
        low, high: the least and greatest count allowed; low <= uniform <= high < total.
    """

    step: int
    total: int
    uniform: int
    low: int
    high: int

    @property
    def size(self) -> int:
        """The layer's weights."""
        return self.step * self.total


def share_of(step: int, total: int, sparsity: float, spread: float, already: int = 0) -> Share:
    """The share of a layer whose sparsity may be up to `spread` off.

    Bounds are rounded to whole counts toward the target's; the uniform count is always allowed.

    Args:
        already: counts that are pruned and stay so.
    """
    uniform = prune_count(total, sparsity)
    if already > uniform:  # some row is sparser than was asked: there is no room to choose
        return Share(step, total, uniform, uniform, uniform)
    target, away = Fraction(repr(float(sparsity))), Fraction(repr(float(spread)))
    low = max(math.ceil(total * (target - away)), already, 0)
    high = min(math.floor(total * (target + away)), total - 1)
    return Share(step, total, uniform, min(low, uniform), max(high, uniform))


def budget_of(shares: Sequence[Share]) -> int:
    """The weights that uniform allocation prunes."""
    return sum(share.step * share.uniform for share in shares)


def shifted(wishes: Sequence[float], shares: Sequence[Share]) -> list[float]:
    """Counts, not yet whole, of wished sparsities that are all shifted by the same amount, and
    clipped to what is allowed, so that they meet the budget."""
    budget = budget_of(shares)

    def moved(by: float) -> list[float]:
        return [
            min(max((wish + by) * share.total, share.low), share.high)
            for wish, share in zip(wishes, shares, strict=True)
        ]

    low = -1.0 - max(wishes, default=0.0)
    high = 1.0 - min(wishes, default=0.0)
    for _ in range(80):
        middle = (low + high) / 2
        spent = sum(s.step * count for s, count in zip(shares, moved(middle), strict=True))
        low, high = (middle, high) if spent < budget else (low, middle)
    return moved(high)


def cheapest(curves: Sequence[Sequence[tuple[int, float]]], shares: Sequence[Share]) -> list[float]:
    """Counts that meet the budget at the least summed cost, by the curves' lower convex hulls.

    The hulls' segments are taken in order of what a weight costs on them, the last one in part:
    the least that any counts can cost where costs between points are as on the hulls.

    Args:
        curves: for each layer its points (count, cost), counts rising from `low` to `high`.
    """
    counts = [float(share.low) for share in shares]
    left = float(budget_of(shares) - sum(share.step * share.low for share in shares))
    segments = [
        ((cost_b - cost_a) / (share.step * (b - a)), at, b - a)
        for at, (curve, share) in enumerate(zip(curves, shares, strict=True))
        for (a, cost_a), (b, cost_b) in pairwise(_hull(curve))
    ]
    for _, at, length in sorted(segments):
        taken = min(float(length), left / shares[at].step)
        counts[at] += taken
        left -= taken * shares[at].step
    return counts


def _hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of points in order."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-1][0]) >= (
            y - hull[-1][1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    return hull


def whole(counts: Sequence[float], shares: Sequence[Share]) -> list[int]:
    """Whole counts near the given ones that meet the budget to the weight.

    From the uniform counts, zeros move between layers of different steps by exact exchanges toward
    what is wished (so many counts of one kind for so many of the other), then between layers of the
    same step one by one, those that rounding wronged most first.

    Args:
        counts: within what the shares allow, meeting the budget but for rounding.
    """
    alike: dict[int, list[int]] = {}
    for at, share in enumerate(shares):
        alike.setdefault(share.step, []).append(at)
    found = [0] * len(shares)
    for step, total in _exchanged(counts, shares, alike).items():
        for at, count in _rounded(counts, shares, alike[step], total):
            found[at] = count
    return found


def _exchanged(
    counts: Sequence[float], shares: Sequence[Share], alike: dict[int, list[int]]
) -> dict[int, int]:
    """For each step the sum of whole counts of the layers that have it."""
    totals = {step: sum(shares[at].uniform for at in some) for step, some in alike.items()}
    room = {
        step: (sum(shares[at].low for at in some), sum(shares[at].high for at in some))
        for step, some in alike.items()
    }
    missing = {step: sum(counts[at] for at in some) - totals[step] for step, some in alike.items()}
    for more in alike:
        for less in alike:
            if missing[more] <= 0 or missing[less] >= 0:
                continue
            common = math.gcd(more, less)
            up, down = less // common, more // common
            times = min(
                int(missing[more] / up),
                int(-missing[less] / down),
                (room[more][1] - totals[more]) // up,
                (totals[less] - room[less][0]) // down,
            )
            for step, change in ((more, up * times), (less, -down * times)):
                totals[step] += change
                missing[step] -= change
    return totals


def _rounded(
    counts: Sequence[float], shares: Sequence[Share], some: Sequence[int], total: int
) -> list[tuple[int, int]]:
    """Whole counts of some layers that sum to a total, each near the wished one."""
    near = {at: min(max(math.floor(counts[at]), shares[at].low), shares[at].high) for at in some}
    left = total - sum(near.values())
    sign = 1 if left > 0 else -1
    order = sorted(some, key=lambda at: (sign * (near[at] - counts[at]), at))
    while left:
        before = left
        for at in order:
            if left and shares[at].low <= near[at] + sign <= shares[at].high:
                near[at] += sign
                left -= sign
        assert left != before, "a total between the sums of the bounds can be reached"
    return list(near.items())
