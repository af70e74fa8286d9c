"""A better mask for the weights as they are: local search by exchanges within rows.

Masked away weights e of a row cost e G e^T, with G the inputs' second moment. Restoring a pruned
weight i and pruning a kept weight j in its place changes that by

    w_i^2 G_ii - 2 w_i (e G)_i  +  w_j^2 G_jj + 2 w_j (e G)_j  -  2 w_i w_j G_ij.

Scores such as Wanda's see the squares alone; the terms with e G are what the pruned weights of a
row do to each other. Rows do not know of each other, so all make their exchanges at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchprune.masking.packing import masked
from torchprune.specs.patterns import NM, Unstructured

_CANDIDATES = 16
"""Places of a row that are tried together; every product with G serves so many exchanges."""

_AT_ONCE = 1 << 22
"""Numbers that the largest temporary holds: more rows are taken one part after the other."""

_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""What the products with G may be wrong by, as a share of the sum of their terms' sizes."""


def swap(
    weight: Tensor,
    gram: Tensor,
    keep: Tensor,
    pattern: Unstructured | NM,
    rounds: int,
    barred: Tensor | None = None,
) -> Tensor:
    """Exchange pruned for kept weights, always two of one row, while that lowers the layer error.

    The error tr(D G D^T), D the weights masked away, never rises: an exchange must lower it by
    more than its own rounding. Each row keeps its count, for n:m each group does.

    In a round a row makes up to 16 exchanges, the best first, among 16 pruned and 16 kept weights
    that promise most (n:m: the best pairs of its 16 best groups). It is done when none of those
    helps: for n:m, and for rows of up to 16 pruned and 16 kept weights, no exchange at all does
    then.

    Args:
        weight: (rows, cols) dense weights, any floating dtype, finite.
        gram: (cols, cols) float32 G, sum of x x^T; any common factor gives the same mask. Inputs
            and weights may be scaled, as `Problem` does.
        keep: (rows, cols) bool, the mask to start from.
        pattern: for n:m, cols must be a multiple of m, and exchanges stay within a group.
        rounds: at most so many.
        barred: (rows, cols) bool, pruned weights that must stay so, or None.

    Returns:
        (rows, cols) bool, True = kept.
    """
    cols = weight.shape[1]
    group = pattern.m if isinstance(pattern, NM) else None
    height = max(1, _AT_ONCE // max(cols * (group or 1), 4 * _CANDIDATES**2))
    weight, fixed = weight.detach().float(), torch.zeros_like(keep) if barred is None else barred
    parts = zip(weight.split(height), keep.split(height), fixed.split(height), strict=True)
    return torch.cat([_swap_rows(w, gram, k, f, group, rounds) for w, k, f in parts])


def _swap_rows(
    weight: Tensor, gram: Tensor, keep: Tensor, barred: Tensor, group: int | None, rounds: int
) -> Tensor:
    result, rows = keep.clone(), torch.arange(len(keep), device=keep.device)
    diagonal, slope = gram.diagonal(), masked(weight, ~keep) @ gram  # e G
    size = weight.abs() * diagonal.sqrt()
    slack = size * size.sum(1, keepdim=True) * _ROUNDING  # of w_i (e G)_i and its like
    for _ in range(rounds):
        signed = torch.where(keep, weight, -weight)
        cost = weight.square() * diagonal + 2 * signed * slope + slack
        restored = cost.masked_fill(keep | barred, torch.inf)
        pruned = cost.masked_fill_(~keep, torch.inf)
        if group is None:
            places = _of_rows(restored, pruned, signed, gram)
        else:
            places = _of_groups(restored, pruned, signed, gram, group)
        left, right = places.chunk(2, 1)
        moved = signed.gather(1, places)
        exchanged = _exchange(
            torch.cat([restored.gather(1, left), pruned.gather(1, right)], 1),
            moved,
            _among(places, gram),
            paired=group is not None,
        )
        row, at = exchanged.nonzero(as_tuple=True)
        result[rows[row], places[row, at]] ^= True
        more = exchanged.any(1)
        if not bool(more.any()):
            break
        moved = moved * exchanged
        slope += F.embedding_bag(places, gram, mode="sum", per_sample_weights=moved)
        if not bool(more.all()):
            rows, weight, slope = rows[more], weight[more], slope[more]
            slack, barred = slack[more], barred[more]
        keep = result[rows]
    return result


def _of_rows(restored: Tensor, pruned: Tensor, signed: Tensor, gram: Tensor) -> Tensor:
    """(rows, 2k) the k places of each row to restore, then those to prune.

    Those that cost least to restore after the cheapest to prune is, and to prune after the first of
    these: where inputs share a large part, what a weight costs alone says little.
    """
    count = min(_CANDIDATES, signed.shape[1])

    def least(cost: Tensor, after: Tensor) -> Tensor:
        met = 2 * signed.gather(1, after) * signed * gram[after.squeeze(1)]
        return met.add_(cost).topk(count, 1, largest=False).indices

    left = least(restored, pruned.argmin(1, keepdim=True))
    return torch.cat([left, least(pruned, left[:, :1])], 1)


def _of_groups(restored: Tensor, pruned: Tensor, signed: Tensor, gram: Tensor, size: int) -> Tensor:
    """(rows, 2k) the best pairs of the k best groups: the places to restore, then to prune."""
    blocks = gram.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2)
    restored, pruned, signed = (t.unflatten(1, (-1, size)) for t in (restored, pruned, signed))
    both = (signed.unsqueeze(3) * signed.unsqueeze(2)).mul_(blocks.movedim(2, 0)).mul_(2)
    both += restored.unsqueeze(3)
    both += pruned.unsqueeze(2)
    least, pair = both.flatten(2).min(2)
    group = least.topk(min(_CANDIDATES, least.shape[1]), 1, largest=False).indices
    pair = pair.gather(1, group)
    return torch.cat([group * size + pair // size, group * size + pair % size], 1)


def _among(places: Tensor, gram: Tensor) -> Tensor:
    """(rows, k, k) the second moment of each row's places (rows, k)."""
    # One flat index: several times as fast on a CPU as two.
    flat = places.unsqueeze(2) * len(gram) + places.unsqueeze(1)
    return gram.reshape(-1).index_select(0, flat.flatten()).view(flat.shape)


def _exchange(cost: Tensor, signed: Tensor, gram: Tensor, *, paired: bool) -> Tensor:
    """Exchange places of each row, the best pair first, until none helps.

    Args:
        cost: (rows, 2k) change of the error by restoring one of the first k or pruning one of the
            others, inf where that may not be. Used up.
        signed: (rows, 2k) what e gains there: the weight, negative where it is restored.
        gram: (rows, 2k, 2k) the second moment of these places.
        paired: whether place k + i may be exchanged for place i only.

    Returns:
        (rows, 2k) bool, what was exchanged.
    """
    half = cost.shape[1] // 2
    meet = 2 * signed[:, :half, None] * signed[:, None, half:] * gram[:, :half, half:]
    if paired:
        own = torch.eye(half, dtype=torch.bool, device=cost.device)
        meet.masked_fill_(~own, torch.inf)
    exchanged = torch.zeros_like(cost, dtype=torch.bool)
    for _ in range(half):
        best, pair = (meet + cost[:, :half, None] + cost[:, None, half:]).flatten(1).min(1)
        row = (best < 0).nonzero().flatten()
        if not row.numel():
            break
        for place in (pair[row] // half, pair[row] % half + half):
            shift = gram[row, place] * signed[row, place].unsqueeze(1)
            cost[row] += 2 * signed[row] * shift
            cost[row, place] = torch.inf
            exchanged[row, place] = True
    return exchanged
