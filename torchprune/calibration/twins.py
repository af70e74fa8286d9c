"""The dense model's runs beside the batches: what each layer would read were nothing pruned.

Every batch has a twin, another coroutine of the same forward. The driver lets the twins go through
each layer before that layer is pruned, so they see dense weights all the way, while no weight is
kept twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import greenlet

from torchprune.calibration.sources import Read


class TwinDone(BaseException):
    """A twin has come to a layer that is pruned already, or past all that is asked of it. Not an
    error of the model."""


class Twins:
    """One dense run a batch.

    Args:
        count: how many batches.
        forward: runs the model on a batch, by its number.
        resume: lets a coroutine of a batch go on.

    Attributes:
        running: whether what runs now is a twin.
        reads: what twins read, by layer and batch, until that layer is pruned.
    """

    def __init__(
        self,
        count: int,
        forward: Callable[[int], None],
        resume: Callable[[int, greenlet.greenlet], None],
    ) -> None:
        self.running = False
        self.reads: dict[int, dict[int, Read]] = {}
        self._forward, self._resume = forward, resume
        self.runs = [greenlet.greenlet(partial(self._run, i)) for i in range(count)]
        self._places = [-1] * count
        self._fresh: set[int] = set()

    def advance(self, batches: Iterable[int], place: int, fresh: Iterable[int] = ()) -> None:
        """Let the batches' twins run up to a layer after `place`.

        Args:
            fresh: layers about to be pruned, which twins may still go through.
        """
        self._fresh = set(fresh)
        for batch in batches:
            run = self.runs[batch]
            while not run.dead and self._places[batch] <= place:
                self.running = True
                try:
                    self._resume(batch, run)
                finally:
                    self.running = False

    def reached(self, index: int, read: Read, done: set[int], pause: Callable[[], None]) -> None:
        """In a twin: about to run a layer."""
        if index not in done:
            self.reads.setdefault(index, {})[read.batch] = read
            self._places[read.batch] = index
            pause()
        elif index not in self._fresh:
            raise TwinDone

    def _run(self, batch: int) -> None:
        try:
            self._forward(batch)
        except TwinDone:  # it goes no further; the batch does without from here on
            return
