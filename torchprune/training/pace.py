"""How long recovery runs, and how large its steps are on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

PASSES = {"fast": 1, "balanced": 3, "max": 10}
"""Passes over the data that an effort is worth; what they bring is in docs/results/recovery.md."""

_WARM = 0.05

clock: Callable[[], float] = time.monotonic
"""What `minutes=` are read from, in seconds."""


def share_of_rate(progress: float) -> float:
    """What a step's rate is multiplied by: up from near 0 in a twentieth of the way, then down to 0
    in a straight line.

    Args:
        progress: from 0 to 1.
    """
    return min(1.0, (progress + 0.002) / _WARM) * max(0.0, 1 - progress)


@dataclass(eq=False)
class Pace:
    """How far a run is.

    Attributes:
        steps: after which it ends, or None.
        seconds: after which it ends, or None; one of the two is given.
        used: seconds that are gone.
    """

    steps: int | None
    seconds: float | None
    step: int = 0
    used: float = 0.0
    _since: float = field(default_factory=lambda: clock())

    def progress(self) -> float:
        """From 0 to 1, where it ends."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        assert self.seconds is not None
        return min(1.0, self.elapsed() / self.seconds) if self.seconds > 0 else 1.0

    def elapsed(self) -> float:
        """Seconds since it began."""
        return self.used + clock() - self._since

    @property
    def total(self) -> int:
        """What `done` counts to: steps, or hundredths of the time."""
        return 100 if self.steps is None else self.steps

    def done(self) -> int:
        """For a bar."""
        return self.step if self.steps is not None else int(100 * self.progress())

    def leave(self, seconds: float) -> None:
        """Keep so many seconds free at the end."""
        if self.seconds is not None:
            self.seconds = max(0.0, self.seconds - seconds)
