"""Inputs that are always zero: their weights go first and count, whatever prunes, and no live
weight goes beside them."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import exported
from torch import Tensor, nn

import torchprune
from torchprune import PCG, ADMMSpec, BestSpec, MagnitudeSpec, RIASpec, SparseGPTSpec, WandaSpec
from torchprune.calibration.moments import Moments
from torchprune.errors import CalibrationError
from torchprune.methods.block_counts import block_counts, budget_of
from torchprune.methods.factor import factorise
from torchprune.methods.solve import Solver
from torchprune.methods.sparsegpt import sparsegpt
from torchprune.specs.patterns import NM, Block, Pattern, Unstructured, prune_count
from torchprune.specs.spec import Spec

ROWS, COLS = 8, 48


def inputs(seed: int, tokens: int, cols: int, dead: Sequence[int] = ()) -> Tensor:
    """Correlated inputs of different sizes, some of them always zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(cols) + torch.randn(cols, cols, generator=generator) / cols**0.5
    x = torch.randn(tokens, cols, generator=generator) @ mixing
    x *= torch.randn(cols, generator=generator).mul(0.5).exp()
    x[:, list(dead)] = 0
    return x


def linear(seed: int, rows: int, cols: int) -> nn.Linear:
    layer = nn.Linear(cols, rows)
    generator = torch.Generator().manual_seed(seed + 1)
    layer.weight.data = torch.randn(rows, cols, generator=generator)
    return layer


def prune(model: nn.Module, spec: Spec, data: Any) -> nn.Module:
    return torchprune.sparsify(model, spec, data, progress=False)


# -- the law ---------------------------------------------------------------------------------------

DEAD = {
    "all": range(COLS),
    "most": [c for c in range(COLS) if c % 6],
    "half": range(1, COLS, 2),
    "few": [3, 17, 18, 40],
    "first block": range(16),
    "last block": range(32, 48),
    "all but one block": [*range(16), *range(32, 48)],
}
SPECS: list[tuple[type[Spec], dict[str, Any]]] = [
    (WandaSpec, {}),
    (WandaSpec, {"refine": "swaps"}),
    (WandaSpec, {"refine": "pcg"}),
    (RIASpec, {}),
    (SparseGPTSpec, {"block_size": 16}),
    (SparseGPTSpec, {"block_size": 7}),
    (SparseGPTSpec, {"block_size": 16, "refine": PCG(3)}),
    (SparseGPTSpec, {"block_size": 16, "alpha": 0.5}),
    (ADMMSpec, {}),
    (ADMMSpec, {"refine": None}),
    (BestSpec, {"effort": "fast"}),
]
GOALS: list[tuple[str, float | None]] = [
    ("unstructured", 0.5),
    ("unstructured", 0.29),
    ("unstructured", 0.9),
    ("2:4", None),
    ("1:8", None),
    ("block:4x4", 0.5),
    ("block:2x8", 0.7),
    ("block:1x3", 0.29),
]


def units(pattern: Pattern, matrix: Tensor) -> Tensor:
    """(rows, cols, weights) of a matrix: the weights that go together."""
    tall, wide = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)
    rows, cols = matrix.shape
    tiles = matrix.reshape(rows // tall, tall, cols // wide, wide)
    return tiles.transpose(1, 2).flatten(2)


def pools(pattern: Pattern, scope: str, matrix: Tensor) -> Tensor:
    """(pools, units, weights): the units that share a budget."""
    each = units(pattern, matrix)
    if isinstance(pattern, NM):
        return each.reshape(-1, pattern.m, 1)
    return each if scope == "row" else each.flatten(0, 1).unsqueeze(0)


def assert_dead_first(
    pattern: Pattern, share: float, scope: str, keep: Tensor, dead: Tensor, barred: Tensor
) -> None:
    """The whole law on one mask (rows, cols)."""
    gone, idle, bar = (pools(pattern, scope, t) for t in (~keep, dead | barred, barred))
    assert torch.equal(gone, gone[..., :1].expand_as(gone)), "a tile is torn"
    gone, idle, bar = gone[..., 0], idle.all(2), bar.all(2)
    size = gone.shape[1]
    asked = pattern.m - pattern.n if isinstance(pattern, NM) else prune_count(size, share)
    wanted = bar.sum(1).clamp_min(asked)
    assert torch.equal(gone.sum(1), wanted), "the total is not exact"
    assert not bool((bar & ~gone).any()), "what was pruned before came back"
    early = (gone & ~idle).any(1) & (idle & ~gone).any(1)
    assert not bool(early.any()), "a live weight went while a dead one stayed"
    for one, two in zip(gone, idle & ~bar, strict=True):
        places, taken = two.nonzero().flatten(), one & two
        assert torch.equal(taken.nonzero().flatten(), places[: int(taken.sum())]), "not in order"


@settings(max_examples=120)
@given(
    seed=st.integers(0, 10**6),
    method=st.sampled_from(SPECS),
    goal=st.sampled_from(GOALS),
    row=st.booleans(),
    which=st.sampled_from(sorted(DEAD)),
    earlier=st.sampled_from(["none", "none", "some", "one block"]),
)
def test_dead_inputs_go_first_and_count(
    seed: int,
    method: tuple[type[Spec], dict[str, Any]],
    goal: tuple[str, float | None],
    row: bool,
    which: str,
    earlier: str,
) -> None:
    (kind, options), (pattern, sparsity) = method, goal
    if pattern.startswith("block") and options.get("refine") == "swaps":
        options = {}
    spec = kind(sparsity, pattern, "row" if row else "layer", **options)
    assert spec.scope
    layer = linear(seed, ROWS, COLS)
    barred = torch.zeros(ROWS, COLS, dtype=torch.bool)
    if earlier != "none":
        tiles = units(spec.goal.pattern, barred).shape[:2]
        generator = torch.Generator().manual_seed(seed)
        some = torch.rand(tiles, generator=generator) < (0.2 if earlier == "some" else 0.9)
        some &= torch.arange(tiles[1]) < (tiles[1] if earlier == "some" else tiles[1] // 4)
        tall, wide = ROWS // tiles[0], COLS // tiles[1]
        barred = some.repeat_interleave(tall, 0).repeat_interleave(wide, 1)
        if float(barred.float().mean()) > float(spec.goal.sparsity):
            return  # refused: masks only grow
        torchprune.apply_masks(layer, {"weight": ~barred})
    dense = torch.where(barred, 0, layer.weight.detach())
    dead = torch.zeros(COLS, dtype=torch.bool)
    dead[list(DEAD[which])] = True
    prune(layer, spec, list(inputs(seed, 120, COLS, DEAD[which]).split(40)))
    keep, new = torchprune.masks(layer)["weight"], layer.weight.detach()
    share = float(spec.goal.sparsity)
    assert_dead_first(spec.goal.pattern, share, spec.scope, keep, dead, barred)
    assert torch.equal(new == 0, ~keep), "zeros beside the mask"
    kept = keep & dead
    assert torch.equal(new[kept], dense[kept]), "kept weights on dead inputs changed"
    lost = (~keep & ~dead & (dense != 0)).any() or barred.any()
    if kind is not ADMMSpec and not {"refine", "alpha", "effort"} & {*options} and not bool(lost):
        assert torch.equal(new, dense.where(keep, 0)), "nothing was lost, yet weights changed"


def test_the_law_finds_its_breaches() -> None:
    """That the checks above can fail: by one more, one elsewhere, and one of the wrong place."""
    dead, none = (torch.arange(8) < 4)[None], torch.zeros(1, 8, dtype=torch.bool)

    def check(*places: int) -> None:
        gone = none.clone()
        gone[0, list(places)] = True
        assert_dead_first(Unstructured(), 0.25, "row", ~gone, dead, none)

    check(0, 1)
    for places, message in (
        ([0, 1, 2], "not exact"),
        ([0, 6], "a live weight went"),
        ([0, 3], "not in order"),
    ):
        with pytest.raises(AssertionError, match=message):
            check(*places)


# -- SparseGPT: counts told before the sweep -------------------------------------------------------


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40)),
    width=st.integers(1, 12),
    percent=st.integers(0, 99),
    scope=st.sampled_from(["row", "layer"]),
    dead=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    barred=st.sampled_from([0.0, 0.2, 0.9]),
)
def test_the_counts_of_blocks_add_up(
    seed: int,
    shape: tuple[int, int],
    width: int,
    percent: int,
    scope: str,
    dead: float,
    barred: float,
) -> None:
    (rows, cols), share = shape, percent / 100
    generator = torch.Generator().manual_seed(seed)
    idle = torch.rand(cols, generator=generator) < dead
    bar = torch.rand(rows, cols, generator=generator) < barred
    stops = [min(at + width, cols) for at in range(0, cols, width)]
    budget = budget_of((rows, cols), idle, bar, Unstructured(), share, scope, stops)
    assert budget.goes is not None
    assert budget.stays is not None
    pool = 1 if scope == "row" else rows
    for at, wanted in enumerate(budget.counts.expand(rows // pool, -1).tolist()):
        here = slice(at, at + pool)
        must, may = budget.goes[here].sum(0).tolist(), (~budget.stays[here]).sum(0).tolist()
        assert sum(wanted) == max(prune_count(pool * cols, share), int(bar[here].sum()))
        for count, start, stop in zip(wanted, [0, *stops[:-1]], stops, strict=True):
            assert sum(must[start:stop]) <= count <= sum(may[start:stop])
    if not idle.any():  # as if nothing had been looked at
        plain = budget_of((rows, cols), idle, None, Unstructured(), share, scope, stops).counts
        counts = [prune_count(pool * s, share) for s in [0, *stops]]
        assert plain.tolist() == [[b - a for a, b in itertools.pairwise(counts)]]
        if not bar.any():
            assert torch.equal(budget.counts, plain)


def test_live_columns_share_what_is_missing_evenly() -> None:
    dead = torch.tensor([True] * 4 + [False] * 4 + [True, False] * 4)
    goes = dead.expand(10, 16)
    counts = block_counts([4, 8, 16], dead, 10, 0.75, "layer", goes)
    assert counts.tolist() == [[40, 20, 60]]  # of 160 weights 120 go, 80 of them dead


def test_an_earlier_mask_in_one_block_does_not_add_to_the_count() -> None:
    """Also where no input is dead: what a block must lose beyond its share, others keep."""
    layer, x = linear(0, 8, 64), inputs(0, 200, 64)
    barred = torch.zeros(8, 64, dtype=torch.bool)
    barred[:, 48:], barred[3, :30] = True, True
    torchprune.apply_masks(layer, {"weight": ~barred})
    other = copy.deepcopy(layer)
    prune(layer, SparseGPTSpec(0.5, block_size=16), [x])
    keep = torchprune.masks(layer)["weight"]
    assert not bool((keep & barred).any())
    assert int((~keep).sum()) == 256
    prune(other, SparseGPTSpec(0.5, scope="row", block_size=16), [x])
    rows = (~torchprune.masks(other)["weight"]).sum(1)
    assert rows.tolist() == [32] * 3 + [46] + [32] * 4  # one row was sparser before


# -- against float64, and against the layer without its dead inputs --------------------------------


def masks_of(count: int, cols: int) -> Iterator[Tensor]:
    for gone in itertools.combinations(range(cols), count):
        keep = torch.ones(cols, dtype=torch.bool)
        keep[list(gone)] = False
        yield keep


def least_error(row: Tensor, keep: Tensor, gram: Tensor) -> float:
    """||X (w - w')||^2 of the best w' on a mask, in float64, dead inputs and all."""
    change = row.masked_fill(keep, 0)
    at = (keep & (gram.diagonal() > 0)).nonzero().flatten()
    change[at] = -torch.linalg.solve(gram[at][:, at], (gram @ change)[at])
    return float(change @ gram @ change)


@pytest.mark.parametrize("dead", [(0, 3), (1, 2, 5), (0, 1, 4, 6), (0, 1, 2, 4, 5, 7), range(8)])
@pytest.mark.parametrize("kind", [SparseGPTSpec, ADMMSpec, WandaSpec])
def test_no_mask_of_all_is_better_by_far(kind: type[Spec], dead: Sequence[int]) -> None:
    """Of all masks of eight weights, four go; where four are dead, nothing is lost."""
    ratios = []
    for seed in range(6):
        x, layer = inputs(seed, 60, 8, dead), linear(seed, 1, 8)
        row, gram = layer.weight.detach().double()[0], x.double().T @ x.double()
        best = min(least_error(row, keep, gram) for keep in masks_of(4, 8))
        prune(layer, kind(0.5, scope="row", refine=PCG(30, 1e-4)), [x])
        lost = row - layer.weight.detach().double()[0]
        found = float(lost @ gram @ lost)
        if len(dead) >= 4:
            assert best == 0
            assert found <= 1e-9 * float(row @ gram @ row)
        else:
            assert found >= best * (1 - 1e-6)
            ratios.append(found / best)
    assert len(dead) >= 4 or statistics.median(ratios) < 2.5


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("kind", [SparseGPTSpec, ADMMSpec, WandaSpec])
def test_a_layer_with_dead_inputs_is_the_layer_without_them(kind: type[Spec], scope: str) -> None:
    dead = [0, 5, 6, 7, 13, 20, 31]
    live = [c for c in range(32) if c not in dead]
    x, whole, part = inputs(4, 120, 32, dead), linear(4, 6, 32), nn.Linear(25, 6)
    part.weight.data = whole.weight.data[:, live].clone()
    scale = float(whole.weight.detach().abs().max())
    prune(whole, kind(0.5, scope=scope), [x])
    prune(part, kind(9 / 25, scope=scope), [x[:, live]])  # 16 of 32 go, 7 of them dead
    keep = torchprune.masks(whole)["weight"]
    assert not bool(keep[:, dead].any())
    assert torch.equal(keep[:, live], torchprune.masks(part)["weight"])
    torch.testing.assert_close(whole.weight[:, live], part.weight, rtol=1e-3, atol=1e-4 * scale)


def test_dead_inputs_do_not_set_the_damping_of_others() -> None:
    """Small inputs beside many dead ones are damped as they would be alone."""
    x = 1e-3 * inputs(0, 100, 12)
    wide = torch.zeros(100, 48)
    wide[:, 20:32] = x
    alone, among = (factorise(y.T @ y, 100, 0.01, "x") for y in (x, wide))
    assert among.ridge == pytest.approx(alone.ridge, rel=1e-5)
    torch.testing.assert_close(among.upper[20:32, 20:32], alone.upper, rtol=1e-4, atol=1e-4)
    weight = linear(0, 4, 48).weight.detach()
    (solved,) = sparsegpt([weight], among, Unstructured(), 39 / 48, "row")  # three live ones
    (small,) = sparsegpt([weight[:, 20:32]], alone, Unstructured(), 3 / 12, "row")
    assert torch.equal(solved.keep[:, 20:32], small.keep)
    assert solved.squared == pytest.approx(small.squared, rel=1e-3)


# -- through sparsify: where inputs are dead in real layers ----------------------------------------


class Padded(nn.Module):
    """Convolutions over maps so small that most taps read padding; one group reads nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 5, padding=2)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.second(torch.cat([y[:, :4], torch.zeros_like(y[:, 4:])], 1))
        return out


CNN_SPECS: list[Spec] = [
    *(kind(0.5) for kind in (WandaSpec, RIASpec, SparseGPTSpec, ADMMSpec)),
    SparseGPTSpec(0.5, scope="row", block_size=16),
    SparseGPTSpec(pattern="2:4"),
    SparseGPTSpec(0.5, "block:2x4", block_size=16),
    WandaSpec(0.5, scope="global"),
    WandaSpec(0.5, allocation="error"),
    SparseGPTSpec(0.5, allocation="owl", block_size=16),
    WandaSpec(0.5, reconstruct=torchprune.Reconstruct(epochs=1)),
]


@pytest.mark.parametrize("spec", CNN_SPECS, ids=lambda s: f"{s.method}-{s.pattern}-{s.scope}")
def test_convolutions_that_read_padding_lose_nothing(spec: Spec) -> None:
    """One position a map: 24 of 25 and 8 of 9 taps are dead, half is asked for."""
    torch.manual_seed(0)
    model = Padded().eval()
    data = [torch.randn(16, 8, 1, 1) for _ in range(3)]
    dense = copy.deepcopy(model)
    prune(model, spec, data)
    masks = torchprune.masks(model)
    zeros = {n: int((dict(model.named_modules())[n[:-7]].weight == 0).sum()) for n in masks}
    assert sum(zeros.values()) == sum(mask.numel() // 2 for mask in masks.values())
    if spec.scope != "global" and spec.uneven is None:
        assert all(zeros[name] == mask.numel() // 2 for name, mask in masks.items())
    if spec.pattern != NM(2, 4):  # its groups are of input channels: all live, or all dead
        with torch.no_grad():
            torch.testing.assert_close(model(data[0]), dense(data[0]), rtol=1e-5, atol=1e-5)
    for name, mask in masks.items():
        old, new = (dict(m.named_modules())[name[:-7]].weight for m in (dense, model))
        dead = torch.ones(old.shape[2:], dtype=torch.bool)
        dead[dead.shape[0] // 2, dead.shape[1] // 2] = False
        kept = mask & dead
        assert torch.equal(old[kept], new[kept])


def test_experts_with_dead_inputs() -> None:
    family = FAMILIES["mixtral"]
    model = family.make()
    for name, parameter in model.named_parameters():
        if name.endswith("post_attention_layernorm.weight"):
            parameter.data[:24] = 0  # of 32, for all experts
    prune(model, SparseGPTSpec(0.5, block_size=8), family.data())
    masks = {k: m for k, m in torchprune.masks(model).items() if k.endswith("gate_up_proj")}
    assert masks
    for mask in masks.values():  # (experts, rows, cols)
        assert set((~mask).sum((1, 2)).tolist()) == {mask[0].numel() // 2}
        assert bool(mask[:, :, 24:].all())


@pytest.mark.filterwarnings("ignore")  # of torch.export
def test_programs_get_the_masks_of_the_model() -> None:
    model = nn.Sequential(linear(0, 24, 16), nn.ReLU(), linear(1, 16, 24))
    data = list(inputs(0, 60, 16, (0, 1, 2, 9, 10, 11, 12, 13, 14)).split(20))
    spec = SparseGPTSpec(0.5, block_size=8)
    program = torchprune.sparsify(exported(model, data[0]), spec, data, progress=False)
    prune(model, spec, data)
    assert int((model[0].weight == 0).sum()) == 192
    with torch.no_grad():
        torch.testing.assert_close(program.module()(data[0]), model(data[0]))


# -- what the dense model reads there --------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        MagnitudeSpec(0.0, alpha=0.7, refine=PCG(200, 0.01)),
        ADMMSpec(0.0, alpha=0.7, ridge=0.01, refine=PCG(200, 0.01)),
        SparseGPTSpec(0.0, alpha=0.7, damping=0.01),
    ],
    ids=lambda spec: spec.method,
)
def test_the_dense_models_outputs_are_reached_also_where_an_input_died(spec: Spec) -> None:
    """An input that pruning silenced still speaks in the dense model: others stand in for it."""
    x, w = inputs(0, 200, 8, (2,)), linear(0, 4, 8).weight.detach()
    dense = x.clone()
    dense[:, 2] = x[:, 3] - 0.5 * x[:, 5] + 0.1 * inputs(1, 200, 8)[:, 2]
    moments = Moments.empty(1, 8, x.device, gram=True, cross=True)
    moments.add([x], dense=[dense])
    moments.finish()
    (solved,) = Solver(spec, moments, "x").solve(0, [w], spec.goal, [None], [w == w])
    live, wide = [0, 1, 3, 4, 5, 6, 7], x.double()
    wanted = (0.3 * wide + 0.7 * dense.double()) @ w.double().T
    ridge = 0.01 * wide.square().sum(0).diag()
    right = wide.T @ wanted + ridge @ w.double().T
    best = w.double().clone()
    best[:, live] = torch.linalg.solve((wide.T @ wide + ridge)[live][:, live], right[live]).T
    torch.testing.assert_close(solved.weight.double(), best, rtol=1e-3, atol=1e-3)
    assert torch.equal(solved.weight[:, 2], w[:, 2])


# -- values that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WandaSpec, RIASpec])
def test_an_infinite_weight_on_a_dead_input_is_refused(kind: type[Spec]) -> None:
    layer, x = linear(0, 4, 8), inputs(0, 20, 8, (3,))
    layer.weight.data[1, 3] = torch.inf
    before = layer.weight.detach().clone()
    with pytest.raises(CalibrationError, match="its scores hold NaN"):
        prune(layer, kind(0.5), [x])
    assert torch.equal(layer.weight, before)
