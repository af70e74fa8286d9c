"""Schedules: how sparse a model is to be after so many optimizer steps.

A schedule is a frozen callable, `step -> sparsity`. It is a staircase: it changes at `start`, every
`every` steps after that, and at `end`; before `start` it is 0, from `end` on it is `final`. Any
other callable of a step serves as a schedule, too.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

from torchprune.errors import SpecError
from torchprune.specs.options import Checked, check_whole


class Schedule(Checked):
    """What all schedules share. A subclass says where it starts, ends and how it goes.

    Attributes:
        start, end: the first and the last optimizer step at which masks change; `end` may be None
            for a schedule that never ends.
        every: how many steps lie between two changes.
        final: the share of zeros in the end.
    """

    start: int
    end: int | None
    every: int
    final: float

    @abstractmethod
    def level(self, progress: float) -> float:
        """The sparsity at a share of the way from `start` to `end`."""

    def __call__(self, step: int) -> float:
        """The share of zeros that masks have after this many optimizer steps."""
        if step < self.start:
            return 0.0
        if self.end is None or step >= self.end:
            return self.final
        at = (step - self.start) // self.every * self.every
        return self.level(at / (self.end - self.start))

    def changes_at(self, step: int) -> bool:
        """Whether masks change at this step."""
        return self.last_change(step) == step

    def last_change(self, step: int) -> int | None:
        """The last step up to this one at which masks change, or None before the first."""
        if step < self.start:
            return None
        if self.end is not None and step >= self.end:
            return self.end
        return self.start + (step - self.start) // self.every * self.every


@dataclass(frozen=True)
class Constant(Schedule):
    """One sparsity from `start` on: static sparse training, or what regrowth keeps to.

    Args:
        sparsity: share of zeros.
        start: optimizer step of the first masks; 0 is before training.
        end: last step at which regrowth changes masks; None is never.
        every: steps between such changes.
    """

    sparsity: float
    start: int = 0
    end: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        _check(self, self.sparsity)

    @property
    def final(self) -> float:  # type: ignore[override]
        return self.sparsity

    def level(self, progress: float) -> float:
        return self.sparsity


@dataclass(frozen=True)
class OneShot(Schedule):
    """All at once.

    Args:
        sparsity: share of zeros.
        at: optimizer step.
    """

    sparsity: float
    at: int = 0

    def __post_init__(self) -> None:
        _check(self, self.sparsity)

    @property
    def final(self) -> float:  # type: ignore[override]
        return self.sparsity

    @property
    def start(self) -> int:  # type: ignore[override]
        return self.at

    @property
    def end(self) -> int:  # type: ignore[override]
        return self.at

    @property
    def every(self) -> int:  # type: ignore[override]
        return 1

    def level(self, progress: float) -> float:
        return self.sparsity


@dataclass(frozen=True)
class _Rising(Schedule):
    """From `initial` at the step `start` to `final` at `end`, changing every so many steps.

    Args:
        initial, final: shares of zeros.
        start, end: optimizer steps.
        every: steps between two changes; the last one comes at `end` whatever it is.
    """

    initial: float
    final: float
    start: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        _check(self, self.initial, self.final)


@dataclass(frozen=True)
class Linear(_Rising):
    """Equal steps: s(p) = initial + (final - initial) p, with p the share of the way gone.

    Args:
        initial, final: shares of zeros.
        start, end: optimizer steps.
        every: steps between two changes; the last one comes at `end` whatever it is.
    """

    def level(self, progress: float) -> float:
        return self.initial + (self.final - self.initial) * progress


@dataclass(frozen=True)
class Cubic(_Rising):
    """Fast, then slow: s(p) = final + (initial - final) (1 - p)^3 (Zhu & Gupta, arXiv 1710.01878).

    Args:
        initial, final: shares of zeros.
        start, end: optimizer steps.
        every: steps between two changes; the last one comes at `end` whatever it is.
    """

    def level(self, progress: float) -> float:
        return self.final + (self.initial - self.final) * (1 - progress) ** 3


@dataclass(frozen=True)
class Cosine(_Rising):
    """Slow, fast, slow: s(p) = final + (initial - final) (1 + cos(pi p)) / 2.

    Args:
        initial, final: shares of zeros.
        start, end: optimizer steps.
        every: steps between two changes; the last one comes at `end` whatever it is.
    """

    def level(self, progress: float) -> float:
        return self.final + (self.initial - self.final) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Iterative(Schedule):
    """Rounds that each prune the same share of what is left, as lottery tickets are found
    (Frankle & Carbin, arXiv 1803.03635): 1 - s(k) = (1 - initial) ((1 - final) / (1 - initial))^
    (k / rounds), for k = 1 to `rounds`.

    Args:
        initial, final: shares of zeros before the first round and after the last.
        rounds: how many.
        start: optimizer step of the first round.
        every: steps of training between two rounds.
    """

    initial: float
    final: float
    rounds: int
    start: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        check_whole("Iterative", "rounds", self.rounds)
        _check(self, self.initial, self.final)

    @property
    def end(self) -> int:  # type: ignore[override]
        return self.start + (self.rounds - 1) * self.every

    @property
    def levels(self) -> tuple[float, ...]:
        """The sparsity after each round."""
        ratio = (1 - self.final) / (1 - self.initial)
        left = [(1 - self.initial) * ratio ** (k / self.rounds) for k in range(1, self.rounds)]
        # Rounded: else 1 - 0.8 * 0.8 is a little less than 0.36, and a weight too few goes.
        return (*(round(1 - share, 12) for share in left), self.final)

    def level(self, progress: float) -> float:
        return self.levels[round(progress * (self.rounds - 1))]


def _check(schedule: Schedule, *levels: float) -> None:
    """Refuse sparsities, steps and their order that make no schedule.

    Raises:
        SpecError: saying which and what is accepted.
    """
    name = type(schedule).__name__
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 <= level < 1:
            raise SpecError(f"{name}: sparsities are shares of zeros in [0, 1), got {level!r}")
    if list(levels) != sorted(levels):
        raise SpecError(
            f"{name}: it rises from initial to final, got {levels[0]!r} and {levels[1]!r}"
        )
    check_whole(name, "every", schedule.every)
    first = "at" if isinstance(schedule, OneShot) else "start"
    for field, step in ((first, schedule.start), ("end", schedule.end)):
        none = step is None and isinstance(schedule, Constant)
        if not none and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            raise SpecError(f"{name}: {field} is an optimizer step, from 0 on, got {step!r}")
    if schedule.end is not None and schedule.end < schedule.start:
        raise SpecError(f"{name}: start={schedule.start} comes after end={schedule.end}")
    if isinstance(schedule, _Rising) and schedule.end == schedule.start:
        raise SpecError(
            f"{name}: start and end are both {schedule.start}; use OneShot({schedule.final}, "
            f"at={schedule.start})"
        )
