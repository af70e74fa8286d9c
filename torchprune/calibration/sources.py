"""What a batch is about to read at a layer, and which tensors statistics were taken from."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor

from torchprune.calibration.moments import Moments

Rows = Callable[[], list[Tensor]]


@dataclass(eq=False)
class Read:
    """One batch reading one tensor at one layer.

    Attributes:
        batch: which.
        x: the tensor, or None where nothing can be shared.
        rows: of it, one (rows, cols) matrix a group of the layer.
        geometry: what makes two layers read the same tensor as the same matrices.
        visit: how often the batch read something at this layer before.
    """

    batch: int
    x: Tensor | None
    rows: Rows
    geometry: Hashable = "rows"
    visit: int = 0

    @property
    def source(self) -> Tensor | None:
        """The tensor that `x` is a view of, or `x`: views are made anew at each call."""
        return self.x._base if self.x is not None and self.x._is_view() else self.x

    def alike(self) -> Hashable:
        """Equal for two reads of the same source that are the same matrices."""
        if self.x is None or self.x is self.source:
            return self.geometry
        return self.geometry, self.x.storage_offset(), self.x.shape, self.x.stride()


class Unforeseen(BaseException):
    """Layers that were to share their statistics read different tensors. Not an error of the
    model: begin again without sharing."""


class Sources:
    """The very tensors, one a batch, that statistics were taken from."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int | None, Hashable]] = {}

    def add(self, read: Read) -> None:
        """Note a batch's tensor as it is now. Two of one batch are nobody else's to share."""
        if (source := read.source) is not None:
            version = None if read.batch in self._tensors else _version(source)
            self._tensors[read.batch] = weakref.ref(source), version, read.alike()

    def holds(self, read: Read) -> bool:
        """Whether this is the batch's tensor, unchanged since for all one can tell, and as the
        same matrices."""
        ref, version, alike = self._tensors.get(read.batch, (None, None, None))
        source = read.source
        if source is None or ref is None or ref() is not source:
            return False
        return version is not None and _version(source) == version and alike == read.alike()

    def batches(self) -> set[int]:
        """The batches that have one."""
        return set(self._tensors)

    def alive(self) -> bool:
        """Whether the tensors may still be read by another layer."""
        return any(ref() is not None for ref, *_ in self._tensors.values())


@dataclass(eq=False)
class Gathered:
    """Statistics, what they were taken from, and the layer that was first to read it."""

    moments: Moments
    first: int
    sources: Sources = field(default_factory=Sources)


def _version(x: Tensor) -> int | None:
    """How often a tensor was written in place; None for inference tensors, which do not count."""
    return None if x.is_inference() else x._version
