"""Where a model's tensors live, by the names they have in the plain model's `state_dict`.

A masked weight answers to its plain name here, whatever parametrization stands before it, so a
masked model, a folded one and a fresh one of the same architecture have the same slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune.errors import CheckpointError
from torchprune.masking.mask import Mask, beside, mask_of, original_of

Kind = Literal["parameter", "buffer", "transient"]


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of a model.

    Attributes:
        key: its name in the plain model's `state_dict`.
        module, name: the module that holds it, and its name there.
        kind: "parameter", "buffer", or "transient" for a buffer outside the `state_dict`.
        tensor: the tensor itself; of a masked weight the parameter behind the mask.
        mask: the mask on it, or None.
    """

    key: str
    module: nn.Module
    name: str
    kind: Kind
    tensor: Tensor
    mask: Mask | None = None


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Every parameter and buffer of a model by plain name; shared modules under every name.

    Raises:
        CheckpointError: a weight has another parametrization beside its mask.
    """
    inside: set[int] = set()  # modules that implement a mask: not part of the plain model
    slots: dict[str, Slot] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in inside:
            continue
        for name in _masked_names(module, path):
            chain = cast(nn.ModuleDict, module.parametrizations)[name]
            inside.update(id(m) for m in chain.modules())
            key, weight = _join(path, name), original_of(module, name)
            slots[key] = Slot(key, module, name, "parameter", weight, mask_of(module, name))
        for name, kind, tensor in _own_tensors(module):
            slots[_join(path, name)] = Slot(_join(path, name), module, name, kind, tensor)
    return slots


def _masked_names(module: nn.Module, path: str) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    chains = cast(nn.ModuleDict, module.parametrizations)
    masked = [name for name in chains if mask_of(module, name) is not None]
    for name in masked:
        if why := beside(module, name):
            raise CheckpointError(f"{path or 'the model'}: {why}")
    return masked


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Kind, Tensor]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, "parameter", parameter
    for name, buffer in module._buffers.items():
        if buffer is not None:
            transient = name in module._non_persistent_buffers_set
            yield name, "transient" if transient else "buffer", buffer


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def obstacle(tensor: Tensor) -> str | None:
    """Why a tensor's values cannot be read and written as they are, or None."""
    if tensor.is_meta:
        return "is on the meta device"
    if type(tensor.data) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        return f"is a {type(tensor.data).__name__} of layout {tensor.layout}"
    return None


def ties_of(slots: dict[str, Slot]) -> dict[str, str]:
    """Every slot whose tensor an earlier slot already holds: its key -> the earlier one's key."""
    first: dict[object, str] = {}
    ties = {}
    for key, slot in slots.items():
        owner = first.setdefault(_identity(slot), key)
        if owner != key:
            ties[key] = owner
    return ties


def _identity(slot: Slot) -> object:
    """What two slots have in common if and only if they hold the same memory in the same way."""
    tensor = slot.tensor
    if obstacle(tensor) or tensor.numel() == 0:
        return slot.kind, id(tensor)
    place = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    return slot.kind, place
