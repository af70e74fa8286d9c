"""How much SparseGPT prunes of each block of columns, told before the sweep.

The sweep chooses a block's mask when it gets there, so every block needs a count beforehand, and
the counts must sum to the matrix's. Weights on inputs that are always zero cost nothing: they go
first, of the whole matrix and not of each block, and the live weights share what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from torchprune.masking.projection import BARRED, project, spread_tiles, tile_scores
from torchprune.specs.patterns import Block, Pattern, prune_count


@dataclass(frozen=True, eq=False)
class Budget:
    """What a sweep prunes of one matrix.

    Attributes:
        counts: int64, of each block of columns so many weights (tiles, for `Block`): (1, blocks)
            for the whole matrix, or for each row where all rows have the same; otherwise
            (rows, blocks). Of no use for n:m, whose groups have their own.
        goes: (rows, cols) bool, what goes whatever the weights are; `counts` includes it. None is
            nothing. Where weights on dead inputs stay, it is all that goes.
    """

    counts: Tensor
    goes: Tensor | None = None


def budget_of(
    shape: tuple[int, int],
    dead: Tensor,
    barred: Tensor | None,
    pattern: Pattern,
    sparsity: float | Fraction,
    scope: str,
    stops: Sequence[int],
) -> Budget:
    """The budget of a matrix.

    As many weights on dead inputs (whole tiles of them, for `Block`) go as are asked for, of equal
    ones those of lower index. If that is not enough, live weights go too.

    Args:
        shape: (rows, cols).
        dead: (cols,) bool, inputs that were always zero.
        barred: (rows, cols) bool, weights that must go, or None.
        scope: "row" or "layer".
        stops: the column after each block; the last is the number of columns.
    """
    tall, wide = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)
    rows, stops = shape[0] // tall, [stop // wide for stop in stops]
    idle = dead.view(-1, wide).all(1)
    if barred is None and not bool(dead.any()):
        return Budget(block_counts(stops, idle, rows, sparsity, scope))
    price = (~dead).float().expand(shape)
    if barred is not None:
        price = price.masked_fill(barred, BARRED)
    goes = ~project(price, pattern, sparsity, scope)
    if isinstance(pattern, Block):
        price = spread_tiles(tile_scores(price, pattern), pattern)
    goes &= price <= 0
    if barred is not None:
        goes |= barred
    tiles = goes.reshape(rows, tall, -1, wide).all(3).all(1)
    return Budget(block_counts(stops, idle, rows, sparsity, scope, tiles), goes)


def block_counts(
    stops: Sequence[int],
    dead: Tensor,
    rows: int,
    sparsity: float | Fraction,
    scope: str,
    goes: Tensor | None = None,
) -> Tensor:
    """How many to prune of each block of columns, as `Budget.counts`.

    Each block is to lose the same share of its live columns; the counts of successive blocks
    telescope. What must go of dead columns, or of a block beyond its share, the others are spared
    in proportion to what they would lose.

    Args:
        stops: the column after each block.
        dead: (cols,) bool, columns that are dead throughout.
        rows: of the matrix.
        scope: "row" or "layer".
        goes: (rows, cols) bool, what goes whatever else does, or None.

    Returns:
        int64 that sum to the exact count of the row or the matrix, unless more than that must go.
    """
    per = 1 if scope == "row" else rows
    before = [0, *(~dead).cumsum(0).tolist()]  # live columns
    ends = [0, *(prune_count(per * before[stop], sparsity) for stop in stops)]
    counts = torch.tensor([[b - a for a, b in pairwise(ends)]], device=dead.device)
    if goes is None:
        return counts
    gone, idle = _of_blocks(goes & ~dead, stops, scope), _of_blocks(goes & dead, stops, scope)
    total = prune_count(per * len(dead), sparsity) - idle.sum(1, keepdim=True)
    counts = counts.maximum(gone)
    spare = counts - gone
    most = spare.sum(1, keepdim=True)
    excess = (counts.sum(1, keepdim=True) - total).clamp_min(0).minimum(most)
    less = spare.cumsum(1) * excess // most.clamp_min(1)
    counts = counts - less.diff(dim=1, prepend=torch.zeros_like(most)) + idle
    return counts[:1] if bool((counts == counts[:1]).all()) else counts


def _of_blocks(marked: Tensor, stops: Sequence[int], scope: str) -> Tensor:
    """How many are marked in each block of columns: (rows, blocks), or (1, blocks) of all rows."""
    counts = marked.sum(0, keepdim=True) if scope == "layer" else marked
    ends = counts.cumsum(1)[:, [stop - 1 for stop in stops]]
    return ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))
