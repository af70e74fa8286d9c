"""Pruning by ADMM with a growing sparsity (Boza, arXiv 2401.02938; also ALPS, arXiv 2406.07831).

Two copies of the weights are drawn together: one solves the layer's quadratic problem, with one
factorisation for all steps, the other obeys the pattern. Only the projection knows the pattern.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchprune.errors import SpecError
from torchprune.masking.projection import BARRED, project_partly
from torchprune.methods.posed import apart, posed
from torchprune.methods.problem import Problem
from torchprune.methods.wanda import wanda_score
from torchprune.specs.method import GroupMoments, Solution, Task
from torchprune.specs.options import PCG, check_above_zero, check_whole
from torchprune.specs.spec import Spec


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


# -- the spec --------------------------------------------------------------------------------------


_LONG = PCG(15)


@dataclass(frozen=True)
class ADMMSpec(Spec):
    """Prune and update by ADMM, then refit (Boza, arXiv 2401.02938; ALPS, arXiv 2406.07831).

    Better than SparseGPT at the same sparsity, for about twice its time. Works for every pattern.
    Scope "row" (default) or "layer".

    Args:
        refine: by default "pcg" with 15 steps; None leaves the weights ADMM ends with.
        steps: rounds.
        ramp: rounds in which the sparsity grows, with the cube of the round.
        ridge: as for `PCG`.
    """

    refine: str | PCG | None = _LONG
    steps: int = 20
    ramp: int = 15
    ridge: float = 0.1

    method: ClassVar[str] = "admm"
    scopes: ClassVar[tuple[str, ...]] = ("row", "layer")
    chooses_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("ADMMSpec", "steps", self.steps)
        check_whole("ADMMSpec", "ramp", self.ramp)
        check_above_zero("ADMMSpec", "ridge", self.ridge)
        if self.ramp > self.steps:
            raise SpecError(f"ADMMSpec: ramp {self.ramp} is longer than its {self.steps} steps")

    def scores(self, weight: Tensor, moments: GroupMoments) -> Tensor:
        return wanda_score(weight, moments.square)

    def solution(self, task: Task) -> list[Solution]:
        goal, scope = task.goal, self.scope or "row"
        problem = posed(task, self.ridge, self.alpha)
        heights = [len(weight) for weight in task.weights]
        dense = torch.cat(list(task.weights))
        scaled, wanted = problem.scaled(dense), problem.wanted(dense)

        def project(score: Tensor, share: float) -> Tensor:
            masks = []
            for own, bar in zip(score.split(heights), task.barred, strict=True):
                free = own if bar is None else own.masked_fill(bar, BARRED)
                mask = project_partly(free, goal.pattern, goal.sparsity, scope, share)
                masks.append(mask if bar is None else mask & ~bar)
            return torch.cat(masks)

        sparse, keep = admm(scaled, wanted, problem, project, steps=self.steps, ramp=self.ramp)
        return apart(problem, sparse, keep, task.weights)
