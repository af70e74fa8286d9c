"""KL(teacher || model) of rows of logits, in pieces that fit a processor's cache.

The gradient has a closed form, softmax(s) - softmax(t), so it is formed where the value is: a
language model's logits are large, and are read once instead of a dozen times.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CELLS = 1 << 21
"""Logits of a piece: eight megabytes in float32."""


def divergence(
    student: Tensor, teacher: Tensor, counts: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """The mean over rows of KL(softmax(teacher / T) || softmax(student / T)) * T^2: float32, ().

    Args:
        student, teacher: logits (..., classes), of any float dtype; computed in float32 at least.
            Only the student's get a gradient, and no second one.
        counts: (...) bool, which rows count; None: all. Where none does, it is 0.
    """
    own = student.flatten(0, -2)
    if counts is None:
        shares = torch.full((len(own),), 1 / max(1, len(own)), device=own.device)
    else:
        flat = counts.flatten().float()
        shares = flat / flat.sum().clamp_min(1)
    wanted = teacher.detach().flatten(0, -2)
    return cast(Tensor, _Divergence.apply(own, wanted, shares, float(temperature)))  # type: ignore[no-untyped-call]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, shares: Tensor, temperature: float
    ) -> Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        step = max(1, _CELLS // student.shape[-1])
        for at in range(0, len(student), step):
            here = slice(at, at + step)
            value, slope = _piece(student[here], teacher[here], shares[here], temperature)
            total += value
            if gradient is not None:
                gradient[here] = slope
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * by.to(gradient.dtype), None, None, None


def _piece(
    student: Tensor, teacher: Tensor, shares: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The sum over some rows, and its gradient by the student's logits."""
    dtype = torch.promote_types(torch.float32, student.dtype)
    wanted = torch.log_softmax(teacher.to(dtype).div(temperature), -1)
    own = torch.log_softmax(student.to(dtype).div(temperature), -1)
    likely = wanted.exp()
    apart = wanted.sub_(own).masked_fill_(likely == 0, 0)  # what a teacher rules out costs nothing
    found = (likely * apart).sum(-1) * shares
    gradient = own.exp_().sub_(likely).mul_(shares.to(dtype)[:, None] * temperature)
    gradient.masked_fill_(shares[:, None] == 0, 0)  # padding may hold anything
    return torch.where(shares == 0, 0, found).sum() * temperature**2, gradient
