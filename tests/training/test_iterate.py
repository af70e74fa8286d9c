"""Pruning level by level: counts, stop rule, states to go back to, resuming to the bit."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune.errors import CheckpointError, SpecError, TargetError
from torchprune.masking.mask import masked_layers
from torchprune.masking.plain_state import slots_of
from torchprune.training import History, Iterative, LevelRow, RunError, Within
from torchprune.training.kept_states import bring_back, keep

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
Y = (X[:, :4] * X[:, 4:8]).argmax(1)


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 4)
    ).to(dtype)


def fit(model: nn.Module) -> None:
    model.train()
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, eps=1e-4)  # float16 has no 1e-8
    for batch in torch.randperm(48).split(16):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[batch].to(dtype)).float(), Y[batch]).backward()
        optimizer.step()


@torch.no_grad()
def loss(model: nn.Module) -> float:
    model.eval()
    x = X.to(next(model.parameters()).dtype)
    return float(nn.functional.cross_entropy(model(x).float(), Y))


def untrained(model: nn.Module) -> None:
    pass


def kept_share(model: nn.Module) -> float:
    """A metric that falls by as much as is pruned."""
    kept = [mask.mask for _, mask in masked_layers(model)]
    return sum(int(m.sum()) for m in kept) / sum(m.numel() for m in kept) if kept else 1.0


def run(model: nn.Module, levels: Any, **options: Any) -> History:
    spec = options.pop("spec", torchprune.MagnitudeSpec())
    asked = {"train": untrained, "evaluate": kept_share, "progress": False, **options}
    return torchprune.prune_iteratively(model, spec, levels, **asked)


def bits_of(model: nn.Module) -> dict[str, Any]:
    """All that a model holds, to compare to the bit."""
    found: dict[str, Any] = {}
    for key, slot in slots_of(model).items():
        found[key] = slot.tensor.detach().clone(), slot.tensor.requires_grad
        if slot.mask is not None:
            found[f"{key} mask"] = slot.mask.mask, slot.mask.record
            found[f"{key} hidden"] = slot.mask.hidden, slot.mask.dense
    found["training"] = [module.training for module in model.modules()]
    found["masked"] = sorted(torchprune.masks(model))
    return found


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, nn.Module):
        one, other = bits_of(one), bits_of(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        raw = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
        assert torch.equal(*raw)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def told(history: History) -> list[tuple[Any, ...]]:
    """Rows without their seconds."""
    return [(r.asked, r.sparsity, r.share, r.metrics, r.within, r.kept) for r in history.rows]


# -- levels ----------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 99), min_size=1, max_size=5, unique=True).map(sorted),
    st.sampled_from(["layer", "row", "global"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=8)
def test_counts_are_exact_and_masks_grow_at_every_level(percents, scope, dtype):
    seen: list[dict[str, Tensor]] = []
    model = net(dtype=dtype)

    def train(model: nn.Module) -> None:
        before = torchprune.masks(model)
        fit(model)
        for layer, mask in masked_layers(model):
            weight = getattr(layer.module, layer.tensor)
            assert (weight[~mask.mask] == 0).all()
            assert torch.equal(before[layer.key], mask.mask)
        seen.append(before)

    spec = torchprune.MagnitudeSpec(scope=scope)
    history = run(model, [p / 100 for p in percents], train=train, evaluate=loss, spec=spec)
    assert len(seen) == len(percents) == len(history.rows) - 1
    for percent, masks in zip(percents, seen, strict=True):
        gone = {key: int((~mask).sum()) for key, mask in masks.items()}
        if scope == "global":
            assert sum(gone.values()) == 480 * percent // 100
        elif scope == "layer":
            assert gone == {"0.weight": 384 * percent // 100, "4.weight": 96 * percent // 100}
        else:
            zeros = (~masks["0.weight"]).sum(1)
            assert (zeros == 16 * percent // 100).all()
    for one, after in pairwise(seen):
        for key, mask in one.items():
            assert not (after[key] & ~mask).any()
    assert history.rows[-1].kept
    assert history.rows[-1].sparsity == torchprune.report(model).sparsity


def test_counts_are_those_of_the_decimals_one_would_write():
    levels = [1 - 0.8**k for k in (1, 2, 3)]
    assert levels[1] < 0.36  # by a rounding error
    history = run(nn.Sequential(nn.Linear(25, 8), nn.ReLU(), nn.Linear(8, 25)), levels)
    assert [row.sparsity for row in history.rows[1:]] == [0.2, 0.36, 97 / 200]


class Rounds:
    levels = (0.25, 0.5)


@pytest.mark.parametrize(
    ("levels", "asked"),
    [
        (Rounds(), ["0.25", "0.5"]),
        (Iterative(0.0, 0.75, 2), ["0.5", "0.75"]),
        ((x for x in (0.25, 0.5)), ["0.25", "0.5"]),
        (torch.tensor([0.25, 0.5]).numpy(), ["0.25", "0.5"]),
        (["3:4", "2:4", "1:4"], ["3:4", "2:4", "1:4"]),
        ([torchprune.NM(3, 4), torchprune.NM(2, 4)], ["3:4", "2:4"]),
        ([0.25, "2:4"], ["0.25", "2:4"]),
        ([("block:4x4", 0.25), ("block:4x4", 0.75)], ["block:4x4 0.25", "block:4x4 0.75"]),
        ([0.25, torchprune.MagnitudeSpec(0.5, scope="row")], ["0.25", "magnitude 0.5"]),
    ],
)
def test_levels_may_be_numbers_patterns_pairs_and_specs(levels, asked):
    model = net()
    history = run(model, levels)
    assert [row.asked for row in history.rows] == ["dense", *asked]
    sparsities = [row.sparsity for row in history.rows]
    assert sparsities == sorted(set(sparsities))
    mask = torchprune.masks(model)["0.weight"]
    last = asked[-1]
    if ":" in last and "block" not in last:
        n = int(last[0])
        assert (mask.view(-1, 4).sum(1) <= n).all()


BAD_LEVELS = [
    ([], "levels are none"),
    ("2:4", "levels must be a sequence"),
    (0.5, "levels must be a sequence"),
    ([0.5, 0.3], r"levels must ascend.*levels\[0\] is 0.5, levels\[1\] is 0.3"),
    ([0.5, 0.5], "levels must ascend"),
    (["2:4", "3:4"], "levels must ascend"),
    ([0.5, 1.0], r"levels\[1\]: sparsity is the share of zeros"),
    ([0.5, -0.1], r"levels\[1\]"),
    ([True], r"levels\[0\]"),
    ([None], r"levels\[0\]"),
    (["3:5"], "divisible by 5"),
    (["dense"], "is no level"),
    ([float("nan")], r"levels\[0\]"),
    ([0], "no sparsity above 0"),
    ([0.0, 0.0], "ascend"),
    ([torchprune.MagnitudeSpec], "levels"),
]


@pytest.mark.parametrize(("levels", "error"), BAD_LEVELS, ids=[str(b[0]) for b in BAD_LEVELS])
def test_refused_levels_leave_the_model_as_it_was(levels, error, tmp_path):
    model = net()
    before = bits_of(model)

    def never(model: nn.Module) -> float:
        raise AssertionError("nothing is trained or measured before a refusal")

    with pytest.raises(SpecError, match=error):
        run(model, levels, train=never, evaluate=never, path=tmp_path / "run")
    assert_same(bits_of(model), before)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"spec": "magnitude"}, "spec must be a spec"),
        ({"spec": torchprune.MagnitudeSpec}, "spec must be a spec"),
        ({"train": None}, "train must be a function"),
        ({"evaluate": 3}, "evaluate must be a function"),
        ({"stop": 0.01}, "stop must be a Within"),
        ({"spec": torchprune.MagnitudeSpec(targets="nowhere")}, "nowhere"),
        ({"spec": torchprune.MagnitudeSpec(pattern="2:4")}, "contradicts pattern 2:4"),
        ({"spec": torchprune.ChannelSpec()}, "no channels to prune"),
    ],
)
def test_refused_calls_leave_the_model_as_it_was(options, error):
    model = net()
    before = bits_of(model)
    with pytest.raises((SpecError, TargetError), match=error):
        run(model, [0, 0.25], **{"train": fit, "evaluate": loss, "data": [X], **options})
    assert_same(bits_of(model), before)


def test_a_model_that_is_already_sparser_is_refused_before_anything_is_trained():
    model = torchprune.sparsify(net(), torchprune.MagnitudeSpec(0.5), progress=False)
    before = bits_of(model)
    with pytest.raises(SpecError, match="masks only grow"):
        run(model, [0, 0.25], train=fit, evaluate=loss)
    assert_same(bits_of(model), before)
    history = run(model, [0.75])
    assert [(row.asked, row.sparsity) for row in history.rows] == [("given", 0.5), ("0.75", 0.75)]


def test_a_first_level_of_0_trains_the_dense_model():
    calls: list[float] = []

    def train(model: nn.Module) -> None:
        calls.append(kept_share(model))

    run(net(), [0.5], train=train)
    assert calls == [0.5]
    history = run(net(), [0, 0.5], train=train)
    assert calls == [0.5, 1.0, 0.5]
    assert [row.asked for row in history.rows] == ["dense", "0.5"]


def test_train_finds_no_gradients_and_each_level_a_seed_of_its_own():
    drawn: list[float] = []

    def train(model: nn.Module) -> None:
        assert all(p.grad is None for p in model.parameters())
        model(X).sum().backward()
        drawn.append(float(torch.rand(())))

    torch.manual_seed(3)
    outside = torch.get_rng_state()
    run(net_before := net(), [0.25, 0.5], train=train)
    assert net_before is not None
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), outside)
    first = list(drawn)
    assert len(set(first)) == 2
    state = torch.get_rng_state()
    run(net_before, [0.6], train=untrained, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    drawn.clear()
    run(net(), [0.25, 0.5], train=train)
    assert drawn == first
    drawn.clear()
    run(net(), [0.25, 0.5], train=train, seed=1)
    assert not set(drawn) & set(first)


# -- other specs -----------------------------------------------------------------------------------


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        return self.head(torch.relu(self.two(x)).mean((2, 3)))


@pytest.mark.parametrize("score", ["flap", "l2", "random", "taylor"])
def test_whole_channels_go_level_by_level_and_can_be_removed(score):
    torch.manual_seed(0)
    model, x = Cnn(), torch.randn(6, 1, 6, 6)
    spec = torchprune.ChannelSpec(
        score=score,
        round_to=1,
        refit=score == "flap",
        loss=(lambda m, b: m(*b).square().mean()) if score == "taylor" else None,
    )
    gone: list[tuple[int, int]] = []

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        keep = [torchprune.masks(model)[k].flatten(1).any(1) for k in ("one.weight", "two.weight")]
        gone.append((int((~keep[0]).sum()), int((~keep[1]).sum())))

    run(model, [0.25, 0.5, 0.75], spec=spec, data=[x], train=train)
    assert gone == [(2, 4), (4, 8), (6, 12)]
    expected = model.eval()(x)
    small = torchprune.shrink(model, torchprune.plan_shrink(model, x))
    assert (small.one.out_channels, small.two.out_channels) == (2, 4)
    assert torch.allclose(small(x), expected, atol=1e-5)


def test_specs_with_data_read_it_at_every_level_even_from_an_iterator():
    model = net().eval()
    history = run(model, [0.25, 0.5], spec=torchprune.WandaSpec(), data=iter([X[:8], X[8:]]))
    assert [row.sparsity for row in history.rows] == [0, 0.25, 0.5]
    solved = run(net().eval(), [0.25, 0.5], spec=torchprune.SparseGPTSpec(), data=[X])
    assert [row.sparsity for row in solved.rows] == [0, 0.25, 0.5]


# -- stopping --------------------------------------------------------------------------------------


def of_list(values: list[float]) -> Any:
    rest = iter(values)
    return lambda model: next(rest)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=6),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["absolute", "relative"]),
)
@settings(max_examples=12)
def test_the_run_ends_by_the_rule_and_goes_back_to_the_sparsest_within(
    losses, patience, higher, kind
):
    sign = 1 if higher else -1
    values = [10.0, *(10.0 - sign * one for one in losses)]
    levels = [(i + 1) / 10 for i in range(len(losses))]
    stop = Within(**{kind: 1.0 if kind == "absolute" else 0.1}, patience=patience)
    snapshots: list[Any] = []

    def evaluate(model: nn.Module) -> float:
        snapshots.append(bits_of(model))
        return values[len(snapshots) - 1]

    model = net()
    history = run(model, levels, train=fit, evaluate=evaluate, stop=stop, higher_is_better=higher)
    within = [one <= 1 for one in losses]
    end = next(
        (i + 1 for i in range(len(within)) if i + 1 >= patience
         and not any(within[i + 1 - patience : i + 1])),
        len(within),
    )  # fmt: skip
    kept = max([0, *(i + 1 for i in range(end) if within[i])])
    assert [row.within for row in history.rows] == [True, *within[:end]]
    assert [row.kept for row in history.rows] == [i == kept for i in range(end + 1)]
    assert history.kept is history.rows[kept]
    assert_same(bits_of(model), snapshots[kept])


def test_a_model_taken_back_learns_on_with_its_zeros():
    model = net()
    weight = model[0].weight
    run(model, [0.25, 0.5], train=fit, evaluate=of_list([1, 1, 0]), stop=Within(0.1))
    assert torchprune.report(model).sparsity == 0.25
    fit(model)
    assert torchprune.report(model).sparsity == 0.25
    assert next(masked_layers(model))[0].module is model[0]
    dense = net()
    run(dense, [0.5], train=fit, evaluate=of_list([1, 0]), stop=Within(0.1))
    assert torchprune.masks(dense) == {}
    assert_same(dense.eval(), net().eval())
    assert dense[0].weight is not weight
    fit(dense)


def test_parameters_stay_the_same_objects_through_it_all():
    model = net()
    before = [id(p) for p in model.parameters()]
    run(model, [0.25, 0.5], train=fit, evaluate=of_list([1, 1, 0]), stop=Within(0.1))
    assert sorted(map(id, model.parameters())) == sorted(before)


def test_nan_is_outside_and_no_tolerance_counts_from_it():
    nan = float("nan")
    history = run(net(), [0.25, 0.5], evaluate=of_list([1, nan]), stop=Within(0.1))
    assert [row.within for row in history.rows] == [True, False]
    with pytest.raises(RunError, match="dense model's 'value' is NaN"):
        run(net(), [0.25], evaluate=of_list([nan]), stop=Within(0.1))
    assert len(run(net(), [0.25], evaluate=of_list([nan, nan])).rows) == 2
    inf = float("inf")
    assert Within(0.0).holds(inf, inf, higher_is_better=False)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "needs one tolerance"),
        ({"absolute": 0.1, "relative": 0.1}, "needs one tolerance"),
        ({"absolute": -0.1}, "absolute must be above 0"),
        ({"relative": float("nan")}, "relative must be above 0"),
        ({"absolute": 0.1, "patience": 0}, "patience"),
        ({"abolute": 0.1}, "did you mean 'absolute'"),
    ],
)
def test_rules_that_cannot_be_are_refused(options, error):
    with pytest.raises(SpecError, match=error):
        Within(**options)


def test_of_several_metrics_one_is_named():
    def both(model: nn.Module) -> dict[str, Any]:
        return {"loss": torch.tensor(1 - kept_share(model)), "kept": kept_share(model)}

    history = run(net(), [0.25, 0.5], evaluate=both, metric="kept", stop=Within(0.3))
    assert (history.metric, history.kept.asked) == ("kept", "0.25")
    with pytest.raises(RunError, match=r"several metrics \('loss', 'kept'\)"):
        run(net(), [0.25], evaluate=both)
    with pytest.raises(RunError, match="no metric 'lost'"):
        run(net(), [0.25], evaluate=both, metric="lost")
    for nothing in (None, {}, torch.ones(2), "1"):
        with pytest.raises(RunError, match="evaluate must give a number"):
            run(net(), [0.25], evaluate=of_list([nothing]))


# -- the history -----------------------------------------------------------------------------------


def test_a_history_is_a_table_a_figure_and_a_file(tmp_path):
    history = run(net(), [0.25, 0.5, 0.75], evaluate=of_list([4, 5, 5, 1]), stop=Within(1))
    assert history.best.asked == "0.5"
    text = str(history)
    assert all(word in text for word in ("level", "50.00 %", "kept", "outside", "dense"))
    assert history.to_markdown().count("\n") == 5
    history.save(tmp_path / "h.json")
    assert History.load(tmp_path / "h.json") == history
    for name in ("h.svg", "h.png"):
        history.figure(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(RunError, match=r"saved as one of \.png"):
        history.figure(tmp_path / "h.txt")
    with pytest.raises(RunError, match="no metric 'other'"):
        history.figure(metric="other")
    lower = run(net(), [0.25, 0.5], evaluate=of_list([4, 2, 3]), higher_is_better=False)
    assert (lower.best.asked, lower.kept.asked) == ("0.25", "0.5")


@given(
    st.lists(
        st.builds(
            LevelRow,
            asked=st.text(max_size=5),
            sparsity=st.floats(0, 1),
            share=st.floats(0, 1),
            metrics=st.fixed_dictionaries({"m": st.floats(allow_nan=False)}),
            pruning=st.floats(0, 9),
            training=st.floats(0, 9),
            evaluating=st.floats(0, 9),
            within=st.booleans(),
            kept=st.just(False),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
@settings(max_examples=15)
def test_histories_come_back_from_json(rows, higher):
    from dataclasses import replace

    rows[0] = replace(rows[0], kept=True)
    history = History(tuple(rows), "m", higher)
    assert History.from_json(history.to_json()) == history


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda d: d.pop("rows"), "'rows' is absent"),
        (lambda d: d.update(format="x"), "expected the format"),
        (lambda d: d.update(metric=3), "metric must be a str"),
        (lambda d: d.update(metric="other"), "no metric 'other'"),
        (lambda d: d.update(rows=[]), "no rows"),
        (lambda d: d["rows"][0].pop("share"), "'share' is absent"),
        (lambda d: d["rows"][0].update(share="much"), "share must be a float"),
        (lambda d: d["rows"][0].update(more=1), "holds 'more'"),
        (lambda d: d["rows"][0].update(metrics={"value": None}), "must be a float"),
        (lambda d: d["rows"][0].update(kept=True), "exactly one row"),
        (lambda d: d["rows"].append(3), "a row must be a dict"),
    ],
)
def test_damaged_histories_are_named(change, error):
    data = json.loads(run(net(), [0.5]).to_json())
    change(data)
    with pytest.raises(RunError, match=error):
        History.from_json(json.dumps(data))
    with pytest.raises(RunError, match="not JSON"):
        History.from_json(json.dumps(data)[:-5])


# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kept_state_comes_back_whatever_happened_since(tmp_path, dtype):
    model = net(dtype=dtype)
    model.register_buffer("count", torch.tensor(3), persistent=False)
    torchprune.sparsify(model, torchprune.MagnitudeSpec(0.3), progress=False)
    fit(model)
    model[1].eval()
    model[4].bias.requires_grad_(False)
    before = bits_of(model)
    dense = copy.deepcopy(model)
    keep(model, tmp_path / "here")
    torchprune.sparsify(model, torchprune.MagnitudeSpec(0.6), progress=False)
    model[4].bias.requires_grad_(True)
    model.count += 1
    fit(model)
    bring_back(model, tmp_path / "here")
    assert_same(bits_of(model), before)
    assert_same(torchprune.densify(model), torchprune.densify(dense))
    other = net(seed=5, dtype=dtype)
    other.register_buffer("count", torch.tensor(0), persistent=False)
    bring_back(other, tmp_path / "here")
    assert_same(bits_of(other), before)


# -- resuming --------------------------------------------------------------------------------------


class Killed(Exception):  # noqa: N818
    pass


LEVELS = [0, 0.3, 0.5, 0.7, 0.9]


def whole(path: Path | None = None, train: Any = fit, evaluate: Any = loss, **more: Any) -> Any:
    model = more.pop("model", None) or net()
    options = {"stop": Within(0.25, patience=2), "higher_is_better": False, **more}
    return model, run(model, LEVELS, train=train, evaluate=evaluate, path=path, **options)


@pytest.mark.parametrize("where", ["train", "evaluate"])
def test_a_run_that_was_interrupted_anywhere_ends_with_the_same_bits(where, tmp_path):
    expected, history = whole()
    for at in range(len(history.rows)):
        same = at % 2 == (where == "train")  # called again with the same object, or another
        calls = 0

        def dying(function: Any) -> Any:
            def call(model: nn.Module) -> Any:
                nonlocal calls
                calls += 1
                result = function(model)  # noqa: B023
                if calls == at + 1:  # noqa: B023
                    raise Killed
                return result

            return call

        model, path = net(), tmp_path / str(at)
        functions = {"train": fit, "evaluate": loss}
        with pytest.raises(Killed):
            whole(path, model=model, **{**functions, where: dying(functions[where])})
        torch.manual_seed(99)  # whatever the process did before
        found, resumed = whole(path, model=model if same else net(seed=at))
        assert told(resumed) == told(history)
        assert_same(bits_of(found), bits_of(expected))
        again, repeated = whole(path, train=of_raising, evaluate=of_raising, model=net(seed=8))
        assert repeated == resumed
        assert_same(bits_of(again), bits_of(expected))
        left = {p.name.split(".")[0] for p in path.iterdir() if p.is_dir()}
        rows = resumed.rows
        ends = {len(rows) - 1, next(i for i, row in enumerate(rows) if row.kept)}
        assert left == {f"level-{i:03d}" for i in ends}
        assert History.load(path / "history.json") == resumed


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)  # as conftest does: sums are the same then
import test_iterate as t
calls = 0
def train(model):
    global calls
    calls += 1
    t.fit(model)
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
t.whole(t.Path({path!r}), train=train)
"""


def test_a_run_whose_process_was_killed_ends_with_the_same_bits(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(json.loads((tmp_path / "run.json").read_text())["rows"]) == 2
    expected, history = whole()
    found, resumed = whole(tmp_path)
    assert told(resumed) == told(history)
    assert_same(bits_of(found), bits_of(expected))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    calls = 0

    def dying(model: nn.Module) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        fit(model)

    with pytest.raises(Killed):
        whole(path, train=dying)
    return path


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("levels", lambda path: run(net(), [0, 0.3], path=path, higher_is_better=False)),
        (
            "levels",
            lambda path: whole(path, spec=torchprune.MagnitudeSpec(scope="row")),
        ),
        ("stop", lambda path: whole(path, stop=None)),
        ("stop", lambda path: whole(path, stop=Within(0.3))),
        ("seed", lambda path: whole(path, seed=1)),
        ("higher_is_better", lambda path: whole(path, higher_is_better=True)),
        ("model", lambda path: whole(path, model=nn.Linear(16, 4))),
        ("model", lambda path: whole(path, model=net(dtype=torch.bfloat16))),
    ],
)
def test_a_directory_of_another_run_is_refused(name, call, interrupted):
    with pytest.raises(RunError, match=f"holds a run with another {name}"):
        call(interrupted)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "short":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) * 2 // 3
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("how", ["gone", "short", "flipped"])
@pytest.mark.parametrize("what", ["run.json", "rest.safetensors", "rest.sum", "weights"])
def test_damaged_files_are_named_and_the_model_stays(what, how, interrupted, tmp_path):
    import shutil

    path = tmp_path / "run"
    shutil.copytree(interrupted, path)
    files = [p for p in path.rglob("*") if p.is_file() and what in p.name]
    file = next(f for f in files if f.suffix != ".json" or what == "run.json")
    model = net(seed=4)
    before = bits_of(model)
    if (what, how) == ("run.json", "flipped"):
        file.write_text(file.read_text().replace('"sparsity"', '"sparsities"'))
    else:
        damage(file, how)
    if (what, how) == ("run.json", "gone"):
        with pytest.raises(Killed):
            whole(path, model=model, train=of_raising)  # it begins anew
        return
    with pytest.raises((RunError, CheckpointError), match=r"damaged|missing|truncated|not JSON"):
        whole(path, model=model)
    assert_same(bits_of(model), before)


def of_raising(model: nn.Module) -> None:
    raise Killed
