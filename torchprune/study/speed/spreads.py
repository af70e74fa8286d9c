"""What a sample of times says: its quantiles, and how far a ratio of two medians can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
"""Of every interval."""

_RESAMPLES = 1000


@dataclass(frozen=True)
class Latency:
    """Seconds a call over the rounds.

    Attributes:
        median, low, high: seconds; the 10th and the 90th percentile are the ends.
        rounds: how many were measured.
        repeats: calls in each, of which the mean counts.
    """

    median: float
    low: float
    high: float
    rounds: int
    repeats: int = 1


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with the interval that holds it at a level of 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"

    @property
    def known(self) -> bool:
        """Whether the interval leaves out 1, so that one of the two is faster."""
        return self.high < 1 or self.low > 1


def latency_of(seconds: Sequence[float], repeats: int = 1) -> Latency:
    """The median and the 10th and 90th percentile of at least one round."""
    some = torch.tensor(seconds, dtype=torch.float64)
    low, median, high = some.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Latency(median, min(low, median), max(high, median), len(seconds), repeats)


def ratio_of(seconds: Sequence[float], base: Sequence[float]) -> Ratio:
    """median(seconds) / median(base), of contenders that took turns in the same rounds.

    The interval is the percentile bootstrap over rounds: pairs stay together, and so do runs of
    about n^(1/3) rounds, since what disturbs one round often disturbs the next (circular block
    bootstrap, Politis and Romano 1992). The draws are seeded.

    Raises:
        ValueError: there are no rounds, or not as many of both.
    """
    if len(seconds) != len(base) or not seconds:
        raise ValueError(f"rounds must be paired, got {len(seconds)} and {len(base)}")
    pairs = torch.tensor([list(seconds), list(base)], dtype=torch.float64)
    value = _medians(pairs[:, None, :])
    drawn = _medians(pairs[:, draws(len(seconds))])
    ratios = drawn[0] / drawn[1]
    return _interval(float(value[0] / value[1]), ratios)


def changed_sum(
    whole: Sequence[float], parts: Mapping[str, tuple[int, Sequence[float], Sequence[float]]]
) -> Ratio:
    """What a whole would take beside what it takes, were its parts exchanged.

    (median(whole) + sum of count * (median(new) - median(old))) / median(whole), with the
    bootstrap's interval; each part was measured in rounds of its own. Below 0 nothing goes.

    Args:
        parts: name -> how often it is in the whole, seconds of the new, seconds of the old.
    """
    base = torch.tensor(whole, dtype=torch.float64)
    median = _medians(base)
    drawn = _medians(base[draws(len(base))][None])[0]
    value, sums = float(median), drawn.clone()
    for k, (count, new, old) in enumerate(parts.values(), 1):
        pairs = torch.tensor([list(new), list(old)], dtype=torch.float64)
        exact = _medians(pairs[:, None, :])
        value += count * float(exact[0] - exact[1])
        some = _medians(pairs[:, draws(pairs.shape[1], seed=k)])
        sums += count * (some[0] - some[1])
    return _interval(max(0.0, value / float(median)), (sums / drawn).clamp_min(0.0))


def draws(rounds: int, seed: int = 0) -> Tensor:
    """(resamples, rounds) int64: places of the rounds that each resample holds."""
    length = max(1, round(rounds ** (1 / 3)))
    blocks = math.ceil(rounds / length)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(rounds, (_RESAMPLES, blocks, 1), generator=generator)
    places = (starts + torch.arange(length)).reshape(_RESAMPLES, -1)[:, :rounds]
    return places % rounds


def _medians(some: Tensor) -> Tensor:
    return some.quantile(0.5, dim=-1)


def _interval(value: float, drawn: Tensor) -> Ratio:
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = drawn.quantile(ends).tolist()
    return Ratio(value, min(low, value), max(high, value))
