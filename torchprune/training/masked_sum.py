"""A weight and a product of low rank, summed under a mask: W + s * M (.) (B A).

The laws: pruned places are exactly +0.0; the sum is taken in float32 at least and rounded once to
the weight's dtype; where B is zero the weight comes back bit for bit (a kept -0.0 as +0.0).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from torchprune.masking.matrices import View
from torchprune.masking.packing import clear
from torchprune.masking.parametrization import Mask, is_watched


def masked_sum(weight: Tensor, up: Tensor, down: Tensor, scale: float, to: Sum) -> Tensor:
    """`weight + scale * mask * (up @ down)`, in the weight's shape, dtype and memory format.

    Gradients flow to all three, the weight's with zeros where the mask prunes.

    Args:
        weight: with its zeros, as a `Mask` gives it.
        up: B, (groups, rows, rank); of one group also (rows, rank).
        down: A, (groups, rank, cols); of one group also (rank, cols).
        to: how the weight reads as matrices, and its mask.
    """
    with _exact(weight):
        if is_watched():
            return to.traced(weight, up, down, scale)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, up, down)):
            kept_factors: Any = _Sum
            return cast(Tensor, kept_factors.apply(weight, up, down, scale, to))
        return to.of(weight, up, down, scale)


def _exact(weight: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, whose products are rounded."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What weights of a dtype are summed in."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Sum:
    """Where a product is added: the weight's view as matrices, and its mask, if it has one."""

    view: View
    mask: Mask | None

    def of(self, weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
        """The sum, where nothing watches."""
        with torch.no_grad():
            summed = self._summed(weight.detach(), up.detach(), down.detach(), scale)
            if self.mask is not None:
                clear(summed, self.mask.bits)
            return summed

    def traced(self, weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
        """The sum, in operations that every tracer, transform and compiler knows."""
        summed = self._summed(weight, up, down, scale)
        return summed if self.mask is None else torch.where(self.mask.whole(weight), summed, 0)

    def _summed(self, weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
        dtype = wide(weight.dtype)
        up, down, rows = up.to(dtype), down.to(dtype), self.view.to_matrix(weight).to(dtype)
        if len(rows) == 1:
            up, down = up.reshape(up.shape[-2:]), down.reshape(down.shape[-2:])
            summed = torch.addmm(rows[0], up, down, alpha=scale).unsqueeze(0)
        else:
            summed = torch.baddbmm(rows, up, down, alpha=scale)
        whole = self.view.from_matrix(summed.to(weight.dtype), weight.shape)
        if whole.stride() == weight.stride():
            return whole
        return torch.empty_like(weight).copy_(whole)

    def gradients(
        self, gradient: Tensor, up: Tensor, down: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the weight, up and down, from the sum's."""
        if self.mask is not None:
            gradient = self.mask.of_gradient(gradient)
        dtype = wide(gradient.dtype)
        matrix = self.view.to_matrix(gradient).to(dtype)
        b, a = up.to(dtype), down.to(dtype)
        if len(matrix) == 1:
            matrix, b, a = matrix[0], b.reshape(b.shape[-2:]), a.reshape(a.shape[-2:])
        of_up = (matrix @ a.mT * scale).reshape(up.shape).to(up.dtype)
        of_down = (b.mT @ matrix * scale).reshape(down.shape).to(down.dtype)
        return gradient, of_up, of_down


class _Sum(torch.autograd.Function):
    """Keeps the factors for the backward pass, and nothing of the weight's size."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, up: Tensor, down: Tensor, scale: float, to: Sum
    ) -> Tensor:
        ctx.save_for_backward(up, down)
        ctx.scale, ctx.to = scale, to
        return to.of(weight, up, down, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        up, down = ctx.saved_tensors
        with _exact(gradient):
            found = ctx.to.gradients(gradient, up, down, ctx.scale)
        wanted = zip(found, ctx.needs_input_grad, strict=False)
        return (*(g if needed else None for g, needed in wanted), None, None)
