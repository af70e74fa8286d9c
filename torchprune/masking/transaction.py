"""Changing a model, all or nothing: every layer becomes pruned, or stays what it was.

Memory is what large models lack, so nothing is held twice while batches wait: masks are one bit a
weight, with the values that they hide, and weights that a method overwrites rest in a temporary
file. All those bits have one tensor until the end: many that come one by one would settle between
the activations, and leave holes there that nothing fits in any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from torchprune.errors import MaskError
from torchprune.masking.keeper import values_of
from torchprune.masking.mask import Mask, Record, detach, put_on
from torchprune.masking.packing import (
    clear,
    masked,
    pack_bits,
    pack_values,
    packed_size,
    put_values,
    unpack_bits,
)
from torchprune.masking.shards import is_shard, local_of, whole_of, write
from torchprune.masking.targets import Target
from torchprune.masking.undo_file import Spool
from torchprune.modes import exact


@dataclass(eq=False)
class Change:
    """What one layer is to become: a mask, its record and, if the method changes them, values."""

    target: Target
    mask: Tensor
    record: Record
    values: Tensor | None = None


class _Edit:
    """One layer's change: how it is made, finished and undone.

    Values are written into the parameter's own memory, as an optimizer would, and zeros too: what
    they replace waits packed, or in a temporary file if nobody is to have it back. The mask is
    attached when the batches have passed.
    """

    def __init__(
        self, change: Change, room: Tensor, spool: Spool, *, keep_dense: bool, reversible: bool
    ) -> None:
        self.change, self.spool = change, spool
        self.room = room.copy_(pack_bits(change.mask))
        weight, mask = change.target.weight, change.target.mask
        self.data, self.place = values_of(weight), -1
        self.before = None if mask is None else mask.snapshot()
        self.reversible = reversible and (mask is None or mask.reversible)
        self.gone: Tensor | None = None
        self.dense: Tensor | None = None
        if change.values is None and not torch._debug_has_internal_overlap(self.data):
            gone = pack_values(self.data, self._places())
            if self.reversible:
                self.gone = gone
            else:
                self.place, self.gone = spool.put(gone), torch.empty_like(gone, device="meta")
            clear(self.data, self.room)
            return
        if change.values is not None and keep_dense and self.reversible:
            self.dense = self.data.clone() if mask is None else mask.restored(weight)
        new = masked(self.data if change.values is None else change.values, change.mask)
        if change.values is not None and self.data.is_contiguous():
            self.place = spool.put(self.data)
            self.data.copy_(new)
        else:  # an expanded weight cannot be written in place; a transposed one keeps its layout
            weight.data = torch.empty_like(self.data).copy_(new)

    def _places(self) -> Tensor:
        """What this change prunes, and nothing did before it."""
        goes = ~unpack_bits(self.room, self.data.shape)
        return goes if self.before is None else goes & unpack_bits(self.before[0], goes.shape)

    def settle(self) -> None:
        """The batches have passed: attach the mask."""
        layer, change, mask = self.change.target.layer, self.change, self.change.target.mask
        if mask is None:
            mask = Mask(change.mask, change.record, self.dense)
            mask.bits = self.room
            put_on(layer.module, layer.tensor, mask)
        else:
            mask.bits.copy_(self.room)  # in place: compiled models see it without recompiling
            mask.record = change.record
            mask.dense = mask.dense if self.dense is None else self.dense
            mask.put_on(change.target.weight)
        change.mask, change.values = self.room, None  # bits are all that is held

    def finish(self) -> None:
        """All layers are done: the bits become the mask's own, with the values that they hide."""
        mask = self.change.target.mask
        assert mask is not None
        if self.before is None:
            mask.bits = self.room.clone()
        if not self.reversible or self.change.record.updates_weights:
            mask.hidden = None
        elif self.gone is None:
            mask.hidden = pack_values(self.data, ~mask.mask)
        elif self.before is None:
            mask.hidden = self.gone
        else:
            whole = torch.zeros_like(self.data, device=self.room.device)
            bits, _, hidden, _ = self.before
            put_values(whole, ~unpack_bits(bits, whole.shape), cast(Tensor, hidden))
            put_values(whole, self._places(), self.gone)
            mask.hidden = pack_values(whole, ~mask.mask)

    def undo(self) -> None:
        """Make the layer what it was."""
        self.undo_values(self.change.target)
        self._undo_mask(self.change.target)

    def undo_values(self, target: Target) -> None:
        """Put the parameter's own values back."""
        target.weight.data = self.data
        if self.gone is not None:
            gone = self.gone
            if self.place >= 0:
                gone = torch.empty_like(gone, device=self.data.device)
                self.spool.fetch(self.place, gone)
            put_values(self.data, self._places(), gone)
        elif self.place >= 0:
            self.spool.fetch(self.place, self.data)

    def _undo_mask(self, target: Target) -> None:
        if target.mask is None:
            return
        if self.before is None:
            detach(target.layer.module, target.layer.tensor)
        else:
            target.mask.restore(self.before)


class _ShardEdit(_Edit):
    """A change of a layer of which this process holds a part; its mask is decided by the whole."""

    def __init__(
        self, change: Change, room: Tensor, spool: Spool, *, keep_dense: bool, reversible: bool
    ) -> None:
        assert change.values is None  # what runs the model, to change weights, was refused
        self.change, self.spool = change, spool
        self.room = room.copy_(pack_bits(change.mask))
        weight, mask = change.target.weight, change.target.mask
        self.before = None if mask is None else mask.snapshot()
        self.reversible = reversible and (mask is None or mask.reversible)
        self.own = local_of(weight).clone()
        whole = whole_of(weight).detach()
        self.data, self.dense = torch.empty_like(whole, device="meta"), None  # but for its shape
        self.gone = pack_values(whole, self._places()) if self.reversible else None
        clear(whole, self.room)
        write(weight, whole)

    def undo_values(self, target: Target) -> None:
        """Put this process's own values back."""
        local_of(target.weight).copy_(self.own)


class Changes:
    """Changes to a model that all stay, or all go. Made by `all_or_nothing`."""

    def __init__(self, targets: Sequence[Target], spool: Spool, **options: bool) -> None:
        self._spool, self._options = spool, options
        self._rooms = _rooms(targets)
        self._edits: list[_Edit] = []
        self._settled = 0

    def stage(self, change: Change) -> None:
        """Make a layer act pruned from now on."""
        room = self._rooms[change.target.layer.key]
        kind = _ShardEdit if is_shard(change.target.weight) else _Edit
        self._edits.append(kind(change, room, self._spool, **self._options))

    def settle(self) -> None:
        """Attach the masks of what is staged: no batch is about to run through it."""
        with exact():  # whatever the caller's modes: masks are no inference tensors
            for edit in self._edits[self._settled :]:
                edit.settle()
        self._settled = len(self._edits)

    def finish(self) -> None:
        """Everything went well."""
        self.settle()
        with exact():
            for edit in self._edits:
                edit.finish()

    def undo(self) -> None:
        """Put every layer back as it was."""
        with exact():
            for edit in reversed(self._edits):
                edit.undo()


def _rooms(targets: Sequence[Target]) -> dict[str, Tensor]:
    """Where each layer's mask rests as bits: parts of one uint8 tensor a device."""
    shares: dict[torch.device, list[Target]] = {}
    for target in targets:
        shares.setdefault(target.weight.device, []).append(target)
    rooms: dict[str, Tensor] = {}
    for device, some in shares.items():
        sizes = [packed_size(target.weight.numel()) for target in some]
        with exact():  # whatever the caller's modes: no inference tensor
            shelf = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        rooms |= {t.layer.key: r for t, r in zip(some, shelf.split(sizes), strict=True)}
    return rooms


@contextmanager
def all_or_nothing(
    targets: Sequence[Target], *, keep_dense: bool, reversible: bool = True
) -> Iterator[Changes]:
    """Changes to these layers stay if the block ends well; after any error all are as they were.

    Args:
        keep_dense: keep the dense weight beside one that is changed.
        reversible: keep the values under zeros, where they are the dense ones.

    Raises:
        MaskError: weights go on learning under a mask. Nothing is changed then.
    """
    for target in targets:
        if target.mask is not None and target.mask.learns:
            raise MaskError(
                f"{target.name}: its weights go on learning under its mask (StraightThrough); "
                "torchprune.fold(model) or torchprune.densify(model), then prune it anew"
            )
    with Spool() as spool:
        changes = Changes(targets, spool, keep_dense=keep_dense, reversible=reversible)
        try:
            yield changes
            changes.finish()
        except BaseException:
            changes.undo()
            raise
