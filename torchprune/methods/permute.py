"""Channel permutation: which inputs share a group of an n:m pattern decides what survives.

Started by dealing channels out to groups by size, as RIA does (Zhang et al., "Plug-and-Play", ICLR
2024), and improved by exchanges of channels between groups as in Pool & Yu, "Channel permutations
for N:M sparsity", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchprune.specs.patterns import NM

_FEW = 64
_BAND = 512
_CHUNK = 1 << 24


def retained(score: Tensor, pattern: NM) -> float:
    """The sum of the scores that the pattern keeps, of (rows, cols) with cols a multiple of m."""
    total = 0.0
    for rows in score.split(max(1, _CHUNK // score.shape[1])):
        best = rows.reshape(-1, pattern.m).topk(pattern.n, dim=1, sorted=False).values
        total += float(best.sum(dtype=torch.float64))
    return total


def best_order(score: Tensor, pattern: NM) -> Tensor:
    """An order of the columns in which the pattern keeps more, by a local search.

    Exact values of every exchange are known: with m - 1 columns of each group held, what any column
    adds to any group is one matrix, on which columns are exchanged pairwise until no exchange
    helps. Which column of each group is free changes from round to round. Deterministic.

    Args:
        score: (rows, cols) float32, at least 0: what each weight is worth. cols a multiple of m.

    Returns:
        (cols,) int64: column i of the new matrix is column order[i] of the old one. Columns of a
        group stand in their old order. Never worse than the order as it is, which is returned if
        nothing better is found or a score is not finite.
    """
    identity = torch.arange(score.shape[1], device=score.device)
    count = score.shape[1] // pattern.m
    if count < 2:
        return identity
    columns = score.T.double().contiguous()
    starts = [_dealt(columns, pattern.m)]
    if few := count <= _FEW:
        starts.append(identity.reshape(-1, pattern.m).clone())
    best, most = identity, retained(score, pattern)
    for groups in starts:
        _search(columns, groups, pattern, (8 if few else 4) * pattern.m)
        groups = groups.sort(dim=1).values
        order = groups[groups[:, 0].argsort()].reshape(-1)
        if (found := retained(score[:, order], pattern)) > most:
            best, most = order, found
    return best


def _search(columns: Tensor, groups: Tensor, pattern: NM, rounds: int) -> None:
    """Improve (groups, m) column indices in place, until 4 m rounds in a row change nothing."""
    generator = torch.Generator().manual_seed(0)
    idle = 0
    for _ in range(rounds):
        idle = 0 if _improve(columns, groups, pattern, generator) else idle + 1
        if idle == 4 * pattern.m:
            return


def _dealt(columns: Tensor, m: int) -> Tensor:
    """(groups, m): columns dealt out by their totals, back and forth, the largest first."""
    ranked = columns.sum(1).argsort(descending=True, stable=True).reshape(m, -1)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.T.contiguous()


def _improve(columns: Tensor, groups: Tensor, pattern: NM, generator: torch.Generator) -> bool:
    """Free one column of every group, and exchange those while that helps. Whether any moved."""
    count, m = groups.shape
    places = torch.randint(m, (count,), generator=generator).to(groups.device)
    moved = False
    for band in torch.randperm(count, generator=generator).to(groups.device).split(_BAND):
        own, place = groups[band], places[band]
        free = own.gather(1, place[:, None]).squeeze(1)
        held = own[torch.arange(m, device=own.device) != place[:, None]].view(-1, m - 1)
        limits = columns[held].topk(pattern.n, dim=1).values[:, -1]  # what a column must exceed
        values = columns[free]
        # sum of max(0, v - limit) over rows, up to what is the same for every group or column
        added = torch.cdist(limits, values, p=1).add_(values.sum(1)).div_(2)
        if (chosen := _exchanged(added)) is not None:
            groups[band] = own.scatter(1, place[:, None], free[chosen][:, None])
            moved = True
    return moved


def _exchanged(added: Tensor) -> Tensor | None:
    """(count,) the column that each group ends with; None if that is the one it begins with.

    Args:
        added: (count, count) what column j would add to group i, which begins with column i.
    """
    chosen = torch.arange(len(added), device=added.device)
    least = 1e-9 * float(added.abs().max())  # below, rounding decides
    moved = False
    while True:
        now = added[:, chosen]
        own = now.diagonal()
        pairs = [*_best_pairs(now + now.T - own - own[:, None], least)]
        if not pairs:
            return chosen if moved else None
        for one, two in pairs:
            chosen[one], chosen[two] = chosen[two], chosen[one]  # indexing copies
        moved = True


def _best_pairs(gains: Tensor, least: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Disjoint pairs, each the best for both of those left. `gains` is used up."""
    index = torch.arange(len(gains), device=gains.device)
    while True:
        best, partner = gains.max(1)
        both = (best > least) & (partner[partner] == index) & (index < partner)
        one, two = index[both], partner[both]
        if not len(one):
            return
        yield one, two
        gone = torch.cat([one, two])
        gains[gone] = -torch.inf
        gains[:, gone] = -torch.inf
