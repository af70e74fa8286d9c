"""The least-squares refit of the weights a mask keeps, by conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from torchprune.methods.problem import Problem


def refit(linear: Tensor, start: Tensor, keep: Tensor, problem: Problem, steps: int) -> Tensor:
    """Move the kept weights toward the least layer error, all rows at once.

    Conjugate gradients on each row's own support, from `start`. With every input scaled to unit
    length the usual preconditioner, the diagonal, is a constant. Each step lowers the problem's
    value (layer error plus ridge); from a mask of the dense weights it never raises the layer
    error alone either, since those are where the ridge pulls to.

    Args:
        linear: (rows, cols) float32 B, `problem.wanted` of the dense weights.
        start: (rows, cols) float32 scaled weights, zero off the mask.
        keep: (rows, cols) bool.
        steps: at most so many products with the matrix; ten come close to the exact solution.

    Returns:
        (rows, cols) float32 scaled weights, zero off the mask.
    """
    weight, support = start.clone(), keep.to(start.dtype)  # once: a product with bools copies them
    residual = (linear - weight @ problem.matrix).mul_(support)
    direction = residual.clone()
    length = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = direction @ problem.matrix
        bend = (direction * image).sum(1, keepdim=True)
        step = torch.where(bend > 0, length / bend, 0)
        weight.addcmul_(direction, step)
        residual.sub_(image.mul_(step).mul_(support))
        longer = residual.square().sum(1, keepdim=True)
        direction.mul_(torch.where(length > 0, longer / length, 0)).add_(residual)
        length = longer
    return weight
