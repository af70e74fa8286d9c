"""Tensors put aside on disk, so that a change can be undone without holding everything twice."""

from __future__ import annotations

import ctypes
import tempfile
from types import TracebackType

import torch
from torch import Tensor


class Spool:
    """An unnamed temporary file of tensors, gone when closed or when the process ends."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def put(self, tensor: Tensor) -> int:
        """Write a tensor's values; returns the place to `fetch` them from."""
        place = self._file.seek(0, 2)
        values = tensor.detach().cpu().contiguous()
        self._file.write(_memory_of(values))
        return place

    def fetch(self, place: int, into: Tensor) -> None:
        """Copy the values written at a place back into a tensor of the same shape and dtype."""
        values = torch.empty(into.shape, dtype=into.dtype)
        self._file.seek(place)
        read = self._file.readinto(_memory_of(values))
        if read != values.nbytes:
            raise OSError(f"read {read} of {values.nbytes} bytes back from the temporary file")
        into.copy_(values)


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in place."""
    buffer = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(buffer).cast("B")
