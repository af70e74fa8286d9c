"""Changing a model, all or nothing: every layer becomes pruned, or stays what it was.

Memory is what large models lack, so nothing is held twice while batches wait: masks rest as one bit
a weight until the end, and weights that a method overwrites rest in a temporary file. All those
bits have one tensor from the start: many that come one by one would settle between the
activations, and leave holes there that nothing fits in any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune.masking.mask import Record, attach, detach
from torchprune.masking.packing import masked, packed_size
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

    Changed values are written into the parameter's own memory, as an optimizer would. Where a mask
    is all that changes, the parameter holds the folded values only while batches run through the
    freshly pruned layer (masking on every access would cost more than the product itself), and
    `settle` then puts the original back under the mask.
    """

    def __init__(self, change: Change, room: Tensor, spool: Spool, *, keep_dense: bool) -> None:
        self.change, self.room, self.spool = change, room, spool
        weight, mask = change.target.weight, change.target.mask
        self.data, self.place, self.dense = weight.data, -1, None
        self.mask_before = None if mask is None else mask.snapshot()
        if change.values is None:
            weight.data = masked(self.data, change.mask)
            return
        if keep_dense and (mask is None or mask.reversible):
            self.dense = self.data.clone()
        new = masked(change.values, change.mask)
        if self.data.is_contiguous():
            self.place = spool.put(self.data)
            self.data.copy_(new)
        else:  # an expanded weight cannot be written in place; a transposed one keeps its layout
            weight.data = torch.empty_like(self.data).copy_(new)

    def settle(self) -> None:
        """The batches have passed: attach the mask."""
        layer, change = self.change.target.layer, self.change
        if change.values is None:
            change.target.weight.data = self.data
        attach(layer.module, layer.tensor, change.mask, change.record, self.dense)
        mask = change.target.mask
        assert mask is not None
        if self.mask_before is None:
            mask.compress(self.room)
        change.mask, change.values = mask.mask, None  # while bits are all that is held, empty

    def finish(self) -> None:
        """All layers are done: the mask becomes an ordinary buffer."""
        mask = self.change.target.mask
        assert mask is not None
        mask.expand(self.change.target.weight)

    def undo(self) -> None:
        """Make the layer what it was."""
        target = self.change.target
        target.weight.data = self.data
        if self.place >= 0:
            self.spool.fetch(self.place, self.data)
        if target.mask is None:
            return
        if self.mask_before is None:
            detach(target.layer.module, target.layer.tensor)
        else:
            target.mask.restore(self.mask_before)


class Changes:
    """Changes to a model that all stay, or all go. Made by `all_or_nothing`."""

    def __init__(self, targets: Sequence[Target], spool: Spool, *, keep_dense: bool) -> None:
        self._spool, self._keep_dense = spool, keep_dense
        self._rooms = _rooms(targets)
        self._edits: list[_Edit] = []
        self._settled = 0

    def stage(self, change: Change) -> None:
        """Make a layer act pruned from now on."""
        room = self._rooms[change.target.layer.key]
        self._edits.append(_Edit(change, room, self._spool, keep_dense=self._keep_dense))

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
def all_or_nothing(targets: Sequence[Target], *, keep_dense: bool) -> Iterator[Changes]:
    """Changes to these layers stay if the block ends well; after any error all are as they were."""
    with Spool() as spool:
        changes = Changes(targets, spool, keep_dense=keep_dense)
        try:
            yield changes
            changes.finish()
        except BaseException:
            changes.undo()
            raise
