"""Decisions that several processes take together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether this process trains with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def first_decides(tensor: Tensor) -> bool:
    """Give a tensor the first process's values, in place; whether it had others."""
    if not several():
        return False
    told: Any = tensor.detach().clone()
    dist.broadcast(told, src=0)
    if torch.equal(told, tensor):
        return False
    tensor.copy_(told)
    return True


def summed(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """The sum of what all processes have, float32 and of a tensor's shape; None where none has
    any."""
    if not several():
        return tensor
    own = torch.zeros(like.shape, device=like.device) if tensor is None else tensor
    some = torch.tensor(float(tensor is not None), device=like.device)
    dist.all_reduce(own)
    dist.all_reduce(some)
    return own if bool(some) else None
