"""The maker of masks against a naive sort: exact counts, the tie rule, every layout of memory."""

from __future__ import annotations

import math
from decimal import Decimal
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchprune.errors import SpecError
from torchprune.masking.projection import (
    BARRED,
    keep_largest,
    keep_largest_overall,
    keep_of_lanes,
    project,
    project_each,
)
from torchprune.specs.patterns import NM, Block, Unstructured, prune_count

# -- the naive implementation: python lists, one sort, no torch arithmetic ------------------------


def naive_count(total: int, sparsity: float) -> int:
    return math.floor(total * Decimal(repr(sparsity)))


def naive_keep(values: list[float], pruned: int) -> list[bool]:
    """Drop the `pruned` lowest; of equal ones those that come first."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    dropped = set(order[:pruned])
    return [i not in dropped for i in range(len(values))]


def naive_rows(score: list[list[float]], sparsity: float) -> list[list[bool]]:
    return [naive_keep(row, naive_count(len(row), sparsity)) for row in score]


def naive_overall(scores: list[list[list[float]]], sparsity: float) -> list[list[list[bool]]]:
    flat = [value for score in scores for row in score for value in row]
    kept = iter(naive_keep(flat, naive_count(len(flat), sparsity)))
    return [[[next(kept) for _ in row] for row in score] for score in scores]


def naive_groups(score: list[list[float]], n: int, m: int) -> list[list[bool]]:
    return [
        [k for at in range(0, len(row), m) for k in naive_keep(row[at : at + m], m - n)]
        for row in score
    ]


def naive_tiles(score: list[list[float]], rows: int, cols: int) -> list[list[float]]:
    """Sum of squares of each tile: it orders the tiles as the root does."""
    return [
        [
            sum(score[i + a][j + b] ** 2 for a, b in product(range(rows), range(cols)))
            for j in range(0, len(score[0]), cols)
        ]
        for i in range(0, len(score), rows)
    ]


# -- strategies -----------------------------------------------------------------------------------

FEW_VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.0**-130, 3.4e38, math.inf])
MANY_VALUES = st.floats(0, width=32, allow_nan=False)
SPARSITIES = st.one_of(
    st.sampled_from([0.0, 0.5, 0.29, 0.57, 0.1, 0.7, 0.999, 1 / 3]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 99).map(lambda percent: percent / 100),
)


@st.composite
def scores(draw: st.DrawFn, wide: int = 1, tall: int = 1, small: bool = False) -> Tensor:
    """(rows, cols) float32: ties, zeros of both signs, all equal, inf; multiples of tall, wide."""
    rows = tall * draw(st.integers(1, 6))
    cols = wide * draw(st.integers(1, max(1, 24 // wide)))
    whole = st.integers(0, 9).map(float)
    values = whole if small else draw(st.sampled_from([FEW_VALUES, MANY_VALUES, st.just(1.0)]))
    flat = draw(st.lists(values, min_size=rows * cols, max_size=rows * cols))
    return torch.tensor(flat, dtype=torch.float32).reshape(rows, cols)


def laid_out(score: Tensor, how: str) -> Tensor:
    """The same values in another layout of memory."""
    if how == "transposed":
        return score.T.contiguous().T
    if how == "strided":
        return score.repeat_interleave(2, 1)[:, ::2]
    if how == "offset":
        return torch.cat([score.new_ones(1, score.shape[1]), score])[1:]
    return score


LAYOUTS = st.sampled_from(["plain", "transposed", "strided", "offset"])


# -- counts and places ----------------------------------------------------------------------------


@given(scores(), SPARSITIES, LAYOUTS)
def test_row_scope_equals_a_sort_of_every_row(score: Tensor, sparsity: float, layout: str) -> None:
    mask = project(laid_out(score, layout), Unstructured(), sparsity, "row")
    assert mask.dtype == torch.bool
    assert mask.tolist() == naive_rows(score.tolist(), sparsity)
    assert set((~mask).sum(1).tolist()) == {naive_count(score.shape[1], sparsity)}


@given(scores(), SPARSITIES, LAYOUTS)
def test_layer_scope_equals_one_sort_of_the_matrix(
    score: Tensor, sparsity: float, layout: str
) -> None:
    mask = project(laid_out(score, layout), Unstructured(), sparsity, "layer")
    assert mask.tolist() == naive_overall([score.tolist()], sparsity)[0]
    assert int((~mask).sum()) == naive_count(score.numel(), sparsity)


@given(st.lists(scores(), min_size=1, max_size=4), SPARSITIES)
def test_global_scope_equals_one_sort_of_everything(many: list[Tensor], sparsity: float) -> None:
    masks = project_each(many, Unstructured(), sparsity, "global")
    assert [m.tolist() for m in masks] == naive_overall([s.tolist() for s in many], sparsity)
    total = sum(s.numel() for s in many)
    assert sum(int((~m).sum()) for m in masks) == naive_count(total, sparsity)


@given(st.data(), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (5, 6)]), LAYOUTS)
def test_groups_keep_exactly_n_of_m(data: st.DataObject, nm: tuple[int, int], layout: str) -> None:
    n, m = nm
    score = data.draw(scores(wide=m))
    mask = project(laid_out(score, layout), NM(n, m), 0.123, "row")  # n:m has its own sparsity
    assert mask.tolist() == naive_groups(score.tolist(), n, m)
    assert set(mask.reshape(-1, m).sum(1).tolist()) == {n}


@given(st.data(), st.integers(33, 40))
def test_wide_groups_follow_the_same_rule(data: st.DataObject, m: int) -> None:
    n = data.draw(st.integers(1, m - 1))
    score = data.draw(scores(wide=m))
    assert project(score, NM(n, m), 0.5, "layer").tolist() == naive_groups(score.tolist(), n, m)


@given(
    st.data(),
    st.sampled_from([(1, 1), (2, 2), (4, 1), (1, 4), (2, 3)]),
    SPARSITIES,
    st.sampled_from(["row", "layer"]),
    LAYOUTS,
)
def test_blocks_drop_whole_tiles(
    data: st.DataObject, shape: tuple[int, int], sparsity: float, scope: str, layout: str
) -> None:
    rows, cols = shape
    score = data.draw(scores(wide=cols, tall=rows, small=True))
    mask = project(laid_out(score, layout), Block(rows, cols), sparsity, scope)
    tiles = naive_tiles(score.tolist(), rows, cols)
    naive = naive_rows if scope == "row" else lambda t, s: naive_overall([t], s)[0]
    expected = torch.tensor(naive(tiles, sparsity))
    for i, j in product(range(score.shape[0]), range(score.shape[1])):
        assert mask[i, j] == expected[i // rows, j // cols]


@given(st.lists(scores(wide=2, tall=2, small=True), min_size=1, max_size=3), SPARSITIES)
def test_global_blocks_share_one_budget_of_tiles(many: list[Tensor], sparsity: float) -> None:
    masks = project_each(many, Block(2, 2), sparsity, "global")
    expected = naive_overall([naive_tiles(s.tolist(), 2, 2) for s in many], sparsity)
    assert [m[::2, ::2].tolist() for m in masks] == expected


@given(scores(), st.data(), LAYOUTS)
def test_rows_may_have_counts_of_their_own(score: Tensor, data: st.DataObject, layout: str) -> None:
    counts = [data.draw(st.integers(0, score.shape[1])) for _ in score]
    mask = keep_largest(laid_out(score, layout), torch.tensor(counts))
    expected = [naive_keep(row, n) for row, n in zip(score.tolist(), counts, strict=True)]
    assert mask.tolist() == expected


# -- the tie rule and the edges -------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_of_equal_scores_the_first_are_pruned(scope: str) -> None:
    mask = project(torch.ones(1, 6), Unstructured(), 0.5, scope)
    assert mask.tolist() == [[False] * 3 + [True] * 3]


def test_ties_in_a_layer_go_row_by_row_and_in_a_model_layer_by_layer() -> None:
    mask = project(torch.zeros(2, 4), Unstructured(), 0.75, "layer")
    assert mask.tolist() == [[False] * 4, [False, False, True, True]]
    first, second = project_each(
        [torch.ones(1, 2), torch.ones(1, 2)], Unstructured(), 0.5, "global"
    )
    assert not first.any()
    assert second.all()


def test_bfloat16_ties_do_not_prune_too_much() -> None:
    score = torch.randn(64, 512).bfloat16().float().abs()
    for scope in ("row", "layer"):
        assert int((~project(score, Unstructured(), 0.5, scope)).sum()) == score.numel() // 2


def test_an_expanded_score_is_read_as_what_it_shows() -> None:
    row = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert (
        project(row.expand(3, 4), Unstructured(), 0.5, "row").tolist()
        == [[True, False, True, False]] * 3
    )
    column = torch.tensor([[1.0], [2.0]]).expand(2, 4)
    assert project(column, Unstructured(), 0.5, "layer").tolist() == [[False] * 4, [True] * 4]
    assert project(column, NM(2, 4), 0.5, "row").tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_single_rows_and_columns(rows: int, cols: int, scope: str) -> None:
    score = torch.arange(float(rows * cols)).reshape(rows, cols)
    mask = project(score, Unstructured(), 0.5, scope)
    per = cols if scope == "row" else rows * cols
    assert int((~mask).sum()) == (rows if scope == "row" else 1) * (per // 2)


def test_infinite_scores_stay_longest() -> None:
    score = torch.tensor([[math.inf, 0.0, math.inf, 5.0]])
    for scope in ("row", "layer"):
        assert project(score, Unstructured(), 0.5, scope).tolist() == [[True, False, True, False]]
        assert project(score, Unstructured(), 0.75, scope).tolist() == [[False, False, True, False]]


@given(scores(), st.data())
def test_barred_weights_go_first(score: Tensor, data: st.DataObject) -> None:
    flags = st.lists(st.booleans(), min_size=score.numel(), max_size=score.numel())
    barred = torch.tensor(data.draw(flags)).reshape(score.shape)
    pruned = data.draw(st.integers(int(barred.sum()), score.numel()))
    marked = score.masked_fill(barred, BARRED)
    mask = keep_largest_overall([marked], pruned)[0]
    assert not (mask & barred).any()
    assert int((~mask).sum()) == pruned
    per_row = data.draw(st.integers(int(barred.sum(1).max()), score.shape[1]))
    rows = keep_largest(marked, per_row)
    assert not (rows & barred).any()
    assert set((~rows).sum(1).tolist()) == {per_row}


def test_a_tile_is_barred_only_when_all_of_it_is() -> None:
    score = torch.tensor([[BARRED, BARRED, 0.0, BARRED]])
    assert project(score, Block(1, 2), 0.5, "layer").tolist() == [[False, False, True, True]]


def test_ranks_of_very_many_lanes_do_not_wrap_around() -> None:
    kept = keep_of_lanes(torch.arange(300.0)[:, None], 2)
    assert kept[:, 0].nonzero().flatten().tolist() == [298, 299]


@given(st.integers(2, 40), st.data())
def test_lanes_rank_like_a_stable_sort(m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    lanes = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=m, max_size=m))).float()
    expected = naive_keep(lanes.tolist(), m - n)
    assert keep_of_lanes(lanes[:, None], n)[:, 0].tolist() == expected
    many = lanes[:, None].expand(m, (1 << 17) // m**2 + 1)  # counted another way
    assert keep_of_lanes(many, n)[:, -1].tolist() == expected


@given(scores(), SPARSITIES, SPARSITIES)
def test_masks_nest_as_the_sparsity_grows(score: Tensor, one: float, other: float) -> None:
    less, more = sorted((one, other))
    for scope in ("row", "layer"):
        bigger = project(score, Unstructured(), less, scope)
        smaller = project(score, Unstructured(), more, scope)
        assert not (smaller & ~bigger).any()


@given(scores(), SPARSITIES, st.randoms(use_true_random=False))
def test_permuting_rows_permutes_row_masks(score: Tensor, sparsity: float, random: object) -> None:
    order = torch.tensor(random.sample(range(len(score)), len(score)))  # type: ignore[attr-defined]
    mask = project(score, Unstructured(), sparsity, "row")
    assert torch.equal(project(score[order], Unstructured(), sparsity, "row"), mask[order])


@given(scores(), SPARSITIES)
def test_the_score_is_not_written_to(score: Tensor, sparsity: float) -> None:
    before = score.clone()
    for scope in ("row", "layer", "global"):
        project(score, Unstructured(), sparsity, scope)
    assert torch.equal(score.view(torch.int32), before.view(torch.int32))


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(SpecError, match='"row", "layer", "global"'):
        project(torch.ones(2, 2), Unstructured(), 0.5, "columns")


@given(st.integers(0, 10**9), st.integers(0, 10**6 - 1))
def test_counts_are_those_of_the_written_decimal(total: int, millionths: int) -> None:
    assert prune_count(total, millionths / 10**6) == total * millionths // 10**6
