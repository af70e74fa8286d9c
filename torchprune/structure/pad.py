"""The opposite of cutting: widths that differ from layer to layer, all made as wide as the widest.

The units that are added are zero in every tensor, so nothing reads them and outputs stay the same.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.slots import slots_of
from torchprune.structure.groups import Group, Member, structure_of
from torchprune.structure.resize import restate


def pad_to_widest(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Widen groups, in place, to the widest of their kind in the other repeated blocks.

    Args:
        model: without masks; its parameters become new objects where they grow.

    Raises:
        ShrinkError: the model cannot be exported.
    """
    groups = structure_of(model, example_inputs).groups
    widest: dict[object, int] = {}
    for group in groups:
        widest[_role(group)] = max(widest.get(_role(group), 0), group.count)
    for group in groups:
        more = widest[_role(group)] - group.count
        for member in group.members if more else ():
            slots = slots_of(model)
            old = slots[member.key].tensor
            new = _padded(old, member, group.count, more)
            for slot in slots.values():
                if slot.tensor is old:  # tied ones stay one tensor
                    module: Any = slot.module
                    table = module._parameters if isinstance(old, nn.Parameter) else module._buffers
                    table[slot.name] = new
    for module in model.modules():
        restate(module)
    return model


def _role(group: Group) -> object:
    """What groups of different blocks have in common."""
    keys = (re.sub(r"(^|\.)\d+(?=\.)", r"\1*", member.key) for member in group.members)
    return group.kind, tuple(keys)


def _padded(tensor: Tensor, member: Member, count: int, more: int) -> Tensor:
    """Zeros after every run of the last unit's indices, as long as it times what is missing."""
    parts, start = [], 0
    last = (member.units == count - 1).tolist()
    for end in range(1, len(last) + 1):
        if last[end - 1] and (end == len(last) or not last[end]):
            begin = end
            while begin and last[begin - 1]:
                begin -= 1
            parts.append(tensor.detach().narrow(member.axis, start, end - start))
            shape = [*tensor.shape]
            shape[member.axis] = (end - begin) * more
            parts.append(torch.zeros(shape, dtype=tensor.dtype, device=tensor.device))
            start = end
    parts.append(tensor.detach().narrow(member.axis, start, len(last) - start))
    whole = torch.cat(parts, member.axis)
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
