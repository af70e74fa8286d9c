"""The one maker of masks: a score and a pattern give exactly the asked count of zeros.

Scores are float32 and at least 0; `BARRED` marks weights that must go first (they were pruned
before). Ties are settled by place: of equal scores the one of lower index is pruned first, which is
what the references' stable ascending sort does. Masks are True where a weight is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from torchprune.errors import SpecError
from torchprune.specs.patterns import NM, Block, Pattern, Unstructured, prune_count

_QUICKSELECT_UP_TO = 1 << 26

_FEW = 1 << 17

BARRED = -1.0
"""The score of a weight that is already pruned: below every real score."""


def project(score: Tensor, pattern: Pattern, sparsity: float | Fraction, scope: str) -> Tensor:
    """The mask that keeps the best-scored weights the pattern allows.

    Args:
        score: (rows, cols) float32, no NaN, at least 0 or BARRED.
        pattern: for `NM`, cols must be a multiple of m; for `Block`, of the tile.
        sparsity: share of weights (of tiles, for `Block`) to prune; `NM` has its own.
        scope: "row" prunes floor(cols * sparsity) of every row, "layer" floor(rows * cols *
            sparsity) of the matrix. `NM` groups are their own scope.

    Returns:
        (rows, cols) bool, True = kept.
    """
    return project_each([score], pattern, sparsity, scope)[0]


def project_each(
    scores: Sequence[Tensor], pattern: Pattern, sparsity: float | Fraction, scope: str
) -> list[Tensor]:
    """`project` for several matrices; with scope "global" they share one budget."""
    if isinstance(pattern, NM):
        return [_keep_of_groups(score, pattern) for score in scores]
    if isinstance(pattern, Block):
        tiles = [tile_scores(score, pattern) for score in scores]
        kept = project_each(tiles, Unstructured(), sparsity, scope)
        return [spread_tiles(mask, pattern) for mask in kept]
    if scope == "row":
        return [keep_largest(score, prune_count(score.shape[1], sparsity)) for score in scores]
    if scope == "layer":
        return [
            keep_largest_overall([score], prune_count(score.numel(), sparsity))[0]
            for score in scores
        ]
    if scope == "global":
        total = sum(score.numel() for score in scores)
        return keep_largest_overall(scores, prune_count(total, sparsity))
    raise SpecError(f'scope {scope!r} is not understood; accepted: "row", "layer", "global"')


def keep_largest(score: Tensor, pruned: int | Tensor) -> Tensor:
    """Mask (rows, cols) that drops exactly `pruned` of each row, lowest score and index first.

    Args:
        pruned: one count for all rows, or (rows,) int64.
    """
    cols = score.shape[1]
    if isinstance(pruned, Tensor):
        order = score.argsort(dim=1, stable=True)
        kept = torch.arange(cols, device=score.device) >= pruned.unsqueeze(1)
        return torch.empty_like(kept).scatter_(1, order, kept)
    if pruned <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    if pruned >= cols:
        return torch.zeros_like(score, dtype=torch.bool)
    limit = _smallest(score, pruned)
    keep = score > limit
    missing = (cols - pruned) - keep.sum(1)  # how many of those equal to the limit are kept
    tied = missing.nonzero().flatten()
    if tied.numel():
        equal = score[tied] == limit[tied]
        rank_from_end = equal.flip(1).cumsum(1).flip(1)
        keep[tied] |= equal & (rank_from_end <= missing[tied, None])
    return keep


def keep_largest_overall(scores: Sequence[Tensor], pruned: int) -> list[Tensor]:
    """Masks over several tensors taken together, dropping exactly `pruned` in all.

    The limit is found among float bit patterns, which order like the floats they stand for, so
    nothing is sorted and nothing is concatenated. Of equal scores the one in the
    earlier tensor, then of lower index, is pruned first.
    """
    total = sum(score.numel() for score in scores)
    if pruned <= 0:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    if pruned >= total:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    # `+ 0.0` turns -0.0 into 0.0, whose bits order correctly; barred scores are negative bits.
    bits = [(score.contiguous() + 0.0).view(torch.int32) for score in scores]
    limit = _bits_of_rank(bits, pruned)
    keep = [b > limit for b in bits]
    surplus = (total - pruned) - sum(int(k.sum()) for k in keep)
    for bit, mask in zip(reversed(bits), reversed(keep), strict=True):
        if surplus <= 0:
            break
        equal = bit == limit if limit >= 0 else bit < 0
        last = equal.flatten().nonzero().flatten()[-surplus:]
        mask.view(-1)[last] = True
        surplus -= last.numel()
    return keep


def _bits_of_rank(bits: Sequence[Tensor], rank: int) -> int:
    """The bit pattern of the rank-th smallest score, -1 if that one is barred.

    One tensor: quickselect. Several, or a huge one: bisection over patterns, which copies nothing
    until few candidates are left, and then looks at those only.
    """
    if len(bits) == 1 and bits[0].numel() <= _QUICKSELECT_UP_TO:
        return max(-1, int(_smallest(bits[0].view(1, -1), rank)))
    low, high = -1, 0x7F800000
    pool = [b.flatten() for b in bits]
    below, size = 0, sum(b.numel() for b in pool)
    while low < high:
        middle = (low + high) // 2
        under = [b <= middle for b in pool]
        count = sum(int(torch.count_nonzero(u)) for u in under)
        lower = below + count >= rank
        if lower:
            high, left = middle, count
        else:
            low, left = middle + 1, size - count
        if 2 * left < size:
            pool = [b[u if lower else ~u] for b, u in zip(pool, under, strict=True)]
            size = left
            below += 0 if lower else count
    return low


def _smallest(matrix: Tensor, rank: int) -> Tensor:
    """(rows, 1): the rank-th smallest value of every row of a (rows, cols) matrix.

    numpy's selection is vectorised, on a CPU about eight times as fast as torch's.
    """
    if matrix.device.type != "cpu":
        return matrix.kthvalue(rank, dim=1, keepdim=True).values
    ordered = np.partition(matrix.detach().numpy(), rank - 1, axis=1)
    return torch.from_numpy(ordered[:, rank - 1 : rank].copy())


def _keep_of_groups(score: Tensor, pattern: NM) -> Tensor:
    rows, cols = score.shape
    lanes = score.reshape(-1, pattern.m).T.contiguous()
    return keep_of_lanes(lanes, pattern.n).T.reshape(rows, cols)


def keep_of_lanes(lanes: Tensor, n: int) -> Tensor:
    """Of m lanes (m, ...) keep the n best at every place; ties drop the lower lane first.

    The rank of a lane is the number of lanes that go before it in ascending order, counted by
    m * m comparisons: for the small m of N:M patterns far cheaper than sorting.
    """
    m = lanes.shape[0]
    if m <= 32 and m * lanes.numel() <= _FEW:  # all at once: calls cost more than this
        before = lanes.unsqueeze(0) < lanes.unsqueeze(1)
        earlier = torch.ones(m, m, dtype=torch.bool, device=lanes.device).tril_(-1)
        earlier = earlier.view(m, m, *[1] * (lanes.dim() - 1))
        before |= (lanes.unsqueeze(0) == lanes.unsqueeze(1)) & earlier
        return before.sum(1, dtype=torch.uint8) >= m - n
    if m > 32:
        order = lanes.argsort(dim=0, stable=True)
        return torch.zeros_like(lanes, dtype=torch.bool).scatter_(0, order[m - n :], True)
    rank = torch.zeros(lanes.shape, dtype=torch.uint8, device=lanes.device)
    for i in range(m):
        if i:
            rank[i] += (lanes[:i] <= lanes[i]).sum(0, dtype=torch.uint8)
        if i + 1 < m:
            rank[i] += (lanes[i + 1 :] < lanes[i]).sum(0, dtype=torch.uint8)
    keep: Tensor = rank >= m - n
    return keep


def tile_scores(score: Tensor, block: Block) -> Tensor:
    """(rows/R, cols/C) score of each tile: the root of its summed squares (barred tiles stay so).

    A squared score is the error its removal causes, so a tile's is the sum over its weights.
    """
    rows, cols = score.shape
    tiles = score.reshape(rows // block.rows, block.rows, cols // block.cols, block.cols)
    barred = (tiles < 0).all(3).all(1)
    summed = torch.linalg.vector_norm(tiles.clamp_min(0), dim=(1, 3))
    scores: Tensor = summed.masked_fill(barred, BARRED)
    return scores


def spread_tiles(mask: Tensor, block: Block) -> Tensor:
    """A mask of tiles written out to a mask of weights."""
    return mask.repeat_interleave(block.rows, 0).repeat_interleave(block.cols, 1)


def project_partly(
    score: Tensor, pattern: Pattern, sparsity: float | Fraction, scope: str, share: float
) -> Tensor:
    """The mask on the way to `project`'s: of what that would prune, the lowest share goes.

    Args:
        share: in [0, 1]. Counts are rounded down; with 1 this is `project`.
    """
    if share >= 1:
        return project(score, pattern, sparsity, scope)
    if isinstance(pattern, Block):
        tiles = tile_scores(score, pattern)
        return spread_tiles(project_partly(tiles, Unstructured(), sparsity, scope, share), pattern)
    if isinstance(pattern, NM):
        kept = _keep_of_groups(score, pattern)
        going = int(share * (kept.numel() - int(kept.sum())))
        return keep_largest_overall([score.masked_fill(kept, torch.inf)], going)[0]
    if scope == "row":
        return keep_largest(score, int(share * prune_count(score.shape[1], sparsity)))
    return keep_largest_overall([score], int(share * prune_count(score.numel(), sparsity)))[0]
