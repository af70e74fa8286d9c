"""From weights and the second moment of their inputs to new weights and masks.

Everything that takes the second moment meets here: methods that choose weights, the refit of any
mask, and better masks by exchanges.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchprune.calibration.moments import Moments
from torchprune.masking.packing import masked
from torchprune.methods.posed import apart, posed
from torchprune.methods.refit import refit
from torchprune.methods.swaps import swap
from torchprune.specs.goals import Goal
from torchprune.specs.method import Solution, Task
from torchprune.specs.options import PCG, Swaps
from torchprune.specs.patterns import Block
from torchprune.specs.spec import Spec


class Solver:
    """Solves layers that read the same inputs. Factors and problems are made once for all of them.

    Args:
        spec: the method.
        moments: the inputs' statistics, with the second moment.
        name: of a layer that reads them, for errors.
    """

    def __init__(self, spec: Spec, moments: Moments, name: str) -> None:
        self.spec, self.moments, self.name = spec, moments, name
        self.notes: list[str] = []
        """What the report should say of the layers that were solved last."""
        self._shared: dict[int, dict[Hashable, object]] = {}

    def solve(
        self,
        group: int,
        weights: Sequence[Tensor],
        goal: Goal,
        barred: Sequence[Tensor | None],
        keeps: Sequence[Tensor | None],
        names: Sequence[str] = (),
    ) -> list[Solution]:
        """New weights and masks of matrices that read one group of inputs.

        Args:
            group: which of the moments' groups.
            weights: (rows, cols) each.
            barred: for each, bool, weights that must be pruned, or None.
            keeps: for each, the mask if it is decided already.
            names: for each, its layer's, for errors.
        """
        task = Task(
            weights,
            names or [self.name] * len(weights),
            barred,
            goal,
            self.moments.of(group, self.name),
            self._shared.setdefault(group, {}),
        )
        if self.spec.chooses_weights:
            solved = self.spec.solution(task)
        else:
            given = [keep for keep in keeps if keep is not None]
            if isinstance(self.spec.refine, Swaps):
                given = self._swapped(self.spec.refine, task, given)
            solved = [
                Solution(masked(weight.float(), keep), keep)
                for weight, keep in zip(weights, given, strict=True)
            ]
        if isinstance(self.spec.refine, PCG):
            solved = self._refined(self.spec.refine, task, solved)
        self.notes = task.notes
        return [
            s if s.squared is not None else replace(s, squared=self.lost(group, weight, s.weight))
            for weight, s in zip(weights, solved, strict=True)
        ]

    def lost(self, group: int, weight: Tensor, new: Tensor) -> float:
        """||X (W - W')^T||^2 over all calibration rows."""
        assert self.moments.gram is not None
        change = weight.float() - new
        return max(0.0, float((change @ self.moments.gram[group]).mul_(change).sum()))

    def _swapped(self, refine: Swaps, task: Task, keeps: Sequence[Tensor]) -> list[Tensor]:
        pattern = task.goal.pattern
        assert not isinstance(pattern, Block)
        problem = posed(task, ridge=0.0, alpha=self.spec.alpha)
        swapped = []
        for weight, keep, bar in zip(task.weights, keeps, task.barred, strict=True):
            # What is pruned of dead inputs stays so: to restore it would gain nothing by itself.
            fixed = problem.dead.expand_as(keep) if bar is None else bar | problem.dead
            scaled = problem.scaled(weight)
            swapped.append(swap(scaled, problem.matrix, keep, pattern, refine.rounds, fixed))
        return swapped

    def _refined(self, refine: PCG, task: Task, solved: Sequence[Solution]) -> list[Solution]:
        problem = posed(task, refine.ridge, self.spec.alpha)
        linear = problem.wanted(torch.cat(list(task.weights)))
        start = problem.scaled(torch.cat([s.weight for s in solved]))
        keep = torch.cat([s.keep for s in solved])
        fitted = refit(linear, start, keep, problem, refine.steps)
        return apart(problem, fitted, keep, task.weights)
