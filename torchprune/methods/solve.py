"""From weights and the second moment of their inputs to new weights and masks.

Everything that takes the second moment meets here: SparseGPT, ADMM, the refit of any mask, and
better masks by exchanges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchprune.calibration.moments import Moments
from torchprune.masking.packing import masked
from torchprune.masking.projection import BARRED, project_partly
from torchprune.methods.admm import admm
from torchprune.methods.factor import Factor, factorise
from torchprune.methods.problem import Problem, problem_of
from torchprune.methods.refit import refit
from torchprune.methods.sparsegpt import Solved, sparsegpt
from torchprune.methods.swaps import swap
from torchprune.specs.goals import Goal
from torchprune.specs.methods import ADMMSpec, SparseGPTSpec, Spec
from torchprune.specs.options import PCG, Swaps
from torchprune.specs.patterns import Block


class Solver:
    """Solves layers that read the same inputs. Factors and problems are made once for all of them.

    Args:
        spec: the method.
        moments: the inputs' statistics, with the second moment.
        name: of a layer that reads them, for errors.
    """

    def __init__(self, spec: Spec, moments: Moments, name: str) -> None:
        self.spec, self.moments, self.name = spec, moments, name
        self._factors: dict[int, Factor] = {}
        self._problems: dict[tuple[int, float], Problem] = {}

    def solve(
        self,
        group: int,
        weights: Sequence[Tensor],
        goal: Goal,
        barred: Sequence[Tensor | None],
        keeps: Sequence[Tensor | None],
    ) -> list[Solved]:
        """New weights and masks of matrices that read one group of inputs.

        Args:
            group: which of the moments' groups.
            weights: (rows, cols) each.
            barred: for each, bool, weights that must be pruned, or None.
            keeps: for each, the mask if it is decided already.
        """
        match self.spec:
            case SparseGPTSpec():
                solved = self._sparsegpt(self.spec, group, weights, goal, barred)
            case ADMMSpec():
                solved = self._admm(self.spec, group, weights, goal, barred)
            case _:
                given = [keep for keep in keeps if keep is not None]
                if isinstance(self.spec.refine, Swaps):
                    given = self._swapped(self.spec.refine, group, weights, goal, barred, given)
                solved = [
                    Solved(masked(weight.float(), keep), keep, 0.0)
                    for weight, keep in zip(weights, given, strict=True)
                ]
        if isinstance(self.spec.refine, PCG):
            solved = self._refined(self.spec.refine, group, weights, solved)
        elif isinstance(self.spec, SparseGPTSpec) and not self.spec.alpha:
            return solved  # it knows what it lost
        return [
            Solved(s.weight, s.keep, self.lost(group, weight, s.weight))
            for weight, s in zip(weights, solved, strict=True)
        ]

    def lost(self, group: int, weight: Tensor, new: Tensor) -> float:
        """||X (W - W')^T||^2 over all calibration rows."""
        assert self.moments.gram is not None
        change = weight.float() - new
        return max(0.0, float((change @ self.moments.gram[group]).mul_(change).sum()))

    def damping(self, group: int) -> float | None:
        """The damping that SparseGPT's factor took, None where there is none."""
        return self._factors[group].damping if group in self._factors else None

    def _sparsegpt(
        self,
        spec: SparseGPTSpec,
        group: int,
        weights: Sequence[Tensor],
        goal: Goal,
        barred: Sequence[Tensor | None],
    ) -> list[Solved]:
        moments = self.moments
        assert moments.gram is not None
        if group not in self._factors:
            self._factors[group] = factorise(
                moments.gram[group], moments.rows[group], spec.damping, self.name
            )
        if spec.alpha:
            weights = self._retargeted(group, weights, spec.damping)
        factor, scope = self._factors[group], spec.scope or "layer"
        solved = sparsegpt(
            weights, factor, goal.pattern, goal.sparsity, scope, spec.block_size, barred
        )
        rows = moments.rows[group]  # H is 2/n times the second moment
        return [Solved(s.weight, s.keep, s.squared * rows / 2) for s in solved]

    def _retargeted(self, group: int, weights: Sequence[Tensor], ridge: float) -> list[Tensor]:
        """The dense weights that would best give what is to be reached, from the present inputs."""
        problem = self._problem(group, ridge)
        lower = torch.linalg.cholesky(problem.matrix)
        wanted = problem.wanted(torch.cat(list(weights)))
        best = torch.cholesky_solve(wanted.T, lower).T
        split = best.split([len(weight) for weight in weights])
        return [problem.unscaled(b, w) for b, w in zip(split, weights, strict=True)]

    def _admm(
        self,
        spec: ADMMSpec,
        group: int,
        weights: Sequence[Tensor],
        goal: Goal,
        barred: Sequence[Tensor | None],
    ) -> list[Solved]:
        problem = self._problem(group, spec.ridge)
        heights = [len(weight) for weight in weights]
        dense = torch.cat(list(weights))
        scope = spec.scope or "row"

        def project(score: Tensor, share: float) -> Tensor:
            masks = []
            for own, bar in zip(score.split(heights), barred, strict=True):
                free = own if bar is None else own.masked_fill(bar, BARRED)
                mask = project_partly(free, goal.pattern, goal.sparsity, scope, share)
                masks.append(mask if bar is None else mask & ~bar)
            return torch.cat(masks)

        scaled, wanted = problem.scaled(dense), problem.wanted(dense)
        sparse, keep = admm(scaled, wanted, problem, project, steps=spec.steps, ramp=spec.ramp)
        return self._split(problem, sparse, keep, weights)

    def _swapped(
        self,
        refine: Swaps,
        group: int,
        weights: Sequence[Tensor],
        goal: Goal,
        barred: Sequence[Tensor | None],
        keeps: Sequence[Tensor],
    ) -> list[Tensor]:
        assert not isinstance(goal.pattern, Block)
        problem = self._problem(group, ridge=0.0)
        matrix, pattern, rounds = problem.matrix, goal.pattern, refine.rounds
        swapped = []
        for weight, keep, bar in zip(weights, keeps, barred, strict=True):
            # What is pruned of dead inputs stays so: to restore it would gain nothing by itself.
            fixed = problem.dead.expand_as(keep) if bar is None else bar | problem.dead
            swapped.append(swap(problem.scaled(weight), matrix, keep, pattern, rounds, fixed))
        return swapped

    def _refined(
        self, refine: PCG, group: int, weights: Sequence[Tensor], solved: Sequence[Solved]
    ) -> list[Solved]:
        problem = self._problem(group, refine.ridge)
        linear = problem.wanted(torch.cat(list(weights)))
        start = problem.scaled(torch.cat([s.weight for s in solved]))
        keep = torch.cat([s.keep for s in solved])
        fitted = refit(linear, start, keep, problem, refine.steps)
        return self._split(problem, fitted, keep, weights)

    def _split(
        self, problem: Problem, scaled: Tensor, keep: Tensor, weights: Sequence[Tensor]
    ) -> list[Solved]:
        """Each matrix's own part, in the weights' units."""
        heights = [len(weight) for weight in weights]
        parts = zip(weights, scaled.split(heights), keep.split(heights), strict=True)
        return [Solved(masked(problem.unscaled(s, w), k), k, 0.0) for w, s, k in parts]

    def _problem(self, group: int, ridge: float) -> Problem:
        if (group, ridge) not in self._problems:
            gram, cross = self.moments.gram, self.moments.cross
            assert gram is not None
            self._problems[group, ridge] = problem_of(
                gram[group], ridge, None if cross is None else cross[group], self.spec.alpha
            )
        return self._problems[group, ridge]
