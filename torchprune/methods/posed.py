"""A task's quadratic problem, posed once for all layers that read the same inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchprune.masking.packing import masked
from torchprune.methods.problem import Problem, problem_of
from torchprune.specs.method import Solution, Task


def posed(task: Task, ridge: float, alpha: float) -> Problem:
    """The problem of the task's inputs; see `problem_of`."""
    moments = task.moments

    def make() -> Problem:
        return problem_of(moments.gram, ridge, moments.cross if alpha else None, alpha)

    return task.once(("problem", ridge, alpha), make)


def retargeted(task: Task, ridge: float, alpha: float) -> list[Tensor]:
    """The dense weights that would best give what is to be reached, from the present inputs."""
    problem = posed(task, ridge, alpha)
    lower = torch.linalg.cholesky(problem.matrix)
    wanted = problem.wanted(torch.cat(list(task.weights)))
    best = torch.cholesky_solve(wanted.T, lower).T
    split = best.split([len(weight) for weight in task.weights])
    return [problem.unscaled(b, w) for b, w in zip(split, task.weights, strict=True)]


def apart(
    problem: Problem, scaled: Tensor, keep: Tensor, weights: Sequence[Tensor]
) -> list[Solution]:
    """Each matrix's own part of what was solved for all rows together, in the weights' units."""
    heights = [len(weight) for weight in weights]
    parts = zip(weights, scaled.split(heights), keep.split(heights), strict=True)
    return [Solution(masked(problem.unscaled(s, w), k), k) for w, s, k in parts]
