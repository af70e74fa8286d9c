"""SparseGPT: one-shot pruning with optimal brain surgeon updates (arXiv 2301.00774).

The sweep goes over input columns from left to right. A block's mask is chosen when the sweep
reaches it, from weights that carry all updates so far; each pruned weight's error is spread over
the columns to its right by the upper Cholesky factor U of the inverse Hessian.

Weights are held transposed, (cols, rows), so that a column is one contiguous run; inside a block
the updates are left-looking (a column gathers what earlier ones owe it in one matrix-vector
product), so a column costs two operations and everything else is matrix products. Rows do not know
of each other but for the choice of masks, so all matrices that read the same inputs are swept as
one: what a column costs is mostly the calls, not the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from torchprune.errors import SpecError
from torchprune.masking.packing import masked
from torchprune.masking.projection import (
    BARRED,
    keep_largest,
    keep_largest_overall,
    keep_of_lanes,
    spread_tiles,
    tile_scores,
)
from torchprune.methods.block_counts import Budget, budget_of
from torchprune.methods.factor import Factor, factorise
from torchprune.methods.joint import nearest, onto_grid
from torchprune.methods.posed import retargeted
from torchprune.methods.wanda import wanda_score
from torchprune.modes import one_thread
from torchprune.specs.method import GroupMoments, Solution, Task
from torchprune.specs.options import check_above_zero, check_whole
from torchprune.specs.patterns import NM, Block, Pattern, Unstructured
from torchprune.specs.quantize import Grid, Int4, Int8, misfit_of
from torchprune.specs.spec import Sequential, Spec

_LEAF = 32
"""Columns that are swept one by one before their errors reach the rest by a matrix product."""


@dataclass(frozen=True, eq=False)
class Solved:
    """One pruned matrix.

    Attributes:
        weight: (rows, cols) float32 new weights W', zero off the mask.
        keep: (rows, cols) bool mask, True = kept.
        squared: tr(D H D^T), D = W - W', without the ridge. The sweep knows it for nothing:
            D = E U for its errors E, and U H U^T = 1, so it is ||E||^2.
    """

    weight: Tensor
    keep: Tensor
    squared: float


def sparsegpt(
    weights: Sequence[Tensor],
    factor: Factor,
    pattern: Pattern,
    sparsity: float | Fraction,
    scope: str = "layer",
    block_size: int = 128,
    barred: Sequence[Tensor | None] | None = None,
) -> list[Solved]:
    """Prune matrices that read the same inputs, and update what stays of each.

    Weights on inputs that are always zero go first, and count; those that stay keep their values.

    Args:
        weights: (rows, cols) each, any floating dtype and number of rows.
        factor: of the inputs' second moment.
        scope: "layer" pools the scores of all rows of a matrix in a block of columns, "row" gives
            every row the same count. Counts are exact over each matrix either way.
        block_size: columns whose mask is chosen together.
        barred: for each matrix (rows, cols) bool, weights that must be pruned, or None.
    """
    cols = weights[0].shape[1]
    heights = [len(weight) for weight in weights]
    upper = factor.upper
    dense = torch.cat([weight.detach().float() for weight in weights])
    unit = pattern.m if isinstance(pattern, NM) else getattr(pattern, "cols", 1)
    width = -(-block_size // unit) * unit
    stops = [min(start + width, cols) for start in range(0, cols, width)]
    budgets = [
        budget_of((rows, cols), factor.dead, bar, pattern, sparsity, scope, stops)
        for rows, bar in zip(heights, _bars(weights, barred), strict=True)
    ]
    goes = _across(budgets)
    w = dense.T.contiguous()
    w[factor.dead] = 0.0  # they have no part in the sweep
    squared = torch.zeros(len(dense), device=w.device)
    pruned = torch.empty_like(w, dtype=torch.bool)
    for number, stop in enumerate(stops):
        start = number * width
        panel, gone = w[start:stop], pruned[start:stop]
        goes_here = None if goes is None else goes[start:stop]
        block = upper[start:stop, start:stop]
        inverse = 1 / block.diagonal().unsqueeze(1)
        if not isinstance(pattern, NM):
            score = _score(panel, inverse, goes_here)
            at = 0
            for rows, budget in zip(heights, budgets, strict=True):
                own, count = score[:, at : at + rows], budget.counts[:, number]
                keep = _keep_of_block(own, pattern, scope, count)
                torch.logical_not(keep, out=gone[:, at : at + rows])
                at += rows
            if goes_here is not None:
                gone.logical_or_(goes_here)
        with one_thread():
            errors = _solve_block(panel, gone, block, inverse, pattern, goes_here)
        squared += errors.square().sum(0)
        if stop < cols:
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    w[factor.dead] = dense.T[factor.dead]
    keep = (~pruned).T.contiguous()
    new = masked(w.T.contiguous(), keep)
    squared -= factor.ridge * (dense - new).square_() @ (~factor.dead).float()
    return [
        Solved(value, mask, max(float(lost.sum()), 0.0))
        for value, mask, lost in zip(
            new.split(heights),
            keep.split(heights),
            squared.split(heights),
            strict=True,
        )
    ]


def _bars(
    weights: Sequence[Tensor], barred: Sequence[Tensor | None] | None
) -> Sequence[Tensor | None]:
    """(rows, cols) bool of each matrix: what must be pruned. Of all matrices, or of none."""
    if barred is None or all(bar is None for bar in barred):
        return [None] * len(weights)
    return [
        torch.zeros_like(weight, dtype=torch.bool) if bar is None else bar
        for weight, bar in zip(weights, barred, strict=True)
    ]


def _across(budgets: Sequence[Budget]) -> Tensor | None:
    """(cols, all rows) bool: what goes whatever the weights are, None if nothing."""
    goes = [budget.goes for budget in budgets if budget.goes is not None]
    return torch.cat(goes).T.contiguous() if goes else None


def _score(panel: Tensor, inverse: Tensor, goes: Tensor | None) -> Tensor:
    """w^2 / U_jj^2: what pruning a weight costs."""
    score = (panel * inverse).square_()
    return score if goes is None else score.masked_fill_(goes, BARRED)


def _solve_block(
    panel: Tensor,
    gone: Tensor,
    upper: Tensor,
    inverse: Tensor,
    pattern: Pattern,
    goes: Tensor | None,
) -> Tensor:
    """Sweep a block of columns (rows of `panel` here), updating `panel`.

    Args:
        gone: bool like `panel`, the weights to prune; filled here if the pattern is n:m.
        upper: the block of U on the diagonal.
        inverse: (columns, 1) 1 / U_jj.
        goes: bool like `panel`, what an n:m pattern must prune.

    Returns:
        the errors of the columns, like `panel`.
    """
    owed, errors = upper.T.contiguous(), torch.empty_like(panel)
    leaf = pattern.m if isinstance(pattern, NM) else _LEAF
    for at in range(0, len(panel), leaf):
        now = slice(at, at + leaf)
        columns, mine = panel[now], gone[now]
        if at:
            columns.addmm_(owed[now, :at], errors[:at], alpha=-1)
        if isinstance(pattern, NM):
            taken = None if goes is None else goes[now]
            score = _score(columns, inverse[now], taken)
            torch.logical_not(keep_of_lanes(score, pattern.n), out=mine)
            if taken is not None:
                mine |= taken
        _sweep(columns, errors[now], owed[now, now], torch.mul(mine, inverse[now]))
    return errors


def _sweep(panel: Tensor, errors: Tensor, owed: Tensor, share: Tensor) -> None:
    """Go over a panel's columns (its rows here) in order, filling `errors`, updating `panel`.

    A column's error is its current weight times its share: 1 / U_jj where pruned, 0 where kept.
    Later columns owe it U_j,later (in `owed`, transposed) times that.
    """
    across = errors.T
    for j, (column, error, mine, debt) in enumerate(
        zip(panel.unbind(), errors.unbind(), share.unbind(), owed.unbind(), strict=True)
    ):
        if j:
            column.addmv_(across[:, :j], debt[:j], alpha=-1)
        torch.mul(column, mine, out=error)


def _keep_of_block(
    score: Tensor, pattern: Unstructured | Block, scope: str, count: Tensor
) -> Tensor:
    """Mask (columns, rows) of a block of columns, chosen at once.

    Args:
        count: (1,) or (rows,) int64, how many weights or tiles to prune.
    """
    across = score.T
    if isinstance(pattern, Block):
        # A tile costs the sum of its weights' costs; tile_scores squares, so it is given roots.
        tiles = tile_scores(across.clamp_min(0).sqrt().masked_fill_(across < 0, BARRED), pattern)
    else:
        tiles = across
    if scope == "row":
        kept = keep_largest(tiles.contiguous(), count if len(count) > 1 else int(count))
    else:
        kept = keep_largest_overall([tiles], int(count))[0]
    return (spread_tiles(kept, pattern) if isinstance(pattern, Block) else kept).T


# -- the spec --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseGPTSpec(Spec):
    """Prune and update the surviving weights by OBS (Frantar & Alistarh, arXiv 2301.00774).

    Scope "layer" (default: scores pooled over all rows within each block of columns, as the
    reference) or "row" (the same count in every row).

    Args:
        damping: added to the Hessian's diagonal, as a share of the live inputs' mean. Raised
            tenfold, and reported, if the factorisation fails.
        block_size: input columns whose mask is chosen together; rounded up to whole groups of an
            n:m or block pattern.
        quantize: round what is kept to `Int8(...)` or `Int4(...)` (of `torchprune.training`) in one
            sweep with the pruning, so that later weights make up for both (section 4 of the paper;
            GPTQ, arXiv 2210.17323). Weights keep their dtype and hold values of the grid:
            `torchao.quantization.quantize_(model, Int4(...).torchao())` of the folded model finds
            the same codes. Layers whose rows the groups do not divide stay dense.
    """

    damping: float = 0.01
    block_size: int = 128
    quantize: Grid | None = None

    method: ClassVar[str] = "sparsegpt"
    scopes: ClassVar[tuple[str, ...]] = ("layer", "row")
    chooses_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("SparseGPTSpec", "damping", self.damping)
        check_whole("SparseGPTSpec", "block_size", self.block_size)
        _check_quantize(self)

    def usual_sequence(self) -> Sequential:
        # As measured by benchmarks/calibration/sequence.py: by block is some 2 % better at 2:4 and
        # no better unstructured, for 1.4 times the time.
        together = isinstance(self.pattern, NM) and not self.alpha and not self.reconstruct
        return "block" if together else "layer"

    def scores(self, weight: Tensor, moments: GroupMoments) -> Tensor:
        return wanda_score(weight, moments.square)

    def misfit(self, cols: int) -> str | None:
        return None if self.quantize is None else misfit_of(self.quantize, cols)

    def unseen(self, weight: Tensor, keep: Tensor) -> tuple[Tensor, str] | None:
        if self.quantize is None:
            return None
        return nearest(weight, keep, self.quantize), f"quantized to {self.quantize}"

    def solution(self, task: Task) -> list[Solution]:
        rows = task.moments.rows
        factor = task.once(
            "factor",
            lambda: factorise(task.moments.gram, rows, self.damping, task.moments.layer),
        )
        if factor.damping != self.damping:
            task.notes.append(f"damping raised to {factor.damping:g} to factorise")
        weights = retargeted(task, self.damping, self.alpha) if self.alpha else task.weights
        solved = sparsegpt(
            weights,
            factor,
            task.goal.pattern,
            task.goal.sparsity,
            self.scope or "layer",
            self.block_size,
            task.barred,
        )
        lost, new = [s.squared for s in solved], [s.weight for s in solved]
        if self.quantize is not None:
            task.notes.append(f"quantized to {self.quantize}")
            for dtype in {weight.dtype for weight in task.weights}:
                own = [i for i, weight in enumerate(task.weights) if weight.dtype == dtype]
                parts = ([weights[i] for i in own], [new[i] for i in own])
                keeps = [solved[i].keep for i in own]
                swept = onto_grid(*parts, keeps, factor, self.quantize, dtype)
                for i, one in zip(own, swept, strict=True):
                    new[i], lost[i] = one.weight, one.squared
        # It knows what it lost, against what it was given; H is 2/n times the second moment.
        return [
            Solution(weight, s.keep, None if self.alpha else squared * rows / 2)
            for weight, s, squared in zip(new, solved, lost, strict=True)
        ]


def _check_quantize(spec: SparseGPTSpec) -> None:
    if spec.quantize is None:
        return
    if not isinstance(spec.quantize, Int8 | Int4):
        raise SpecError(
            "SparseGPTSpec: quantize must be an Int8(...) or Int4(...) of torchprune.training, or "
            f"None, got {spec.quantize!r}"
        )
    for option in ("refine", "reconstruct"):
        if getattr(spec, option):
            raise SpecError(
                f"SparseGPTSpec: {option} changes weights after the sweep, and would take them off "
                f"the grid of quantize={spec.quantize!r}; leave one of them out, or train the "
                "pruned model with torchprune.training.quantized_aware"
            )
