"""What differentiates and batches the operators: gradients of a packed product in its input and its
bias, forward and backward, any number of times, and under `torch.func`.

The packed weight has no gradient, and a transform that gives each item its own is refused.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from torchprune.lowering.kernels.operators import LIBRARY

_WEIGHT = slice(1, 5)
"""Of the arguments of `bitmask_linear`: bits, values, starts and scales."""


class _Product(_SingleLevelFunction):
    """x W^T + bias, of the arguments of `bitmask_linear`, at one level of transforms: torch comes
    to it as to its own operators' gradients, once for each level."""

    @staticmethod
    def forward(*given: Any) -> Tensor:
        # Off while torch is here; a transform around this one still wants them.
        with torch.enable_grad(), _set_fwd_grad_enabled(True):
            return _below(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[_WEIGHT])
        ctx.save_for_forward(*inputs[_WEIGHT])
        ctx.cols = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ _dense(ctx).to(grad.dtype)
        if ctx.needs_input_grad[5]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return to_x, None, None, None, None, to_bias, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, bias = tangents[0], tangents[5]
        moved = None if x is None else x @ _dense(ctx).to(x.dtype).T
        if moved is None or bias is None:
            return cast(Tensor, bias if moved is None else moved)
        return cast(Tensor, moved + bias.to(moved.dtype))


def _dense(ctx: Any) -> Tensor:
    bits, values, starts, scales = ctx.saved_tensors
    weight: Tensor = torch.ops.torchprune.bitmask_unpack(bits, values, starts, ctx.cols)
    return weight if scales is None else weight.float() * scales[:, None]


def _batched(info: Any, dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
    """Under `vmap`: items are more rows of input, and biases are added after."""
    x, bias, (of_x, *of_weight, of_bias, _) = given[0], given[5], dims
    if any(dim is not None for dim in of_weight):
        raise RuntimeError(
            "torchprune: vmap was to give each item a packed weight of its own, which no product "
            "with packed weights does; map over the input, or call torchprune.lift(model) first"
        )
    x = x.unsqueeze(0) if of_x is None else x.movedim(of_x, 0)
    own = None if of_bias is None else bias.movedim(of_bias, 0)
    out = torch.ops.torchprune.bitmask_linear(
        x, *given[_WEIGHT], bias if own is None else None, given[-1]
    )
    if own is None:
        return out, 0
    return out + own.view(len(own), *(1,) * (out.dim() - 2), -1).to(out.dtype), 0


def is_followed(x: Tensor) -> bool:
    """Whether a product with this input is differentiated, transformed or traced."""
    return (
        (x.requires_grad and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or _goes_forward()
    )


def _goes_forward() -> bool:
    """Whether tangents may come along; not within a function that sees to them itself."""
    return torch.autograd.forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def _differentiable(*given: Any) -> Tensor:
    x, bias = given[0], given[5]
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    if (wanted and torch.is_grad_enabled()) or _goes_forward():
        with enable_single_level_autograd_function():
            return cast(Tensor, cast(Any, _Product).apply(*given))
    return _below(*given)


def _below(*given: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, torch.ops.torchprune.bitmask_linear(*given))


def register() -> None:
    """Tell torch, once."""
    if not _registered:
        _registered.append(True)
        LIBRARY.impl("bitmask_linear", _differentiable, "Autograd")
        torch.library.register_vmap("torchprune::bitmask_linear", _batched, lib=LIBRARY)


_registered: list[bool] = []
