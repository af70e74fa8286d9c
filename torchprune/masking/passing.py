"""A masked product whose gradient passes the mask."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class _Passing(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is needed later."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def passing(weight: Tensor, mask: Tensor) -> Tensor:
    """`where(mask, weight, 0)`, of which pruned weights get the gradient as if they were kept."""
    if torch.compiler.is_compiling():  # dynamo makes instances of functions, which warns
        return cast(Tensor, _passing(weight, mask))
    apply: Any = _Passing.apply
    return cast(Tensor, apply(weight, mask))


@torch.library.custom_op("torchprune::passing", mutates_args=())
def _passing(weight: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, weight, 0)


_passing.register_fake(lambda weight, mask: torch.empty_like(weight))
_passing.register_autograd(_Passing.backward, setup_context=_Passing.setup_context)
