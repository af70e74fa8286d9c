"""OWL: sparsities by each block's share of outliers (Yin et al., arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor


def outlier_ratio(scores: Callable[[], Iterable[Tensor]], outlier: float) -> float:
    """The share of scores above `outlier` times the mean of all; 0 if there are none.

    Args:
        scores: gives a block's scores |W_ij| * ||X_j||; called twice, since they are as large as
            the weights.
    """
    total = count = above = 0.0
    for score in scores():
        total += float(score.double().sum())
        count += score.numel()
    if not count:
        return 0.0
    limit = outlier * total / count
    for score in scores():
        above += int((score > limit).sum())
    return above / count


def owl_sparsities(ratios: Sequence[float], target: float, spread: float) -> list[float]:
    """Wished sparsities: target - spread at the largest ratio, target + spread at the least,
    linear between; the target where all are equal."""
    least, most = min(ratios), max(ratios)
    if most == least:
        return [target] * len(ratios)
    return [target + spread - 2 * spread * (r - least) / (most - least) for r in ratios]
