"""Two models on the same examples: the difference, its interval, and whether it is chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist, fmean, stdev
from typing import Literal

import torch

from torchprune.training.student_intervals import t_quantile

Link = Literal["mean", "exp", "bits"]
"""What a metric is of the examples' totals over their weights, r: r, exp(r) or r / ln 2."""

POWER = 0.8
"""How often a difference of the size `shows` would be found."""

_EXACT = 12
"""Up to so many differing examples all signs are tried."""

_FLIPS = 20_000


@dataclass(frozen=True)
class PairedTest:
    """A model less another on the same examples.

    Attributes:
        difference, stderr: of the metric, in its own unit.
        low, high: the ends of the interval of confidence of the difference.
        p: how often chance alone makes a difference as large, two-sided.
        shows: the smallest true difference that so many such examples show, 4 times of 5.
        method: "exact McNemar" where every score is 0 or 1, else "paired permutation".
    """

    difference: float
    stderr: float
    low: float
    high: float
    p: float
    shows: float
    method: str


def value_of(totals: Sequence[float], weights: Sequence[float], link: Link) -> float:
    """A metric of examples: `link` of the sum of totals over the sum of weights.

    >>> value_of([1.0, 0.0], [1.0, 1.0], "mean")
    0.5
    """
    rate = math.fsum(totals) / math.fsum(weights)
    if link == "mean":
        return rate
    if link == "bits":
        return rate / math.log(2)
    try:
        return math.exp(rate)
    except OverflowError:
        return math.inf


def stderr_of(totals: Sequence[float], weights: Sequence[float], link: Link) -> float:
    """The metric's standard error over examples, to first order; NaN of a single example."""
    return _stderr(_influences(totals, weights, link))


def paired_test(
    own: Sequence[float],
    other: Sequence[float],
    weights: Sequence[float],
    link: Link,
    *,
    level: float = 0.05,
    tests: int = 1,
    seed: int = 0,
) -> PairedTest:
    """Compare two models' totals on the same examples.

    Scores that are all 0 or 1 get McNemar's exact test (1947) and Tango's score interval (1998);
    others the permutation test that swaps the models' scores example by example (of the sum of
    totals) and Student's interval of the influences on the metric.

    Args:
        own, other, weights: one number an example, in the same order.
        level: the interval holds 1 - level.
        tests: how many tests are made together; `shows` is at level / tests.
        seed: of the permutations, where not all are tried.
    """
    size = len(own)
    strict = level / tests
    changes = [a - b for a, b in zip(own, other, strict=True)]
    difference = value_of(own, weights, link) - value_of(other, weights, link)
    pairs = zip(_influences(own, weights, link), _influences(other, weights, link), strict=True)
    stderr = _stderr([a - b for a, b in pairs])
    normal = NormalDist()
    shows = (normal.inv_cdf(1 - strict / 2) + normal.inv_cdf(POWER)) * stderr
    if link == "mean" and is_binary(own) and is_binary(other) and set(weights) == {1.0}:
        gained, lost = changes.count(1.0), changes.count(-1.0)
        least = math.ceil(math.log2(2 / strict)) / size  # so many, all one way, have p <= strict
        low, high = tango_interval(gained, lost, size, 1 - level)
        shows = least if math.isnan(shows) else max(shows, least)
        p = mcnemar(gained, lost)
        return PairedTest(difference, stderr, low, high, p, shows, "exact McNemar")
    half = t_quantile(1 - level, size - 1) * stderr if size > 1 else math.inf
    p = sign_flips(changes, seed)
    low, high = difference - half, difference + half
    return PairedTest(difference, stderr, low, high, p, shows, "paired permutation")


def is_binary(scores: Sequence[float]) -> bool:
    """Whether every score is 0 or 1."""
    return set(scores) <= {0.0, 1.0}


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p of McNemar's test: chance splits the changed examples evenly.

    >>> mcnemar(0, 6)
    0.03125
    """
    changed = gained + lost
    tail = sum(math.comb(changed, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / (1 << changed))


def tango_interval(gained: int, lost: int, size: int, confidence: float) -> tuple[float, float]:
    """Tango's score interval for the difference of two paired shares, (gained - lost) / size.

    It keeps its width where no example changed. Source: T. Tango, Statistics in Medicine 17, 1998.

    >>> low, high = tango_interval(0, 0, 200, 0.95)
    >>> round(low, 3), round(high, 3)
    (-0.019, 0.019)
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    seen = (gained - lost) / size

    def far(delta: float) -> bool:
        return abs(_score(delta, gained, lost, size)) > z

    return _edge(far, seen, -1.0), _edge(far, seen, 1.0)


def sign_flips(changes: Sequence[float], seed: int, draws: int = _FLIPS) -> float:
    """The two-sided p of the permutation test on paired differences.

    Each change's sign is as likely one as the other if the models are equal. All signs are tried
    for at most 12 changes that are not 0; else `draws` at random, which the data's own joins.
    """
    moved = torch.tensor([c for c in changes if c != 0.0], dtype=torch.float64)
    seen = abs(float(moved.sum())) - 1e-12 * float(moved.abs().sum())  # a tie however it rounds
    if len(moved) <= _EXACT:
        signs = torch.tensor(list(product((1.0, -1.0), repeat=len(moved))), dtype=torch.float64)
        return float((signs @ moved).abs().ge(seen).double().mean())
    generator, hits, left = torch.Generator().manual_seed(seed), 0, draws
    while left:
        rows = min(left, max(1, 4_000_000 // len(moved)))
        signs = torch.randint(2, (rows, len(moved)), generator=generator, dtype=torch.int8)
        hits += int(((signs.double() * 2 - 1) @ moved).abs().ge(seen).sum())
        left -= rows
    return (1 + hits) / (1 + draws)


def holm(ps: Sequence[float]) -> list[float]:
    """The p values corrected for being several, so that one false find in all is as rare.

    Source: S. Holm, Scandinavian Journal of Statistics 6, 1979.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    found, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        found[i] = least
    return found


def _influences(totals: Sequence[float], weights: Sequence[float], link: Link) -> list[float]:
    """What each example adds to the metric to first order; their mean is 0."""
    weight = math.fsum(weights)
    rate = math.fsum(totals) / weight
    slope = {"mean": 1.0, "bits": 1 / math.log(2), "exp": value_of(totals, weights, "exp")}[link]
    scale = slope * len(totals) / weight
    return [scale * (t - rate * w) for t, w in zip(totals, weights, strict=True)]


def _stderr(influences: Sequence[float]) -> float:
    if len(influences) < 2:
        return math.nan
    return stdev(influences, fmean(influences)) / math.sqrt(len(influences))


def _score(delta: float, gained: int, lost: int, size: int) -> float:
    """Tango's statistic at a supposed difference, the likeliest share of losses given it."""
    a = 2 * size
    b = -gained - lost + (2 * size - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    share = max(0.0, (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a))
    variance = size * (2 * share + delta * (1 - delta))
    above = gained - lost - size * delta
    if variance <= 0:
        return math.copysign(math.inf, above) if above else 0.0
    return above / math.sqrt(variance)


def _edge(far: Callable[[float], bool], near: float, end: float) -> float:
    """Where `far` begins to hold on the way from `near` to `end`; `end` if it never does."""
    if not far(end):
        return end
    for _ in range(60):
        middle = (near + end) / 2
        near, end = (near, middle) if far(middle) else (middle, end)
    return near
