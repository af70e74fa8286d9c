"""Axes of tensors that become shorter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from torchprune.masking.plain_state import Slot
from torchprune.structure.constants import Fold, folded


@dataclass(frozen=True, eq=False)
class Cut:
    """One axis of one tensor that becomes shorter: `keep` holds the indices that stay."""

    key: str
    axis: int
    before: int
    keep: Tensor

    @property
    def after(self) -> int:
        return len(self.keep)


def cut(slots: Mapping[str, Slot], cuts: Sequence[Cut], folds: Sequence[Fold] = ()) -> None:
    """Replace every tensor that loses indices, its mask too; tied ones stay one tensor."""
    made: dict[int, Tensor] = {}
    masks: set[int] = set()
    todo: dict[int, list[Cut]] = {}
    for one in cuts:
        todo.setdefault(id(slots[one.key].tensor), []).append(one)
    gains: dict[int, list[Fold]] = {}
    for fold in folds:
        gains.setdefault(id(slots[fold.key].tensor), []).append(fold)
    for slot in slots.values():
        own, gained = todo.get(id(slot.tensor), []), gains.get(id(slot.tensor))
        if not own and not gained:
            continue
        if id(slot.tensor) not in made:
            whole = slot.tensor.detach()
            short = _shortened(folded(whole, gained) if gained else whole, own)
            if isinstance(slot.tensor, nn.Parameter):
                short = nn.Parameter(short, slot.tensor.requires_grad)
            made[id(slot.tensor)] = short
        _put(slot, made[id(slot.tensor)])
        if slot.mask is not None and id(slot.mask) not in masks:  # a module may have two names
            masks.add(id(slot.mask))
            slot.mask.resize(partial(_shortened, cuts=own), made[id(slot.tensor)])


def _shortened(tensor: Tensor, cuts: Sequence[Cut]) -> Tensor:
    for one in cuts:
        tensor = tensor.index_select(one.axis, one.keep.to(tensor.device))
    return tensor.contiguous()


def _put(slot: Slot, tensor: Tensor) -> None:
    module: Any = slot.module
    if slot.mask is not None:
        module.parametrizations[slot.name]._parameters["original"] = tensor
    elif isinstance(tensor, nn.Parameter):
        module._parameters[slot.name] = tensor
    else:
        module._buffers[slot.name] = tensor
