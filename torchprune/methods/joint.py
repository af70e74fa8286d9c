"""Pruned and quantized in one sweep: what is lost by both is made up for by what comes later.

The sweep of `sparsegpt`, with the mask known. It goes over the input columns from left to right,
rounds what is kept to its grid, and spreads the whole of a column's error over the columns to its
right: w - q(w) where the weight w is kept, and w where it is pruned (Frantar and Alistarh, Optimal
Brain Compression, arXiv 2208.11580, and SparseGPT, section 4; GPTQ, arXiv 2210.17323). Both share
the factor of the inverse Hessian.

A scale must be known before its group is swept, and what the sweep of the mask alone makes of the
weights tells it: they hold already what makes up for the pruned ones, which is far more than what
rounding moves. Pruned and held weights have the code 0 in the sweep, the latter less what they are
held at, so that all columns are treated alike, without a branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune.masking.packing import masked
from torchprune.methods.factor import Factor
from torchprune.methods.grid import ends_of, rounded, scaled
from torchprune.modes import one_thread
from torchprune.specs.quantize import Grid

_BLOCK, _LEAF = 128, 32
"""Columns whose errors reach the rest by one product; those swept one by one before that."""


@dataclass(frozen=True, eq=False)
class Swept:
    """One matrix on its grid.

    Attributes:
        weight: (rows, cols) float32 values of the grid, zero off the mask.
        squared: tr(D H D^T), D = W - W', without the ridge.
    """

    weight: Tensor
    squared: float


def onto_grid(
    weights: Sequence[Tensor],
    pruned: Sequence[Tensor],
    keeps: Sequence[Tensor],
    factor: Factor,
    grid: Grid,
    dtype: torch.dtype,
) -> list[Swept]:
    """Round what masks keep to a grid, in one sweep with the pruning.

    Weights on inputs that are always zero are rounded to the nearest value.

    Args:
        weights: (rows, cols) each, dense.
        pruned: (rows, cols) float32, for each what the sweep makes of it without rounding.
        keeps: (rows, cols) bool, the masks.
        factor: of the inputs' second moment.
        grid: whose groups divide the columns.
        dtype: of the weights that will hold the values; scales are numbers of it.
    """
    upper, cols, heights = factor.upper, weights[0].shape[1], [len(w) for w in weights]
    dense = torch.cat([weight.detach().float() for weight in weights])
    keep = torch.cat(list(keeps))
    before = torch.cat(list(pruned))
    prices = upper.diagonal().square().reciprocal_().masked_fill_(factor.dead, 0)
    chosen = scaled(before, prices, grid, dtype)
    width = grid.group or cols
    scale, held = chosen.scale.T.contiguous(), chosen.pinned.T.contiguous()
    # Pruned and held weights, and those of dead inputs, are not rounded: their steps are none.
    free = keep.T & (held == 0) & ~factor.dead.unsqueeze(1)
    inverse_scale = 1 / scale
    w = (dense.T - held).masked_fill_(factor.dead.unsqueeze(1), 0)
    squared = torch.zeros(len(dense), device=w.device)
    low, high = ends_of(grid)
    for start in range(0, cols, _BLOCK):
        stop = min(start + _BLOCK, cols)
        panel, block = w[start:stop], upper[start:stop, start:stop]
        inverse = 1 / block.diagonal()
        owed = block.T * inverse  # by each column's error before it is divided by U_jj
        errors, codes = torch.empty_like(panel), torch.empty_like(panel)
        group = torch.arange(start, stop, device=w.device) // width
        steps = (scale[group], inverse_scale[group] * free[start:stop])
        with one_thread():
            for at in range(0, len(panel), _LEAF):
                now = slice(at, at + _LEAF)
                if at:
                    panel[now].addmm_(owed[now, :at], errors[:at], alpha=-1)
                parts = (panel[now], errors[now], codes[now], steps[0][now], steps[1][now])
                _sweep(parts, owed[now, now], low, high)
        panel.copy_(codes.mul_(steps[0]))
        errors *= inverse.unsqueeze(1)
        squared += errors.square().sum(0)
        if stop < cols:
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    w += held
    idle = rounded(dense, chosen.scale, grid).T
    w = torch.where(factor.dead.unsqueeze(1), idle, w)
    new = masked((w.T + 0.0).contiguous(), keep)  # no -0.0
    squared -= factor.ridge * (dense - new).square_() @ (~factor.dead).float()
    return [
        Swept(value, max(float(lost.sum()), 0.0))
        for value, lost in zip(new.split(heights), squared.split(heights), strict=True)
    ]


def _sweep(parts: tuple[Tensor, ...], owed: Tensor, low: int, high: int) -> None:
    """Go over a panel's columns (its rows here) in order, filling their errors and codes.

    Args:
        parts: panel, errors, codes, scale, and 1 / scale where a weight is rounded, 0 elsewhere.
        owed: (columns, columns) what later columns owe the errors of earlier ones.
    """
    across = parts[1].T
    columns = zip(*(part.unbind() for part in parts), owed.unbind(), strict=True)
    for j, (column, error, code, step, inverse, debt) in enumerate(columns):
        if j:
            column.addmv_(across[:, :j], debt[:j], alpha=-1)
        torch.mul(column, inverse, out=code).round_().clamp_(low, high)
        torch.addcmul(column, code, step, value=-1, out=error)


def nearest(weight: Tensor, keep: Tensor, grid: Grid) -> Tensor:
    """Round what a mask keeps to the nearest values: (rows, cols) float32, zero off the mask.

    Args:
        weight: (rows, cols), in the dtype that will hold the values.
    """
    kept = masked(weight.detach().float(), keep)
    chosen = scaled(kept, torch.ones(weight.shape[1], device=weight.device), grid, weight.dtype)
    near = rounded(kept, chosen.scale, grid)
    return masked(torch.where(chosen.pinned != 0, chosen.pinned, near), keep)
