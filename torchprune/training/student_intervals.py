"""Intervals of confidence for the mean of a few draws (Student's t)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Interval:
    """A mean and how far to both sides the interval reaches; inf for a single draw."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return self.text()

    def text(self, sign: str = "") -> str:
        """The mean with as many decimals as the half width has with two digits.

        >>> Interval(0.96314, 0.01662).text("+")
        '+0.963 ± 0.017'
        """
        if not (0 < self.half < math.inf):
            return f"{self.mean:{sign}.4g}"
        decimals = max(0, 1 - math.floor(math.log10(self.half)))
        mean = round(self.mean, decimals) + 0.0  # no -0.0
        return f"{mean:{sign}.{decimals}f} ± {self.half:.{decimals}f}"


def interval_of(draws: Sequence[float], confidence: float) -> Interval:
    """The t interval of independent draws of a roughly normal quantity.

    NaN draws make all of it NaN.

    >>> str(interval_of([1.0, 2.0, 3.0], 0.95))
    '2.0 ± 2.5'
    """
    if not all(map(math.isfinite, draws)):
        return Interval(math.nan, math.nan)
    if len(draws) < 2:
        return Interval(fmean(draws), math.inf)
    spread = stdev(draws) / math.sqrt(len(draws))
    return Interval(fmean(draws), spread * t_quantile(confidence, len(draws) - 1))


def t_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| <= t) = confidence, T of Student's distribution.

    >>> [round(t_quantile(0.95, n), 3) for n in (1, 2, 4, 9)]
    [12.706, 4.303, 2.776, 2.262]

    Args:
        confidence: between 0 and 1.
        freedom: degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while _share_within(high, freedom) < confidence:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if _share_within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return high


def _share_within(t: float, freedom: int) -> float:
    """P(|T| <= t) for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
