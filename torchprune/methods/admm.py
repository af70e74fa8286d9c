"""Pruning by ADMM with a growing sparsity (Boza, arXiv 2401.02938; also ALPS, arXiv 2406.07831).

Two copies of the weights are drawn together: one solves the layer's quadratic problem, with one
factorisation for all steps, the other obeys the pattern. Only the projection knows the pattern.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchprune.methods.problem import Problem


def admm(
    dense: Tensor,
    linear: Tensor,
    problem: Problem,
    project: Callable[[Tensor, float], Tensor],
    *,
    steps: int,
    ramp: int,
    penalty: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mask and weights of low layer error, for all rows that read the same inputs.

    Args:
        dense: (rows, cols) float32 scaled weights W0.
        linear: (rows, cols) float32, `problem.wanted` of the dense weights.
        project: the mask (rows, cols) of a score (rows, cols), at a share in (0, 1] of the asked
            sparsity.
        steps: rounds; in the first `ramp` the share grows with the cube of the round.
        penalty: weight of the distance between the copies; the problem's diagonal is about 1.

    Returns:
        (rows, cols) float32 scaled weights, zero off the mask; the mask.
    """
    ridged = problem.matrix.clone()
    ridged.diagonal().add_(penalty)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged))
    goal = linear @ inverse
    free, owed = dense.clone(), torch.zeros_like(dense)
    keep = torch.ones_like(dense, dtype=torch.bool)
    sparse = free
    for step in range(1, steps + 1):
        owed += free
        keep = project(owed.abs(), min(1.0, step / ramp) ** 3)
        sparse = owed.where(keep, 0)
        owed -= sparse
        free = torch.addmm(goal, sparse - owed, inverse, alpha=penalty)
    return sparse, keep
