"""The statistics of layers' inputs while batches come to them, shared where they read the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from torchprune import modes
from torchprune.calibration import moments as sizes
from torchprune.calibration.moments import Moments
from torchprune.calibration.padding import counted
from torchprune.calibration.room import check_room
from torchprune.calibration.sources import Gathered, Read, Unforeseen
from torchprune.errors import CalibrationError
from torchprune.masking.targets import Target

Tokens = Callable[[int, Read, Sequence[Tensor]], list[Tensor | None]]
"""Tells which of the rows that a batch reads at a layer are tokens', per group: None if all are."""

AtHand = Callable[[int, Read], AbstractContextManager[Read | None]]
"""Makes a read of a layer (by its number) possible, and gives the dense model's in its place."""


class Gathering:
    """What was counted of each layer's inputs so far. Layers and batches go by their numbers.

    Args:
        targets: the layers.
        batches: how many batches there are.
        gram, total, cross, cap: which statistics, as for `Moments`.
        rows_will_do: whether of a layer wider than `moments.WIDEST` so many rows as tell the same
            are kept in place of the second moment.
        share: whether layers that read the same tensors have them in common.
        tokens: tells which rows count.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        batches: int,
        *,
        gram: bool,
        total: bool,
        cross: bool,
        cap: float | None,
        tokens: Tokens,
        share: bool = True,
        rows_will_do: bool = False,
    ) -> None:
        self._targets, self._batches, self._share = targets, batches, share
        widths = [target.view.cols for target in targets]
        self._grams = [gram and not (rows_will_do and w > sizes.WIDEST) for w in widths]
        self._wanted = sizes.WIDE_ROWS if gram else sizes.SAMPLE_ROWS
        self._total, self._cross, self._cap, self._tokens = total, cross, cap, tokens
        self._reads: dict[int, list[Read]] = {}  # of the batches that wait at a layer
        self._gathered: dict[int, Gathered] = {}  # of a layer, until it is taken
        self._shareable: list[Gathered] = []

    def check_room(self) -> None:
        """
        Raises:
            CalibrationError: what is to be collected of one layer does not fit into memory.
        """
        needs = {}
        for target, gram in zip(self._targets, self._grams, strict=True):
            size = 4 * target.view.groups * target.view.cols**2 * (gram + self._cross)
            needs[target.name] = (target.weight.device, size)
        check_room(needs)

    def wait(self, index: int, read: Read) -> None:
        """Note what a batch that waits at a layer is about to read."""
        self._reads.setdefault(index, []).append(read)

    def run_through(self, index: int, read: Read, *, alone: bool = False) -> bool:
        """Count a read at once: the batch will not wait here.

        Args:
            alone: share with no other layer, since more reads of this one will follow.

        Returns:
            whether the batch read something else at this layer before.

        Raises:
            Unforeseen: statistics were shared with a layer that now reads something else.
        """
        gathered, again = self._gathered.get(index), False
        if gathered is None:
            shared = None if alone else self._matching(index, [read], whole=False)
            self._gathered[index] = gathered = shared or self._fresh(index, shareable=not alone)
        else:
            again = read.batch in gathered.sources.batches()
        if gathered.sources.holds(read):
            return False
        borrowed = [i for i, g in self._gathered.items() if g is gathered and i != index]
        if borrowed and read.batch in gathered.sources.batches():
            raise Unforeseen
        self._count(index, gathered, read)
        return again

    def reached(self) -> list[int]:
        """The layers that something was counted of, or that a batch waits at."""
        return sorted(self._reads.keys() | self._gathered.keys())

    def waiters(self, index: int) -> set[int]:
        """The batches that wait at a layer."""
        return {read.batch for read in self._reads.get(index, [])}

    def take(self, index: int, at_hand: AtHand) -> Gathered:
        """The finished statistics of a layer, which are kept here only to be shared.

        Raises:
            CalibrationError: they are not finite.
        """
        reads = self._reads.pop(index, [])
        if reads:
            shared = self._matching(index, reads, whole=True)
            self._gathered[index] = gathered = shared or self._fresh(index)
            if shared is None:
                for read in reads:
                    with at_hand(index, read) as twin:
                        self._count(index, gathered, read, twin)
        gathered = self._gathered.pop(index)
        with modes.exact():
            gathered.moments.finish()
        if not gathered.moments.is_finite():
            raise CalibrationError(
                f"{self._targets[index].name}: its inputs hold inf or NaN on the calibration data"
            )
        return gathered

    def forget_dead(self) -> None:
        """Let go of statistics of tensors that no layer can read any more."""
        self._shareable = [g for g in self._shareable if g.sources.alive()]

    def clear(self) -> None:
        """Let go of everything."""
        self._reads, self._gathered, self._shareable = {}, {}, []

    def _fresh(self, index: int, *, shareable: bool = True) -> Gathered:
        target = self._targets[index]
        view, device = target.view, target.weight.device
        with modes.exact():  # a forward in inference mode must not make them inference tensors
            moments = Moments.empty(
                view.groups,
                view.cols,
                device,
                gram=self._grams[index],
                total=self._total,
                cross=self._cross,
                cap=self._cap,
            )
        gathered = Gathered(moments, index)
        if shareable and self._share:
            self._shareable.append(gathered)
        return gathered

    def _count(self, index: int, gathered: Gathered, read: Read, twin: Read | None = None) -> None:
        with modes.exact():
            rows = read.rows()
            counts = self._tokens(index, read, rows)
            dense = None if twin is None else counted(twin.rows(), counts)
            sample = 0 if self._grams[index] else -(-self._wanted // self._batches)
            gathered.moments.add(counted(rows, counts), sample, dense)
        gathered.sources.add(read)

    def _matching(self, index: int, reads: Sequence[Read], *, whole: bool) -> Gathered | None:
        """Statistics of another layer that were taken from exactly these tensors."""
        for gathered in self._shareable:
            if all(map(gathered.sources.holds, reads)) and (
                not whole or len(gathered.sources.batches()) == len(reads)
            ):
                return gathered
        return None
