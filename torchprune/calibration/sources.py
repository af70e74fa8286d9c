"""What a batch is about to read at a layer, and which tensors statistics were taken from."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from torchprune.calibration.moments import Moments

Rows = Callable[[], list[Tensor]]


@dataclass(eq=False)
class Read:
    """One batch reading one tensor at one layer. `x` is None where nothing can be shared; `visit`
    counts the batch's reads of that layer."""

    batch: int
    x: Tensor | None
    rows: Rows
    visit: int = 0


class Sources:
    """The very tensors, one a batch, that statistics were taken from."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int | None]] = {}

    def add(self, batch: int, x: Tensor) -> None:
        """Note a batch's tensor as it is now."""
        self._tensors[batch] = weakref.ref(x), _version(x)

    def holds(self, batch: int, x: Tensor | None) -> bool:
        """Whether this is the batch's tensor, unchanged since for all one can tell."""
        ref, version = self._tensors.get(batch, (None, None))
        if x is None or ref is None or ref() is not x:
            return False
        return version is not None and _version(x) == version

    def batches(self) -> set[int]:
        """The batches that have one."""
        return set(self._tensors)

    def alive(self) -> bool:
        """Whether the tensors may still be read by another layer."""
        return any(ref() is not None for ref, _ in self._tensors.values())


@dataclass(eq=False)
class Gathered:
    """Statistics, what they were taken from, and the layer that was first to read it."""

    moments: Moments
    geometry: object
    first: int
    sources: Sources = field(default_factory=Sources)


def _version(x: Tensor) -> int | None:
    """How often a tensor was written in place; None for inference tensors, which do not count."""
    return None if x.is_inference() else x._version
