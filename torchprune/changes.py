"""Changing a model, all or nothing: every layer becomes pruned, or stays what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune.masking import Record, attach, detach, mask_of
from torchprune.plan import Target


@dataclass(eq=False)
class Change:
    """What one layer is to become: a mask, its record and, if the method changes them, values."""

    target: Target
    mask: Tensor
    record: Record
    values: Tensor | None = None


@dataclass(eq=False)
class _Before:
    """What a layer was: the parameter's data, and the mask's parts if it had one."""

    data: Tensor
    mask: Tensor | None
    record: Record | None
    reversible: bool
    dense: Tensor | None


class Changes:
    """Changes to a model that all stay, or all go.

    While batches run through a freshly pruned layer its parameter holds the folded values, since
    masking on every access would cost more than the product itself; `settle` then puts the mask in
    place as a parametrization.
    """

    def __init__(self, *, keep_dense: bool) -> None:
        self.keep_dense = keep_dense
        self._staged: list[Change] = []
        self._before: list[tuple[Target, _Before]] = []

    def stage(self, change: Change) -> None:
        """Make a layer act pruned from now on."""
        weight, mask = change.target.weight, change.target.mask
        before = (
            _Before(weight.data, None, None, True, None)
            if mask is None
            else _Before(weight.data, mask.mask.clone(), mask.record, mask.reversible, mask.dense)
        )
        self._before.append((change.target, before))
        values = weight.data if change.values is None else change.values
        weight.data = torch.where(change.mask, values, 0)
        self._staged.append(change)

    def settle(self) -> None:
        """Attach the masks of what is staged."""
        for change in self._staged:
            layer = change.target.layer
            before = next(b for t, b in reversed(self._before) if t is change.target)
            if change.values is None:
                change.target.weight.data = before.data
            dense = None
            if self.keep_dense and change.values is not None:
                if before.dense is None and before.reversible:
                    dense = before.data
                elif before.dense is not None:
                    dense = before.dense
            attach(layer.module, layer.tensor, change.mask, change.record, dense)
        self._staged.clear()

    def undo(self) -> None:
        """Put every layer back as it was."""
        for target, before in reversed(self._before):
            layer = target.layer
            target.weight.data = before.data
            mask = mask_of(layer.module, layer.tensor)
            if mask is None:
                continue
            if before.mask is None:
                detach(layer.module, layer.tensor)
            else:
                mask.mask.copy_(before.mask)
                assert before.record is not None
                mask.record, mask.reversible = before.record, before.reversible
                mask.dense = before.dense
        self._before.clear()
        self._staged.clear()


@contextmanager
def all_or_nothing(*, keep_dense: bool) -> Iterator[Changes]:
    changes = Changes(keep_dense=keep_dense)
    try:
        yield changes
        changes.settle()
    except BaseException:
        changes.undo()
        raise
