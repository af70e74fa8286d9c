"""The shadows of batches that hold padding, beside them in lockstep; see `padding`.

A shadow waits where its batch waits and goes on through the same pruned layers, always before its
batch, but nothing that it reads is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import greenlet

from torchprune.calibration.batches import Batch
from torchprune.calibration.padding import Padding

Place = tuple[int, int]


class Shadows:
    """One run of a changed batch for every batch that holds padding.

    Args:
        padding: whose shadows they are.
        forward: runs the model on a batch.
        resume: lets a coroutine of a batch, by its number, go on.

    Attributes:
        running: whether what runs now is a shadow.
        runs: the coroutines by their batches' numbers.
    """

    def __init__(
        self,
        padding: Padding,
        forward: Callable[[Batch], None],
        resume: Callable[[int, greenlet.greenlet], None],
    ) -> None:
        self.running = False
        self._padding, self._forward, self._resume = padding, forward, resume
        self.runs = {i: greenlet.greenlet(partial(self.run, i)) for i in padding.shadowed()}
        self._places: dict[int, Place] = {}

    def run(self, index: int) -> None:
        """A shadow's whole forward."""
        before, self.running = self.running, True
        try:
            self._padding.run_shadow(index, self._forward)
        finally:
            self.running = before

    def waits(self, index: int, place: Place) -> None:
        """Note where a shadow is about to wait."""
        self._places[index] = place

    def start(self) -> None:
        """Let all run to where they first wait."""
        self._advance(self.runs)

    def advance(self, place: Place) -> None:
        """Let those go on that wait at a place where all is done."""
        self._advance(i for i in self.runs if self._places.get(i) == place)

    def catch_up(self, place: Place) -> None:
        """Let those go on that wait before a place, where their batches did not come."""
        for index, run in self.runs.items():
            while not run.dead and self._places[index] < place:
                self._advance([index])

    def _advance(self, some: Iterable[int]) -> None:
        for index in list(some):
            if not (run := self.runs[index]).dead:
                self.running = True
                try:
                    self._resume(index, run)
                finally:
                    self.running = False

    def end(self) -> None:
        """Let go of everything: whoever resumes them may hold a model."""
        self.runs = {}
        del self._forward, self._resume
