"""One budget shared unevenly: exact to the weight, within its bounds, and better by its measure."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import assert_as_it_was, fingerprint, inputs_of, llama_layers, prune
from families import FAMILIES, llama
from hypothesis import given
from hypothesis import strategies as st
from saved import reseal
from torch import Tensor, nn

import torchprune
from torchprune import (
    OWL,
    ADMMSpec,
    LeastError,
    MagnitudeSpec,
    RIASpec,
    Search,
    SparseGPTSpec,
    WandaSpec,
)
from torchprune.allocation.budget import Share, budget_of, cheapest, share_of, shifted, whole
from torchprune.allocation.owl import outlier_ratio, owl_sparsities
from torchprune.allocation.search import Ladder, evolve, ladders, moved
from torchprune.errors import CalibrationError, CheckpointError, SpecError
from torchprune.masking.mask import masked_layers
from torchprune.masking.matrices import view_of
from torchprune.reports.report import runs_of
from torchprune.specs.spec import Spec
from torchprune.structure.scores import default_loss
from torchprune.testing import check_laws

METHODS = [MagnitudeSpec, WandaSpec, RIASpec, SparseGPTSpec, ADMMSpec]
QUICK = Search(generations=4, offspring=4)
hundredths = st.integers(0, 99).map(lambda n: n / 100)

# -- budgets --------------------------------------------------------------------------------------


@st.composite
def shares(
    draw: st.DrawFn, steps: tuple[int, ...] = (1, 2, 3, 5, 8, 61, 64), most: int = 40
) -> list[Share]:
    """Layers of one target and spread, of whatever steps and sizes."""
    sparsity, spread = draw(hundredths), draw(hundredths)
    sizes = st.tuples(st.sampled_from(steps), st.integers(1, most), st.integers(0, 3))
    return [share_of(s, n, sparsity, spread, a) for s, n, a in draw(st.lists(sizes, min_size=1))]


def wishes_for(found: list[Share], seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.uniform(-0.2, 1.2) for _ in found]


@given(st.integers(1, 60), hundredths, hundredths, st.integers(0, 5))
def test_bounds_are_the_counts_within_the_spread(
    total: int, sparsity: float, spread: float, already: int
) -> None:
    share = share_of(3, total, sparsity, spread, already)
    target, away = Fraction(str(sparsity)), Fraction(str(spread))
    allowed = {k for k in range(already, total) if abs(Fraction(k, total) - target) <= away}
    uniform = int(total * target)
    if already > uniform:
        allowed = set()  # some row is sparser than was asked
    assert share == Share(3, total, uniform, min({uniform, *allowed}), max({uniform, *allowed}))


@given(shares(), st.integers(0, 10**6))
def test_the_budget_is_met_to_the_weight_and_bounds_are_kept(found: list[Share], seed: int) -> None:
    wishes = wishes_for(found, seed)
    for counts in (whole(shifted(wishes, found), found), whole([s.low for s in found], found)):
        assert sum(s.step * n for s, n in zip(found, counts, strict=True)) == budget_of(found)
        assert all(s.low <= n <= s.high for s, n in zip(found, counts, strict=True))


@given(shares(), st.integers(0, 10**6))
def test_wishes_are_shifted_alike_and_clipped(found: list[Share], seed: int) -> None:
    wishes = wishes_for(found, seed)
    counts = shifted(wishes, found)
    spent = sum(s.step * n for s, n in zip(found, counts, strict=True))
    assert spent == pytest.approx(budget_of(found), abs=1e-6)
    moves = [
        n / s.total - w for s, n, w in zip(found, counts, wishes, strict=True) if s.low < n < s.high
    ]
    by = moves[0] if moves else None
    for share, count, wish in zip(found, counts, wishes, strict=True):
        assert share.low <= count <= share.high
        if by is not None:
            wanted = min(max((wish + by) * share.total, share.low), share.high)
            assert count == pytest.approx(wanted, abs=1e-6)


@given(shares(steps=(6,)), st.integers(0, 10**6))
def test_among_equal_steps_counts_are_rounded_by_less_than_one(
    found: list[Share], seed: int
) -> None:
    counts = shifted(wishes_for(found, seed), found)
    for count, wished in zip(whole(counts, found), counts, strict=True):
        assert abs(count - wished) < 1 + 1e-6


@given(shares(steps=(2, 4, 6), most=300), st.integers(0, 10**6))
def test_zeros_move_between_unlike_steps(found: list[Share], seed: int) -> None:
    counts = shifted(wishes_for(found, seed), found)
    got = whole(counts, found)
    for step in (2, 4, 6):
        of = [i for i, share in enumerate(found) if share.step == step]
        off = step * sum(got[i] - counts[i] for i in of)
        assert abs(off) <= 3 * 12  # three steps, and what all of them divide


@given(st.integers(2, 30), hundredths, hundredths, st.integers(0, 10**6))
def test_alike_layers_keep_the_order_of_their_wishes(
    count: int, sparsity: float, spread: float, seed: int
) -> None:
    found = [share_of(3, 37, sparsity, spread)] * count
    wishes = wishes_for(found, seed)
    order = sorted(range(count), key=lambda i: wishes[i])
    got = whole(shifted(wishes, found), found)
    assert [got[i] for i in order] == sorted(got)


# -- outliers -------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), hundredths, hundredths)
def test_more_outliers_mean_less_sparsity(
    ratios: list[float], target: float, spread: float
) -> None:
    wishes = owl_sparsities(ratios, target, spread)
    if min(ratios) == max(ratios):
        assert wishes == [target] * len(ratios)
        return
    assert wishes[ratios.index(max(ratios))] == pytest.approx(target - spread)
    assert wishes[ratios.index(min(ratios))] == pytest.approx(target + spread)
    for (r, w), (q, v) in itertools.combinations(zip(ratios, wishes, strict=True), 2):
        slope = -2 * spread / (max(ratios) - min(ratios))
        assert w - v == pytest.approx(slope * (r - q), abs=1e-9)


def test_outliers_are_counted_above_a_multiple_of_the_blocks_mean() -> None:
    one, other = torch.tensor([[1.0, 1, 1, 9]]), torch.tensor([[0.0], [0]])
    assert outlier_ratio(lambda: [one, other], 4.0) == 1 / 6  # the mean of both is 2
    assert outlier_ratio(lambda: [one, other], 4.5) == 0.0  # not above it
    assert outlier_ratio(lambda: [], 5.0) == 0.0


def outliers_by_hand(model: nn.Module, data: list[Any], outlier: float) -> list[float]:
    """A share a block of a Llama, in float64 from whole forward passes."""
    ratios = []
    for names in llama_layers(3):
        scores = []
        for name, xs in inputs_of(model, names, data).items():
            norm = torch.cat([x.double().flatten(0, 1) for x in xs]).norm(dim=0)
            scores.append((model.get_submodule(name).weight.double().abs() * norm).flatten())
        joined = torch.cat(scores)
        ratios.append(float((joined > outlier * joined.mean()).double().mean()))
    return ratios


def owl_by_hand(ratios: list[float], target: float, spread: float) -> list[float]:
    """The sparsities of blocks of one size: linear in the ratios, of the target's mean."""
    least, most = min(ratios), max(ratios)
    wishes = [spread * (1 - 2 * (r - least) / (most - least)) for r in ratios]
    tries = []
    for by in torch.linspace(-spread, spread, 20001, dtype=torch.float64).tolist():
        found = [target + min(max(w + by, -spread), spread) for w in wishes]
        tries.append((abs(sum(found) / len(found) - target), found))
    return min(tries)[1]


@pytest.mark.parametrize("loud", [(20, 10, 0), (0, 12, 16), (5, 0, 15)])
def test_owl_is_the_papers_rule(loud: tuple[int, ...]) -> None:
    model, data = llama(num_hidden_layers=3), FAMILIES["llama"].data()
    for block, rows in enumerate(loud):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.{block}.{name}").weight.data[:rows, 3] *= 30
    ratios = outliers_by_hand(model, data, 5.0)
    assert len(set(ratios)) == 3
    wanted = owl_by_hand(ratios, 0.5, 0.08)
    prune(model, MagnitudeSpec(0.5, allocation="owl"), data)
    for layer in torchprune.report(model).layers:
        share = wanted[int(layer.name.split(".")[2])]
        assert abs(layer.zeros - share * layer.size) <= 1.1, layer.name


# -- least error ----------------------------------------------------------------------------------


def hull_at(curve: list[tuple[int, float]], x: float) -> float:
    """The lower convex hull at x: the least of all chords over it."""
    over = [y for a, y in curve if a == x]
    for (a, y), (b, z) in itertools.combinations(curve, 2):
        if a < x < b:
            over.append(y + (z - y) * (x - a) / (b - a))
    return min(over)


@st.composite
def problems(
    draw: st.DrawFn, steps: tuple[int, ...], convex: bool
) -> tuple[list[Share], list[list[tuple[int, float]]]]:
    sparsity, spread = draw(hundredths), draw(hundredths)
    sizes = st.tuples(st.sampled_from(steps), st.integers(1, 7))
    found = [
        share_of(s, n, sparsity, spread) for s, n in draw(st.lists(sizes, min_size=1, max_size=3))
    ]
    curves = []
    for share in found:
        count = share.high - share.low
        rises = draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
        costs = [0, *itertools.accumulate(sorted(rises) if convex else rises)]
        curves.append([(share.low + i, float(c)) for i, c in enumerate(costs)])
    return found, curves


def every_way(found: list[Share]) -> list[tuple[int, ...]]:
    ranges = [range(share.low, share.high + 1) for share in found]
    return [
        counts
        for counts in itertools.product(*ranges)
        if sum(s.step * n for s, n in zip(found, counts, strict=True)) == budget_of(found)
    ]


@given(problems((1, 2, 3), convex=False))
def test_no_choice_of_counts_is_cheaper_than_the_hulls(
    problem: tuple[list[Share], list[list[tuple[int, float]]]],
) -> None:
    found, curves = problem
    counts = cheapest(curves, found)
    spent = sum(s.step * n for s, n in zip(found, counts, strict=True))
    assert spent == pytest.approx(budget_of(found))
    nearest = [round(n) if abs(n - round(n)) < 1e-9 else n for n in counts]
    cost = sum(hull_at(c, n) for c, n in zip(curves, nearest, strict=True))
    least = min(
        sum(dict(c)[n] for c, n in zip(curves, way, strict=True)) for way in every_way(found)
    )
    assert cost <= least + 1e-6


@given(problems((4,), convex=True))
def test_convex_errors_are_minimised_exactly(
    problem: tuple[list[Share], list[list[tuple[int, float]]]],
) -> None:
    found, curves = problem
    costs = {
        way: sum(dict(c)[n] for c, n in zip(curves, way, strict=True)) for way in every_way(found)
    }
    assert costs[tuple(whole(cheapest(curves, found), found))] == min(costs.values())


def test_least_error_lowers_the_sum_of_errors() -> None:
    data = FAMILIES["llama"].data()
    sums = {}
    for allocation in ("uniform", "error"):
        model = FAMILIES["llama"].make()
        spec = WandaSpec(0.6, scope="layer", sequential="none", allocation=allocation)
        prune(model, spec, data)
        sums[allocation] = sum(layer.error or 0.0 for layer in torchprune.report(model).layers)
    assert sums["error"] < 0.98 * sums["uniform"]


# -- search ---------------------------------------------------------------------------------------


@given(shares(most=200), st.integers(1, 50), st.integers(0, 10**6))
def test_moves_stay_within_ladders_and_keep_the_budget(
    found: list[Share], levels: int, seed: int
) -> None:
    made = ladders(found, levels)
    rng, offsets = random.Random(seed), (0,) * len(found)
    for ladder, share in zip(made, found, strict=True):
        assert ladder.down + ladder.up + 1 <= 255
        assert share.low <= ladder.count(-ladder.down)
        assert ladder.count(ladder.up) <= share.high
    for _ in range(5 if len(found) > 1 else 0):
        offsets = moved(offsets, made, rng)
        counts = [y.count(rung) for y, rung in zip(made, offsets, strict=True)]
        assert sum(s.step * n for s, n in zip(found, counts, strict=True)) == budget_of(found)
        assert all(s.low <= n <= s.high for s, n in zip(found, counts, strict=True))


ALIKE = [Ladder(10, 2, 6, 3, 3)] * 3
UNLIKE = [Ladder(10, 2, 6, 3, 3), Ladder(10, 1, 3, 4, 4), Ladder(9, 4, 12, 2, 2)]


def bowl(offsets: tuple[int, ...]) -> float:
    return float(sum((o - t) ** 2 for o, t in zip(offsets, (2, 1, -3), strict=True)))


def test_moves_reach_the_best_there_is() -> None:
    ranges = [range(-y.down, y.up + 1) for y in ALIKE]
    ways = [way for way in itertools.product(*ranges) if sum(way) == 0]
    state = evolve(bowl, ALIKE, Search(generations=40, offspring=6))
    assert state.loss == bowl(state.offsets) == min(map(bowl, ways))
    moved_between = evolve(bowl, UNLIKE, Search(generations=40, offspring=6)).offsets
    assert sum(y.weight * o for y, o in zip(UNLIKE, moved_between, strict=True)) == 0
    assert bowl(moved_between) < bowl((0, 0, 0))


def test_a_seed_decides_the_search() -> None:
    def seen(seed: int) -> list[tuple[int, ...]]:
        tried: list[tuple[int, ...]] = []
        evolve(lambda o: tried.append(o) or bowl(o), UNLIKE, Search(generations=9, seed=seed))
        return tried

    assert seen(1) == seen(1) != seen(2)


@pytest.mark.parametrize("worse", [math.nan, math.inf, 1.0])
def test_nothing_worse_than_uniform_is_taken(worse: float) -> None:
    state = evolve(lambda o: worse if any(o) else 0.5, ALIKE, Search(generations=3))
    assert state.offsets == (0, 0, 0)
    assert state.loss == state.uniform == 0.5
    with pytest.raises(CalibrationError, match="uniformly pruned model is nan"):
        evolve(lambda _: math.nan, ALIKE, Search(generations=3))


def test_one_candidate_that_fails_does_not_hide_the_others() -> None:
    losses = itertools.chain([0.5, math.nan], itertools.repeat(0.25))
    assert evolve(lambda _: next(losses), ALIKE, Search(generations=1)).loss == 0.25


@pytest.mark.parametrize("after", [1, 7, 16])
def test_a_search_goes_on_where_it_was_interrupted(tmp_path: Path, after: int) -> None:
    options = Search(generations=12, offspring=3, path=tmp_path / "deep" / "state.json")
    whole_run = evolve(bowl, UNLIKE, dataclasses.replace(options, path=None))
    left = after

    def failing(offsets: tuple[int, ...]) -> float:
        nonlocal left
        if (left := left - 1) < 0:
            raise KeyboardInterrupt
        return bowl(offsets)

    with pytest.raises(KeyboardInterrupt):
        evolve(failing, UNLIKE, options, "p")
    assert evolve(bowl, UNLIKE, options, "p") == whole_run
    calls: list[object] = []
    assert evolve(lambda o: calls.append(o) or bowl(o), UNLIKE, options, "p") == whole_run
    assert len(calls) == 1  # only to see that it is the same model
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["state.json"]


DAMAGE: dict[str, Any] = {
    "empty": "",
    "cut": lambda text: text[: len(text) // 2],
    "no object": "[1, 2]",
    "no format": {"format": "other"},
    "other version": {"version": 2},
    "other problem": {"problem": "q"},
    "other model": {"uniform": 15.0},
    "generation of no kind": {"generation": True},
    "negative generation": {"generation": -1},
    "no offsets": {"offsets": None},
    "offsets of no kind": {"offsets": [0.0, 0, 0]},
    "too few offsets": {"offsets": [0, 0]},
    "off the ladder": {"offsets": [4, -4, 0]},
    "over budget": {"offsets": [1, 0, 0]},
    "loss of no kind": {"loss": "low"},
    "loss not finite": {"loss": -math.inf},
    "worse than uniform": {"loss": 99.0},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.json"
    options = Search(generations=2, path=path)
    evolve(bowl, ALIKE, options, "p")
    text, change = path.read_text(), DAMAGE[damage]
    if isinstance(change, dict):
        path.write_text(json.dumps({**json.loads(text), **change}))
    else:
        path.write_text(change(text) if callable(change) else change)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        evolve(bowl, ALIKE, options, "p")
    assert path.read_bytes() == before


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no regular file"):
        evolve(bowl, ALIKE, Search(path=tmp_path))


def test_the_search_judges_the_very_models_it_stands_for(tmp_path: Path) -> None:
    family, losses = FAMILIES["llama"], {}
    data, path = family.data(), tmp_path / "state.json"
    search = Search(generations=4, offspring=4, batches=2, path=path)
    for allocation in ("uniform", search):
        model = family.make()
        prune(model, WandaSpec(0.7, sequential="none", allocation=allocation), data)
        with torch.no_grad():
            each = [float(model(batch, labels=batch).loss) for batch in data[:2]]
        losses[allocation] = sum(each) / 2
    state = json.loads(path.read_text())
    assert state["uniform"] == pytest.approx(losses["uniform"], rel=1e-6)
    assert state["loss"] == pytest.approx(losses[search], rel=1e-6)
    assert state["loss"] < state["uniform"]
    assert f"{state['loss']:.6g} on 2 batches" in str(torchprune.report(model).notes)
    again = family.make()
    prune(again, WandaSpec(0.7, sequential="none", allocation=search), data)
    for name, mask in torchprune.masks(again).items():
        assert torch.equal(mask, torchprune.masks(model)[name]), name
    other = family.make()
    before = fingerprint(other)
    for spec, batches in (
        (WandaSpec(0.7, allocation=search), family.data(seed=9)),
        (WandaSpec(0.6, allocation=search), data),
        (WandaSpec(0.7, allocation=dataclasses.replace(search, seed=1)), data),
    ):
        with pytest.raises(CheckpointError, match="another model, spec or data"):
            prune(other, spec, batches)
    assert_as_it_was(other, before)


def test_other_data_are_told_apart_by_more_than_their_loss(tmp_path: Path) -> None:
    family = FAMILIES["mlp"]
    search = Search(1, loss=lambda model, batch: torch.tensor(1.0), path=tmp_path / "state.json")
    prune(family.make(), WandaSpec(allocation=search), family.data())
    with pytest.raises(CheckpointError, match="another model, spec or data"):
        prune(family.make(), WandaSpec(allocation=search), family.data(seed=9))


def test_any_model_can_be_searched_by_a_loss_of_its_own() -> None:
    family = FAMILIES["mlp"]
    dense, model, data = family.make(), family.make(), family.data()

    def loss(net: nn.Module, batch: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not net.training
        return (net(*batch) - dense(*batch)).square().mean()

    prune(model, WandaSpec(0.5, scope="layer", allocation=Search(8, loss=loss)), data)
    assert len({round(y.sparsity, 3) for y in torchprune.report(model).layers}) > 1


def test_padding_is_no_part_of_the_default_loss() -> None:
    model = FAMILIES["llama"].make()
    ids = FAMILIES["llama"].data()[0]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    with torch.no_grad():
        alone = default_loss(model, (ids[:, :8],))
        padded = default_loss(model, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(padded, alone)


# -- from end to end ------------------------------------------------------------------------------


def zeros_of(model: nn.Module) -> int:
    return sum(int((~mask.mask).sum()) for _, mask in masked_layers(model))


def assert_allocated(
    model: nn.Module, uniform: nn.Module, spec: Spec, spread: float, *, uneven: bool = True
) -> None:
    """The uniform total, alike rows or groups, within the spread, as the report says."""
    assert zeros_of(model) == zeros_of(uniform)
    found = torchprune.report(model)
    assert found.zeros >= zeros_of(model)
    assert "as uniform allocation would prune" in found.notes[0]
    shares = []
    for layer, mask in masked_layers(model):
        view = view_of(layer.module, mask.mask.shape)
        zeros = (~view.to_matrix(mask.mask)).sum(2 if spec.scope == "row" else (1, 2))
        assert bool((zeros == zeros.flatten()[0]).all()), layer.name
        shares.append(float((~mask.mask).double().mean()))
        counts = view.cols if spec.scope == "row" else view.rows * view.cols
        assert abs(shares[-1] - spec.sparsity) <= spread + 1 / counts, layer.name
        assert f"{shares[-1]:.4g}" in mask.record.pattern
    if uneven:
        assert max(shares) - min(shares) > spread / 2


ALLOCATIONS = {
    "owl": OWL(outlier=3.0, spread=0.1),
    "error": LeastError(spread=0.1),
    "search": QUICK,
}
_UNIFORM: dict[Any, nn.Module] = {}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)
def test_every_method_takes_an_allocation(method: type[Spec], allocation: str) -> None:
    family = FAMILIES["llama"]
    spec = method(0.6, allocation=ALLOCATIONS[allocation])
    model, data = family.make(), family.data()
    if method not in _UNIFORM:
        _UNIFORM[method] = prune(family.make(), method(0.6), data)
    prune(model, spec, data)
    assert_allocated(model, _UNIFORM[method], spec, 0.1)


@pytest.mark.parametrize(
    "spec",
    [
        WandaSpec(0.6, refine="pcg", alpha=0.5, allocation="error"),
        SparseGPTSpec(0.6, alpha=0.3, sequential="layer", allocation="error"),
        SparseGPTSpec(0.6, scope="row", sequential="block", allocation=QUICK),
        WandaSpec(0.6, reconstruct=torchprune.Reconstruct(epochs=1), allocation="error"),
        MagnitudeSpec(0.6, refine="pcg", allocation="error"),
        RIASpec(0.6, pattern="block:2x4", scope="layer", allocation="error"),
        ADMMSpec(0.6, pattern="block:4x1", steps=4, ramp=3, allocation=QUICK),
    ],
    ids=lambda spec: f"{spec.method}-{spec.pattern}-{spec.scope}-{type(spec.allocation).__name__}",
)
def test_allocations_go_with_all_else(spec: Spec) -> None:
    family = FAMILIES["llama"]
    uniform = prune(
        family.make(), MagnitudeSpec(0.6, spec.pattern, spec.scope)
    )  # counts are every method's
    model = prune(family.make(), spec, family.data())
    assert_allocated(model, uniform, spec, 0.1)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5", "resnet", "mlp"])
@pytest.mark.parametrize("scope", ["row", "layer"])
def test_every_kind_of_layer_shares_a_budget(name: str, scope: str) -> None:
    family, spec = FAMILIES[name], WandaSpec(0.55, scope=scope, allocation="error")
    uniform = prune(family.make(), MagnitudeSpec(0.55, scope=scope))
    assert_allocated(prune(family.make(), spec, family.data()), uniform, spec, 0.1)


def test_methods_that_change_weights_are_allocated_by_wandas_masks() -> None:
    found = []
    for method in (WandaSpec, SparseGPTSpec):
        model = FAMILIES["llama"].make()
        prune(model, method(0.6, scope="layer", allocation="error"), FAMILIES["llama"].data())
        found.append([layer.zeros for layer in torchprune.report(model).layers])
    assert found[0] == found[1]


def test_layers_with_overrides_have_no_part_in_the_budget() -> None:
    family = FAMILIES["llama"]
    options: dict[str, Any] = {
        "overrides": {"*.down_proj": 0.9, "*.k_proj": "2:4", "*.v_proj": "dense"}
    }
    uniform = prune(family.make(), WandaSpec(0.5, **options), family.data())
    model = prune(family.make(), WandaSpec(0.5, allocation="error", **options), family.data())
    assert zeros_of(model) == zeros_of(uniform)
    pairs = zip(torchprune.report(model).layers, torchprune.report(uniform).layers, strict=True)
    same = {one.name.rpartition(".")[2] for one, other in pairs if one.zeros == other.zeros}
    assert {"down_proj", "k_proj"} <= same
    assert not same >= {"q_proj", "o_proj", "gate_proj", "up_proj"}


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_what_is_pruned_already_counts(scope: str) -> None:
    family, data = FAMILIES["llama"], FAMILIES["llama"].data()
    model = prune(family.make(), WandaSpec(0.5, scope=scope), data)
    first = {k: m.clone() for k, m in torchprune.masks(model).items()}
    prune(model, WandaSpec(0.56, scope=scope, allocation=LeastError(spread=0.3)), data)
    uniform = prune(family.make(), WandaSpec(0.56, scope=scope), data)
    assert zeros_of(model) == zeros_of(uniform)
    for name, mask in torchprune.masks(model).items():
        assert not bool((mask & ~first[name]).any()), name


class Fork(nn.Module):
    """One of its two branches is never taken, or never gets a row."""

    def __init__(self, *, empty: bool = False) -> None:
        super().__init__()
        self.taken, self.idle, self.last = (nn.Linear(16, 16) for _ in range(3))
        self.empty = empty

    def forward(self, x: Tensor) -> Tensor:
        if self.empty:
            self.idle(x[:0])
        out: Tensor = self.last(self.taken(x).relu())
        return out


@pytest.mark.parametrize("empty", [False, True])
def test_a_layer_that_no_token_reaches_keeps_the_uniform_sparsity(empty: bool) -> None:
    model = Fork(empty=empty)
    model.taken.weight.data[:, ::2] *= 0.01
    with pytest.warns(UserWarning, match="idle: no .* reached it: pruned by magnitude"):
        prune(model, WandaSpec(0.5, allocation="error"), [torch.randn(30, 16)])
    found = {layer.name: layer.zeros for layer in torchprune.report(model).layers}
    assert found["idle"] == 128
    assert found["taken"] > 128 > found["last"]
    assert found["taken"] + found["last"] == 256


def test_the_laws_hold_with_an_allocation() -> None:
    data = FAMILIES["mlp"].data(count=1)
    check_laws(FAMILIES["mlp"].build, WandaSpec(0.5, allocation=LeastError(3)), data)


@pytest.mark.parametrize(
    "spec",
    [
        WandaSpec(0.6, refine=torchprune.PCG(4), allocation=OWL(4.0, 0.1)),
        ADMMSpec(0.6, steps=4, ramp=3, allocation=LeastError(5)),
        MagnitudeSpec(0.6, allocation=dataclasses.replace(QUICK, batches=1)),
    ],
    ids=lambda spec: spec.method,
)
def test_saved_models_remember_their_allocation(tmp_path: Path, spec: Spec) -> None:
    used = spec
    if isinstance(spec.allocation, Search):  # where its file lies is nobody else's business
        search = dataclasses.replace(spec.allocation, path=tmp_path / "state.json")
        used = dataclasses.replace(spec, allocation=search)
    model = prune(FAMILIES["llama"].make(), used, FAMILIES["llama"].data())
    torchprune.save(model, tmp_path / "saved")
    other = FAMILIES["llama"].make()
    torchprune.load_into(other, tmp_path / "saved")
    assert runs_of(other)[-1].spec == spec
    manifest = json.loads((tmp_path / "saved" / "manifest.json").read_text())
    manifest["runs"][0]["spec"]["allocation"] = {"Spec": {}}
    (tmp_path / "saved" / "manifest.json").write_text(json.dumps(manifest))
    reseal(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"'Spec': .* is none of"):
        torchprune.load_into(FAMILIES["llama"].make(), tmp_path / "saved")


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WandaSpec(pattern="2:4", allocation="owl"), "fixes the sparsity"),
        (lambda: WandaSpec(scope="global", allocation="error"), 'scope "global"'),
        (lambda: MagnitudeSpec(scope="global", allocation="owl"), 'scope "global"'),
        (lambda: WandaSpec(allocation="owls"), "OWL\\(...\\)"),
        (lambda: WandaSpec(allocation=None), "accepted"),
        (lambda: WandaSpec(allocation=["owl"]), "accepted"),
        (lambda: WandaSpec(allocation=OWL), "accepted"),
        (lambda: OWL(outliers=3), "did you mean 'outlier'"),
        (lambda: OWL(outlier=0), "outlier must be above 0"),
        (lambda: OWL(spread=1.5), "spread must be from 0 to 1"),
        (lambda: LeastError(levels=1), "at least 2"),
        (lambda: LeastError(spread=-0.1), "spread"),
        (lambda: Search(generations=0), "generations"),
        (lambda: Search(levels=51), "at most 50"),
        (lambda: Search(seed=0.5), "seed"),
        (lambda: Search(path=3), "path"),
        (lambda: Search(loss="l2"), "callable"),
    ],
)
def test_what_cannot_be_asked_for(make: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make()


def test_uniform_is_what_it_was() -> None:
    assert WandaSpec(allocation="uniform") == WandaSpec()
    assert WandaSpec().uneven is None
    assert not MagnitudeSpec().needs_data
    assert MagnitudeSpec(allocation="owl").needs_data
    assert WandaSpec(allocation="error").allocation == LeastError()


def test_programs_take_no_allocation() -> None:
    family = FAMILIES["mlp"]
    data = family.data()
    program = torch.export.export(family.make(), (data[0],))
    with pytest.raises(SpecError, match="needs a module"):
        torchprune.sparsify(program, WandaSpec(allocation="owl"), data, progress=False)


def _fails_later() -> Any:
    calls = iter(range(100))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if next(calls) > 5:
            raise RuntimeError("out of luck")
        return default_loss(model, batch)

    return loss


@pytest.mark.parametrize(
    ("search", "error", "words"),
    [
        (Search(loss=lambda m, b: torch.zeros(2)), CalibrationError, "scalar"),
        (Search(loss=lambda m, b: torch.tensor(math.nan)), CalibrationError, "pruned model is nan"),
        (Search(loss=_fails_later()), RuntimeError, "out of luck"),
    ],
)
def test_a_failed_search_leaves_the_model_alone(
    search: Search, error: type[Exception], words: str
) -> None:
    model = FAMILIES["llama"].make().train()
    before = fingerprint(model)
    with pytest.raises(error, match=words):
        prune(model, MagnitudeSpec(0.5, allocation=search), FAMILIES["llama"].data())
    assert_as_it_was(model, before)


@pytest.mark.parametrize("allocation", ["owl", "error", "search"])
def test_inputs_that_are_not_finite_are_refused(allocation: str) -> None:
    model = FAMILIES["mlp"].make()
    before = fingerprint(model)
    with pytest.raises(CalibrationError, match="inf or NaN"):
        prune(model, WandaSpec(allocation=allocation), [torch.full((3, 16), math.inf)])
    assert_as_it_was(model, before)


def test_a_model_without_a_loss_needs_one() -> None:
    model = FAMILIES["mlp"].make()
    before = fingerprint(model)
    with pytest.raises(CalibrationError, match="gives no loss by itself"):
        prune(model, WandaSpec(allocation="search"), FAMILIES["mlp"].data())
    with pytest.raises(CalibrationError, match="needs calibration data"):
        prune(model, MagnitudeSpec(allocation="owl"))
    assert_as_it_was(model, before)
