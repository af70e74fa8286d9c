"""What waiting batches hold in memory: measured, and on request kept in half the bytes.

A coroutine that waits inside a model's forward keeps its activations in the local variables of its
frames. They are found there, counted, and can be stored in a 16-bit dtype while the batch waits:
the storage of a float32 tensor is copied, emptied, and filled again before the batch goes on, so
every view of it stays what it was.
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

_SMALLEST = 1 << 14
"""Bytes below which a storage is not worth storing otherwise."""


_MACHINERY = frozenset(vars(nn.Module())) - {"_buffers"}
"""The attributes every module has; tensors of a module's own are elsewhere."""


class Held:
    """The activations of all waiting batches.

    What was alive before calibration, what modules own, and what two batches share is nobody's
    activation and is left alone.

    Args:
        model: its modules may keep tensors, also ones made on the way.
        dtype: 16-bit dtype to hold float32 activations in, or None to only count.
        given: what batches bring: tensors, or containers of them.

    Attributes:
        bytes: what each batch holds, by its index.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, given: Sequence[Any]) -> None:
        self.model, self.dtype = model, dtype
        self.bytes: dict[int, int] = {}
        self._counted: dict[Hashable, int] = {}
        self._packed: dict[int, list[tuple[torch.UntypedStorage, Tensor]]] = {}
        if dtype is None:  # to only count, what may be met on the way will do
            self._older = {_address(t) for t in _tensors_in((*model.parameters(), *given), 3)}
        else:
            gc.collect()  # what is garbage now would die later, its address be given to another
            self._older = {_address(t) for t in gc.get_objects() if issubclass(type(t), Tensor)}
        self._fixed = self._older | self._owned()
        self._next: tuple[int, dict[int, Tensor]] | None = None

    def new_round(self) -> None:
        """Note the tensors modules own now, caches made on the way included."""
        if self.dtype is not None:  # to only count, what they owned at the start will do
            self._fixed = self._older | self._owned()

    def _owned(self) -> set[int]:
        """What modules keep as buffers or attributes of their own (parameters are older)."""
        return {
            _address(t)
            for module in self.model.modules()
            for t in _tensors_in((v for k, v in vars(module).items() if k not in _MACHINERY), 2)
        }

    def store(self, index: int, waiting: greenlet.greenlet, alike: Hashable) -> None:
        """Count what a batch holds, now that it waits; pack what the batch before it holds.

        Args:
            alike: to only count, one batch is looked at of those that are equal in this.
        """
        if self.dtype is None and alike in self._counted:
            self.bytes[index] = self._counted[alike]
            return
        found = {
            _address(t): t
            for frame in _frames(waiting.gr_frame)
            for t in _tensors_in(frame.f_locals.values(), 2)
        }
        mine = {address: t for address, t in found.items() if address not in self._fixed}
        self.bytes[index] = sum(t.untyped_storage().nbytes() for t in mine.values())
        if self.dtype is None:
            self._counted[alike] = self.bytes[index]
            return
        self._pack_next(apart_from=found)
        self._next = index, mine

    def end_round(self) -> None:
        """All batches wait: pack the last one too."""
        self._pack_next(apart_from={})

    def _pack_next(self, apart_from: dict[int, Tensor]) -> None:
        if self._next is not None:
            index, held = self._next
            spared = apart_from.keys() | self._owned()  # a forward may just have filled a cache
            self._pack(index, [t for address, t in held.items() if address not in spared])
            self._next = None

    def _pack(self, index: int, tensors: Iterable[Tensor]) -> None:
        packed = self._packed.setdefault(index, [])
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.dtype != torch.float32 or storage.nbytes() < _SMALLEST:
                continue
            flat = torch.empty(0, dtype=torch.float32, device=tensor.device).set_(storage)
            small = flat.to(self.dtype)
            packed.append((storage, small))
            self.bytes[index] -= storage.nbytes() - small.nbytes
            storage.resize_(0)

    @contextmanager
    def at_hand(self, index: int, waiting: greenlet.greenlet) -> Iterator[None]:
        """A waiting batch's activations unpacked for a while."""
        self.restore(index)
        yield
        if self.dtype is not None:
            self.store(index, waiting, None)

    def restore(self, index: int) -> None:
        """Give a batch its activations back, before it goes on."""
        if self._next is not None and self._next[0] == index:
            self._next = None
        for storage, small in self._packed.pop(index, []):
            storage.resize_(small.numel() * 4)
            flat = torch.empty(0, dtype=torch.float32, device=small.device).set_(storage)
            flat.copy_(small)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _tensors_in(values: Any, depth: int) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.layout == torch.strided and value.device.type != "meta":
                yield value
        elif depth and isinstance(value, dict):
            yield from _tensors_in(value.values(), depth - 1)
        elif depth and isinstance(value, list | tuple) and len(value) < 256:
            yield from _tensors_in(value, depth - 1)
