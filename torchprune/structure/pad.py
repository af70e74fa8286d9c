"""The opposite of cutting: widths that differ from layer to layer, all made as wide as the widest.

The units that are added are zero in every tensor, so nothing reads them and outputs stay the same.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torchprune.graph.groups import Group, Member, structure_of
from torchprune.masking.plain_state import Slot, slots_of
from torchprune.structure.resize import restate


def pad_to_widest(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Widen tensors, in place, to the widest of their kind in the other repeated blocks.

    Args:
        model: without masks; its parameters become new objects where they grow.

    Raises:
        ShrinkError: the model cannot be exported.
    """
    widest: dict[object, Group] = {}
    for group in structure_of(model, example_inputs).groups:
        role = group.kind, tuple(_role(member.key) for member in group.members)
        if role not in widest or widest[role].count < group.count:
            widest[role] = group
    groups: dict[int, int] = {}
    for group in widest.values():
        for member in group.members:
            for key, slot in slots_of(model).items():
                if _role(key) == _role(member.key):
                    _widen(model, slot, member, groups)
    for module in model.modules():
        restate(module, groups.get(id(module)))
    return model


def _role(key: str) -> str:
    """A tensor's name less the numbers of blocks."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", key)


def _widen(model: nn.Module, slot: Slot, like: Member, groups: dict[int, int]) -> None:
    """Lay a tensor out as the wider one is that `like` belongs to, its own units first.

    Args:
        groups: gains those of a convolution, by its id.
    """
    old = slot.tensor
    places = _places(like.units, old.shape[like.axis])
    if places is None:
        return
    if isinstance(slot.module, _ConvNd):
        wider: Any = slots_of(model)[like.key].module
        groups[id(slot.module)] = wider.groups
    shape = [*old.shape]
    shape[like.axis] = len(like.units)
    wide = torch.zeros(shape, dtype=old.dtype, device=old.device)
    wide.index_copy_(like.axis, places.to(old.device), old.detach())
    new: Any = nn.Parameter(wide, old.requires_grad) if isinstance(old, nn.Parameter) else wide
    for other in slots_of(model).values():
        if other.tensor is old:  # tied ones stay one tensor
            module: Any = other.module
            table = module._parameters if isinstance(old, nn.Parameter) else module._buffers
            table[other.name] = new


def _places(units: Tensor, size: int) -> Tensor | None:
    """Where so many indices of the first units lie; None if they are no whole units, or all."""
    for count in range(int(units.max()) + 1):
        places = (units < count).nonzero().flatten()  # those of no unit, -1, are there too
        if len(places) == size:
            return places
    return None
