"""A paired test in plain words."""

from __future__ import annotations

import math

from torchprune.study.tasks.paired import PairedTest


def in_unit(value: float, stderr: float, binary: bool, *, sign: str = "") -> str:
    """A value with its standard error: shares of right answers in percent, others as they are.

    >>> in_unit(0.625, 0.034, True), in_unit(23.4567, float("nan"), False)
    ('62.5 % ± 3.4', '23.46')
    """
    if binary:
        text = f"{100 * value:{sign}.1f} %"
        return text if math.isnan(stderr) else f"{text} ± {100 * stderr:.1f}"
    text = f"{value:{sign}.4g}"
    return text if math.isnan(stderr) else f"{text} ± {stderr:.2g}"


def verdict(
    test: PairedTest,
    adjusted: float,
    *,
    n: int,
    changed: int,
    level: float,
    binary: bool,
    higher_is_better: bool | None,
) -> str:
    """What the test says, in one sentence.

    Args:
        adjusted: p, corrected for all the tests made together.
        changed: examples on which the models' scores differ.
        level: p below it is a difference.
        binary: the metric is a share of right answers, told in points (hundredths).
        higher_is_better: None where nobody knows.
    """
    if not math.isfinite(test.difference):
        return "not comparable: a value is not finite"
    if adjusted < level:
        up = test.difference > 0
        word = _direction(up, higher_is_better)
        low, high = (_amount(end, binary, sign="+") for end in (test.low, test.high))
        return f"{word} by {_amount(abs(test.difference), binary, unit=True)} ({low} to {high})"
    would = _would_show(test.shows, binary)
    if not changed:
        return f"the same on all {n:,} examples{would if binary else ''}"
    return f"no difference that these {n:,} examples could show{would}"


def _would_show(shows: float, binary: bool) -> str:
    if math.isnan(shows) or (binary and shows > 1):
        return " (too few to show any)"
    return f" (would show ≥ {_least(shows, binary)})"


def _direction(up: bool, higher_is_better: bool | None) -> str:
    if higher_is_better is None:
        return "higher" if up else "lower"
    return "better" if up == higher_is_better else "worse"


def _amount(value: float, binary: bool, *, sign: str = "", unit: bool = False) -> str:
    if binary:
        return f"{100 * value:{sign}.1f}" + (" points" if unit else "")
    return f"{value:{sign}.3g}"


def _least(value: float, binary: bool) -> str:
    """Rounded up, so that it is not promised too much."""
    if binary:
        return f"{math.ceil(1000 * value - 1e-9) / 10:.1f} points"
    if not 0 < value < math.inf:
        return f"{value:.2g}"
    scale = 10 ** (1 - math.floor(math.log10(value)))
    return f"{math.ceil(value * scale - 1e-9) / scale:.2g}"
