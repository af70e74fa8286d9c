"""SparseGPT: one-shot pruning with optimal brain surgeon updates (arXiv 2301.00774).

The sweep goes over input columns from left to right. A block's mask is chosen when the sweep
reaches it, from weights that carry all updates so far; each pruned weight's error is spread over
the columns to its right by the upper Cholesky factor U of the inverse Hessian.

Weights are held transposed, (cols, rows), so that a column is one contiguous run; inside a block
the updates are left-looking (a column gathers what earlier ones owe it in one matrix-vector
product), so a column costs two operations and everything else is matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from torchprune.errors import CalibrationError
from torchprune.patterns import NM, Block, Pattern, Unstructured, prune_count
from torchprune.projection import (
    BARRED,
    keep_largest,
    keep_largest_overall,
    keep_of_lanes,
    spread_tiles,
    tile_scores,
)

_INVERT_DIRECTLY = 192
_LEAF = 32
"""Columns that are swept one by one before their errors reach the rest by a matrix product."""


@dataclass(frozen=True, eq=False)
class Factor:
    """The factorised inverse Hessian of one set of inputs, shared by all layers reading them.

    Attributes:
        upper: (cols, cols) float32 U, with U^T U = (H + damping)^-1.
        dead: (cols,) bool, inputs that were always zero.
        damping: the damping that succeeded, as a share of the mean diagonal.
        ridge: what was added to the diagonal of H = 2/n sum of x x^T.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    ridge: float


def factorise(gram: Tensor, rows: int, damping: float, name: str) -> Factor:
    """U from the second moment. Escalates the damping tenfold, up to 1, if H is not positive.

    H^-1 = U^T U with U upper triangular is the inverse of the factor V in H = V V^T, V upper,
    which is an ordinary Cholesky factor with the order of columns reversed both ways. It is
    computed in float64: against the accumulation of the gram its cost is small, and it saves most
    of the cases that single precision would need more damping for.

    Args:
        gram: (cols, cols) float32 sum of x x^T.
        rows: number of x summed.
        damping: share of the mean diagonal added to it.

    Raises:
        CalibrationError: naming the layer, if no damping up to 1 helps.
    """
    device = gram.device
    if device.type == "mps":  # has no float64
        gram = gram.cpu()
    hessian = gram.double().mul_(2.0 / max(rows, 1))
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    mean = diagonal.mean()
    share = damping
    while True:
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(lower.diagonal().isfinite().all()):
            break
        if share >= 1.0:
            raise CalibrationError(
                f"{name}: the second moment of its inputs could not be factorised even with "
                f"damping {share:g}; check the calibration data, or give the layer another method"
            )
        share = min(share * 10, 1.0)
    del hessian, damped, diagonal  # large, and the inverse needs room
    # flip(V) = lower, so U = V^-1 = flip(lower^-1)
    inverse = _invert_lower(lower).flip(0, 1)
    return Factor(inverse.float().to(device), dead.to(device), share, float(share * mean))


def _invert_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves, so that products do the work."""
    size = len(lower)
    if size <= _INVERT_DIRECTLY:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return inverse
    half = size // 2
    first, last = _invert_lower(lower[:half, :half]), _invert_lower(lower[half:, half:])
    out = torch.zeros_like(lower)
    out[:half, :half] = first
    out[half:, half:] = last
    out[half:, :half] = -(last @ (lower[half:, :half] @ first))
    return out


def sparsegpt(
    weight: Tensor,
    factor: Factor,
    pattern: Pattern,
    sparsity: float | Fraction,
    scope: str = "layer",
    block_size: int = 128,
    barred: Tensor | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Prune one matrix and update what stays.

    Args:
        weight: (rows, cols), any floating dtype.
        factor: of the inputs' second moment.
        scope: "layer" pools the scores of all rows in a block of columns, "row" gives every row
            the same count. Counts are exact over the whole matrix either way.
        block_size: columns whose mask is chosen together.
        barred: (rows, cols) bool, weights that must be pruned.

    Returns:
        (rows, cols) float32 new weights W', zero off the mask; (rows, cols) bool mask, True =
        kept; and the layer's squared error tr(D H D^T), D = W - W', without the ridge. The sweep
        knows it for nothing: D = E U for its errors E, and U H U^T = 1, so it is ||E||^2.
    """
    rows, cols = weight.shape
    upper = factor.upper
    dense = weight.detach().float()
    w = dense.T.contiguous()
    w[factor.dead] = 0.0
    squared = 0.0
    keep = torch.empty(cols, rows, dtype=torch.bool, device=w.device)
    unit = pattern.m if isinstance(pattern, NM) else getattr(pattern, "cols", 1)
    width = -(-block_size // unit) * unit
    leaf = unit if isinstance(pattern, NM) else _LEAF
    diagonal = upper.diagonal().unsqueeze(1)
    for start in range(0, cols, width):
        stop = min(start + width, cols)
        panel, chosen = w[start:stop], keep[start:stop]
        u, scale = upper[start:stop, start:stop].contiguous(), diagonal[start:stop]
        bar = None if barred is None else barred[:, start:stop].T
        if not isinstance(pattern, NM):
            score = _score(panel, scale, bar)
            chosen.copy_(_keep_of_block(score, pattern, sparsity, scope, start, stop))
            if bar is not None:
                chosen.logical_and_(~bar)
        errors = torch.empty_like(panel)
        for at in range(0, stop - start, leaf):
            now = slice(at, at + leaf)
            if at:
                panel[now].addmm_(u[:at, now].T, errors[:at], alpha=-1)
            if isinstance(pattern, NM):
                score = _score(panel[now], scale[now], None if bar is None else bar[now])
                chosen[now] = keep_of_lanes(score, pattern.n)
                if bar is not None:
                    chosen[now] &= ~bar[now]
            _sweep(panel[now], errors[now], u[now, now], chosen[now])
        squared += float(errors.square().sum())
        if stop < cols:
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    w.masked_fill_(~keep, 0.0)
    new = w.T.contiguous()
    ridge = factor.ridge * float((dense - new)[:, ~factor.dead].square().sum())
    return new, keep.T.contiguous(), max(squared - ridge, 0.0)


def _score(panel: Tensor, diagonal: Tensor, bar: Tensor | None) -> Tensor:
    """w^2 / U_jj^2: what pruning a weight costs."""
    score = (panel / diagonal).square_()
    return score if bar is None else score.masked_fill_(bar, BARRED)


def _sweep(panel: Tensor, errors: Tensor, u: Tensor, keep: Tensor) -> None:
    """Go over a panel's columns (its rows here) in order, filling `errors`, updating `panel`.

    A column's error is its current weight over U_jj where pruned, 0 where kept; later columns owe
    it U_j,later times that.
    """
    share = torch.where(keep, 0, 1 / u.diagonal().unsqueeze(1))
    gather = u.T.contiguous()
    for j, (column, error, pruned) in enumerate(zip(panel, errors, share, strict=True)):
        if j:
            column.addmv_(errors[:j].T, gather[j, :j], alpha=-1)
        torch.mul(column, pruned, out=error)


def _keep_of_block(
    score: Tensor,
    pattern: Unstructured | Block,
    sparsity: float | Fraction,
    scope: str,
    start: int,
    stop: int,
) -> Tensor:
    """Mask (columns, rows) of the columns [start, stop), chosen at once.

    The counts of successive blocks telescope, so that they sum exactly to the matrix's.
    """
    across = score.T
    if isinstance(pattern, Block):
        # A tile costs the sum of its weights' costs; tile_scores squares, so it is given roots.
        tiles = tile_scores(across.clamp_min(0).sqrt().masked_fill_(across < 0, BARRED), pattern)
        start, stop = start // pattern.cols, stop // pattern.cols
    else:
        tiles = across
    per = 1 if scope == "row" else len(tiles)
    pruned = prune_count(per * stop, sparsity) - prune_count(per * start, sparsity)
    if scope == "row":
        kept = keep_largest(tiles.contiguous(), pruned)
    else:
        kept = keep_largest_overall([tiles], pruned)[0]
    return (spread_tiles(kept, pattern) if isinstance(pattern, Block) else kept).T
