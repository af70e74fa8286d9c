"""A masked product whose gradient passes the mask."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class _Passing(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        weight, mask, ctx.decay = inputs
        if ctx.decay:
            ctx.save_for_backward(weight, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.decay:
            weight, mask = ctx.saved_tensors
            gradient = gradient + ctx.decay * torch.where(mask, 0, weight)
        return gradient, None, None


def passing(weight: Tensor, mask: Tensor, decay: float = 0.0) -> Tensor:
    """`where(mask, weight, 0)`, of which pruned weights get the gradient as if they were kept.

    Args:
        decay: what is added to the gradient of each pruned weight, times the weight.
    """
    if torch.compiler.is_compiling():  # dynamo makes instances of functions, which warns
        return cast(Tensor, _passing(weight, mask, decay))
    apply: Any = _Passing.apply
    return cast(Tensor, apply(weight, mask, decay))


@torch.library.custom_op("torchprune::passing", mutates_args=())
def _passing(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    return torch.where(mask, weight, 0)


_passing.register_fake(lambda weight, mask, decay: torch.empty_like(weight))
_passing.register_autograd(_Passing.backward, setup_context=_Passing.setup_context)
