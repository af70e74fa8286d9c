"""`compare`: its rows against pruning by hand, its draws, its file, its tables and its figure."""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from torch import Tensor, nn

import torchprune
from torchprune import (
    PCG,
    BudgetSpec,
    ChannelSpec,
    Comparison,
    HeadSpec,
    LayerSpec,
    MagnitudeSpec,
    NeuronSpec,
    SparseGPTSpec,
    WandaSpec,
    compare,
)
from torchprune.checkpoint.whole_files import write_whole
from torchprune.errors import CalibrationError, MissingExtraError, SpecError
from torchprune.reports.report import runs_of
from torchprune.study.comparison_rows import ComparisonError, Row, Spread
from torchprune.testing import SmallModel, small_models, specs

WIDTH = 16


def make() -> nn.Module:
    """The same small model each time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


def batches(seed: int = 0, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(WIDTH, generator=generator) * 4
    return [torch.randn(12, WIDTH, generator=generator) * scale for _ in range(count)]


PROBE = batches(99, 1)[0]
with torch.no_grad():
    EXPECTED = make()(PROBE)


def error(model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        return {"error": float((model(PROBE) - EXPECTED).square().mean()), "one": 1.0}


class Counting:
    """A factory that remembers its models."""

    def __init__(self, build: Callable[[], nn.Module] = make) -> None:
        self.build, self.models = build, list[nn.Module]()

    def __call__(self) -> nn.Module:
        self.models.append(self.build())
        return self.models[-1]


def run(*args: Any, **options: Any) -> Comparison:
    return compare(*args, **{"progress": False, **options})


def timeless(comparison: Comparison) -> list[Row]:
    return [replace(row, seconds=None) for row in comparison.rows]


# -- the rows --------------------------------------------------------------------------------------


def by_hand(model: nn.Module, spec: Any, data: Any, measure: Any) -> tuple[Any, ...]:
    """Sparsity, share of the model, metrics, held bytes, notes."""
    torchprune.sparsify(model, spec, data, progress=False)
    found = torchprune.report(model)
    zeros = sum(y.numel() - int(y.count_nonzero()) for y in masked_weights(model))
    size = sum(y.numel() for y in masked_weights(model))
    share = zeros / sum(p.numel() for p in model.parameters())
    notes = (*found.notes, *found.warnings)
    return zeros / size, share, measure(model), found.peak_held_bytes, notes


def masked_weights(model: nn.Module) -> list[Tensor]:
    """The effective tensors of everything that has a mask."""
    named = (key.rpartition(".")[::2] for key in torchprune.masks(model))
    return [getattr(model.get_submodule(path), tensor).detach() for path, tensor in named]


def check_row(row: Row, hand: tuple[Any, ...]) -> None:
    held = (row.sparsity, row.share, row.metrics, row.peak_held_bytes, row.notes)
    assert held == hand
    assert row.error is None
    assert row.seconds is not None
    assert row.seconds > 0


@settings(max_examples=6, deadline=None)
@given(model=small_models(kinds=["mlp"]), spec=specs(fits=(8, 8)))
def test_a_row_is_what_the_steps_by_hand_give(model: SmallModel, spec: Any) -> None:
    def measure(net: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"sum": float(net(model.data[0]).sum())}

    found = run(model.make, {"it": spec}, model.data, measure)
    check_row(found.rows[0], by_hand(model.make(), spec, model.data, measure))
    assert found.dense == measure(model.make())
    assert found.rows[0].method == spec.method
    assert found.rows[0].pattern == str(spec.pattern)
    assert found.rows[0].spec == repr(spec)


LLAMA = FAMILIES["llama"]
STRUCTURED = {
    "heads": HeadSpec(sparsity=0.5, score="l2", refit=False),
    "neurons": NeuronSpec(),
    "layers": LayerSpec(drop=1),
}


def test_rows_of_whole_units_are_counted_as_by_hand() -> None:
    tokens = torch.randint(3, 61, (96,), generator=torch.Generator().manual_seed(3))

    def measure(model: nn.Module) -> Any:
        return torchprune.perplexity(model, tokens, seqlen=24)

    found = run(LLAMA.make, STRUCTURED, LLAMA.data(), measure)
    assert [(y.label, y.method, y.pattern) for y in found.rows] == [
        ("heads", "l2", "heads"),
        ("neurons", "flap", "neurons"),
        ("layers", "cosine", "layers"),
    ]
    for row, spec in zip(found.rows, STRUCTURED.values(), strict=True):
        hand = by_hand(
            LLAMA.make(), spec, LLAMA.data(), lambda m: {"perplexity": float(measure(m))}
        )
        check_row(row, hand)
    dropped = found.rows[2]
    assert dropped.sparsity == 1  # all of the masked layers, which are those of one block of two
    assert dropped.share is not None
    assert dropped.share < 0.5


def test_channels_of_convolutions() -> None:
    def conv() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()

    data = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))]
    spec = ChannelSpec(round_to=1)
    found = run(conv, [spec], data, lambda m: m(data[0]).sum())
    hand = by_hand(conv(), spec, data, lambda m: {"value": float(m(data[0]).sum().detach())})
    check_row(found.rows[0], hand)
    assert found.labels == ["flap channels 0.3 round_to=1"]


def test_every_spec_has_a_model_of_its_own_and_the_dense_one_stays() -> None:
    factory = Counting()
    wanted = [WandaSpec(), WandaSpec(sparsity=0.75), SparseGPTSpec(pattern="2:4")]
    run(factory, wanted, batches(), error)
    dense, *pruned = factory.models
    assert not torchprune.report(dense).layers
    assert len(pruned) == 3
    assert [[run.spec for run in runs_of(model)] for model in pruned] == [[s] for s in wanted]


def test_models_do_not_pile_up() -> None:
    made: list[weakref.ref[nn.Module]] = []

    def factory() -> nn.Module:
        assert not [y for y in made if y() is not None]
        model = LLAMA.make()
        made.append(weakref.ref(model))
        return model

    found = run(factory, [WandaSpec(), WandaSpec(pattern="3:7"), MagnitudeSpec()], LLAMA.data(), id)
    assert [row.error is None for row in found.rows] == [True, False, True]
    assert len(made) == 4


def test_data_are_read_once_and_given_to_all() -> None:
    wanted = [WandaSpec(), SparseGPTSpec()]
    found = run(make, wanted, iter(batches()), error)
    again = run(make, wanted, batches(), error)
    assert timeless(found) == timeless(again)


def test_endless_data_are_cut_and_the_row_says_so() -> None:
    endless = itertools.cycle(batches())
    found = run(make, [WandaSpec()], endless, error, max_batches=2)
    assert found.rows[0].metrics == run(make, [WandaSpec()], batches(), error).rows[0].metrics
    assert "used the first 2 batches; more were offered (max_batches)" in found.rows[0].notes


@pytest.mark.parametrize(
    ("given", "metrics"),
    [
        (2, {"value": 2.0}),
        (torch.tensor(0.5), {"value": 0.5}),
        ({"a": torch.tensor([1.5]), "b": 2}, {"a": 1.5, "b": 2.0}),
        (torchprune.study.tasks.evaluation.Perplexity(1.0, 2, 8), {"perplexity": math.e}),
    ],
    ids=["int", "tensor", "mapping", "perplexity"],
)
def test_what_eval_fn_may_give(given: Any, metrics: dict[str, float]) -> None:
    found = run(make, [MagnitudeSpec()], None, lambda _: given)
    assert found.rows[0].metrics == found.dense == metrics


@pytest.mark.parametrize(
    "given", [None, "3", {}, {"a": None}, torch.ones(2)], ids=["none", "text", "{}", "in", "many"]
)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "spec"])
def test_what_eval_fn_may_not_give(given: Any, dense: bool) -> None:
    with pytest.raises(ComparisonError, match="eval_fn must give a number"):
        run(make, [MagnitudeSpec()], None, lambda _: given, dense=dense)


# -- labels and refusals ---------------------------------------------------------------------------


def test_labels_say_what_is_asked_for() -> None:
    wanted = [
        MagnitudeSpec(sparsity=0.25),
        WandaSpec(pattern="2:4"),
        WandaSpec(pattern="block:4x4", sparsity=0.5),
        SparseGPTSpec(refine=PCG(3), damping=0.1),
        BudgetSpec(parameters=0.9, over=NeuronSpec),
    ]
    found = run(make, wanted, batches(), error)
    assert found.labels == [
        "magnitude unstructured 0.25",
        "wanda 2:4",
        "wanda block:4x4 0.5",
        "sparsegpt unstructured 0.5 refine=PCG(steps=3, ridge=0.1), damping=0.1",
        "budget neurons parameters 0.9",
    ]
    assert [row.options for row in found.rows[2:]] == [
        "",
        "refine=PCG(steps=3, ridge=0.1), damping=0.1",
        "",
    ]


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ([], "no specs"),
        (WandaSpec(), "label -> spec or a list"),
        ("wanda", "label -> spec or a list"),
        ({"a": "wanda"}, r"specs\['a'\] must be a spec"),
        ([WandaSpec], "must be a spec"),
        ({1: WandaSpec()}, "label must be a string, got 1"),
        ([WandaSpec(), WandaSpec()], "two specs are 'wanda unstructured 0.5'"),
    ],
    ids=["none", "one", "word", "other", "class", "number", "twice"],
)
def test_refused_specs(wanted: Any, match: str) -> None:
    factory = Counting()
    with pytest.raises(SpecError, match=match):
        run(factory, wanted, batches(), error)
    assert not factory.models


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (torch.ones(2, WIDTH), "data is one tensor"),
        ([], "no batches"),
        ({}, "maps no draw"),
        ({"input_ids": torch.ones(2, 3)}, "draw 'input_ids': data is one tensor"),
        ({"a": batches(), "b": [3]}, "draw 'b': a batch is a int"),
    ],
    ids=["tensor", "empty", "no draws", "one batch", "second draw"],
)
def test_refused_data(data: Any, match: str) -> None:
    factory = Counting()
    with pytest.raises(CalibrationError, match=match):
        run(factory, [WandaSpec()], data, error)
    assert not factory.models


def test_a_factory_that_repeats_itself_is_refused() -> None:
    model = make()
    with pytest.raises(ComparisonError, match=r"same model twice.*copy\.deepcopy"):
        run(lambda: model, [MagnitudeSpec()], None, error)
    run(lambda: copy.deepcopy(model), [MagnitudeSpec()], None, error)
    with pytest.raises(ComparisonError, match="must make a Module, got int"):
        run(lambda: 3, [MagnitudeSpec()], None, error)


# -- failures --------------------------------------------------------------------------------------


def fragile(model: nn.Module) -> float:
    """Cannot measure models of 2:4."""
    if any(layer.pattern == "2:4" for layer in torchprune.report(model).layers):
        raise ZeroDivisionError("no\n  such thing")
    return 1.0


def test_a_failing_spec_is_a_row_and_the_others_go_on() -> None:
    wanted = {"a": WandaSpec(pattern="3:7"), "b": MagnitudeSpec(pattern="2:4"), "c": WandaSpec()}
    found = run(make, wanted, batches(), fragile)
    a, b, c = found.rows
    assert str(a.error).startswith("SpecError: 0: pattern 3:7 needs an input width divisible by 7")
    assert b.error == "ZeroDivisionError: no such thing"
    assert (b.metrics, b.sparsity, b.seconds) == ({}, None, None)
    assert c.error is None
    assert c.metrics == {"value": 1.0}
    assert "b: failed: ZeroDivisionError: no such thing" in str(found)
    assert "failed: ZeroDivisionError" in found.to_markdown()


def test_strict_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        run(make, [MagnitudeSpec(pattern="2:4")], None, fragile, strict=True)


def test_what_the_dense_model_fails_with_is_raised() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        run(make, [MagnitudeSpec()], None, lambda _: (_ for _ in ()).throw(RuntimeError("broken")))


def test_an_interrupt_propagates_and_earlier_rows_are_kept(tmp_path: Path) -> None:
    path, wanted = tmp_path / "c.json", [WandaSpec(), MagnitudeSpec(), MagnitudeSpec(sparsity=0.3)]
    calls = iter(range(9))

    def interrupted(model: nn.Module) -> dict[str, float]:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return error(model)

    with pytest.raises(KeyboardInterrupt):
        run(make, wanted, batches(), interrupted, path=path)
    assert [y.label for y in Comparison.from_json(path.read_text()).rows] == [
        "wanda unstructured 0.5"
    ]
    factory = Counting()
    resumed = run(factory, wanted, batches(), error, path=path)
    assert len(factory.models) == 2
    whole = run(make, wanted, batches(), error, path=tmp_path / "other.json")
    assert timeless(resumed) == timeless(whole)
    assert resumed.dense == whole.dense


# -- draws -----------------------------------------------------------------------------------------


def test_draws_give_mean_least_and_greatest() -> None:
    draws = {str(seed): batches(seed) for seed in range(3)}
    found = run(make, {"w": WandaSpec(), "m": MagnitudeSpec()}, draws, error)
    assert [(y.label, y.draw) for y in found.rows] == list(itertools.product("wm", "012"))
    hand = [by_hand(make(), WandaSpec(), batches(seed), error)[2]["error"] for seed in range(3)]
    assert len(set(hand)) == 3
    got = found.spread("error")["w"]
    assert (got.low, got.high) == (min(hand), max(hand))
    assert got.mean == pytest.approx(math.fsum(hand) / 3, rel=1e-15)
    assert f"{got.mean:.4g} ({got.low:.4g} to {got.high:.4g})" in found.to_markdown()


def test_a_spec_without_data_runs_once_for_all_draws() -> None:
    factory = Counting()
    found = run(factory, [MagnitudeSpec(), WandaSpec()], {"a": batches(0), "b": batches(1)}, error)
    assert len(factory.models) == 4
    a, b = found.rows[:2]
    assert replace(b, draw="a", notes=()) == replace(a, notes=())
    assert b.notes == ("needs no data: draws repeat 'a'",)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4))
@example([0.1, 0.1, 0.1])  # whose sum, divided by three, is more than 0.1
def test_means_lie_between_the_ends(values: list[float]) -> None:
    """However sums round: a figure's bars must not be negative."""
    found = Comparison([row("a", v, draw=str(i)) for i, v in enumerate(values)], None)
    spread = found.spread("m")["a"]
    assert min(values) == spread.low <= spread.mean <= spread.high == max(values)
    assert spread.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-9, abs=1e-9)


def test_a_draw_that_fails_is_named() -> None:
    good = run(make, {"w": WandaSpec()}, {"a": batches(), "b": [torch.ones(2, 3)]}, error)
    assert good.rows[0].error is None
    assert "failed on b: RuntimeError" in str(good)
    assert good.spread("error")["w"].mean == good.rows[0].metrics["error"]


# -- the file --------------------------------------------------------------------------------------


def test_resuming_skips_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "c.json"
    wanted = {"w": WandaSpec(), "m": MagnitudeSpec(), "bad": WandaSpec(pattern="3:7")}
    draws = {"a": batches(0), "b": batches(1)}
    first = run(make, wanted, draws, error, path=path)

    def refuse() -> nn.Module:
        raise AssertionError("nothing is left to run")

    good = {k: v for k, v in wanted.items() if k != "bad"}
    again = run(refuse, good, draws, error, path=path)
    assert list(again.rows) == [y for y in first.rows if y.label != "bad"]
    assert again.dense == first.dense

    factory = Counting()
    run(factory, wanted, draws, error, path=path)
    assert len(factory.models) == 2  # what failed is tried again, on both draws


def test_resuming_runs_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "c.json"

    def models(wanted: dict[str, Any], data: Any) -> tuple[int, Comparison]:
        factory = Counting()
        found = run(factory, wanted, data, error, path=path)
        return len(factory.models), found

    both = {"w": WandaSpec(), "m": MagnitudeSpec()}
    assert models(both, {"a": batches(0)})[0] == 3
    changed = {**both, "w": WandaSpec(sparsity=0.25)}
    count, found = models(changed, {"a": batches(0)})
    assert count == 1
    assert found.rows[0].sparsity == 0.25
    count, found = models(changed, {"a": batches(1)})
    assert count == 1  # other data: the one that reads it
    fresh = run(make, changed, {"a": batches(1)}, error, path=tmp_path / "fresh.json")
    assert timeless(found) == timeless(fresh)
    renamed = {"x": WandaSpec(sparsity=0.25), "y": MagnitudeSpec()}
    assert models(renamed, {"a": batches(1)})[0] == 0
    kept = Comparison.from_json(path.read_text())
    assert {(y.label, y.spec) for y in kept.rows} == {
        ("w", repr(changed["w"])),
        ("m", repr(both["m"])),
        ("x", repr(changed["w"])),
        ("y", repr(both["m"])),
    }
    assert models(renamed, {"b": batches(1)})[0] == 2  # of that name there is no draw


@pytest.mark.parametrize(
    "other",
    [
        lambda x: [x[0], x[1] + 0.5],
        lambda x: [x[0].view(torch.int32), x[1]],
        lambda x: [x[0].flatten(0, 1).view(-1, 2 * WIDTH), x[1]],
        lambda x: [(x[0], 1), x[1]],
        lambda x: [{"input": x[0]}, x[1]],
        lambda x: x[:1],
    ],
    ids=["values", "dtype", "shape", "more arguments", "keyword", "fewer"],
)
def test_data_are_told_apart(other: Callable[[list[Tensor]], Any], tmp_path: Path) -> None:
    path, spec, calls = tmp_path / "c.json", {"m": WandaSpec()}, []
    run(make, spec, batches(), error, path=path)

    def broken() -> nn.Module:
        calls.append(1)
        raise RuntimeError("it is enough to know that it was asked for")

    assert "it is enough" in str(run(broken, spec, other(batches()), error, path=path))
    assert calls == [1]


def test_equal_data_of_other_layout_are_the_same(tmp_path: Path) -> None:
    path, spec = tmp_path / "c.json", {"m": WandaSpec()}
    first = run(make, spec, batches(), error, path=path)
    strided = [x.T.contiguous().T for x in batches()]
    assert run(lambda: None, spec, strided, error, path=path) == first


def test_dense_is_kept_in_the_file_though_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    assert run(make, [MagnitudeSpec()], None, error, path=path, dense=False).dense is None
    factory = Counting()
    assert run(factory, [MagnitudeSpec()], None, error, path=path).dense == error(make())
    assert len(factory.models) == 1
    assert run(factory, [MagnitudeSpec()], None, error, path=path, dense=False).dense is None
    assert len(factory.models) == 1
    assert run(factory, [MagnitudeSpec()], None, error, path=path).dense == error(make())
    assert len(factory.models) == 1


def _edited(change: Callable[[Any], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        found = json.loads(text)
        change(found)
        return json.dumps(found)

    return edit


DAMAGE: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "truncated": (lambda text: text[:-40], "not JSON"),
    "empty": (lambda _: "", "not JSON"),
    "binary": (lambda _: b"\xff\x00\x80", "utf-8"),
    "deep": (lambda _: "[" * 100_000, "not JSON"),
    "list": (lambda _: "[1]", "expected the format .* got 'list'"),
    "foreign": (lambda _: '{"a": 1}', "expected the format .* got None"),
    "later": (_edited(lambda f: f.update(format="torchprune comparison 9")), "comparison 9"),
    "no rows": (_edited(lambda f: f.pop("rows")), "'rows' is absent"),
    "rows": (_edited(lambda f: f.update(rows={})), "expected list"),
    "row": (_edited(lambda f: f["rows"].append(3)), "expected dict, got 3"),
    "no spec": (_edited(lambda f: f["rows"][0].pop("spec")), "'spec' is absent"),
    "label": (_edited(lambda f: f["rows"][0].update(label=[])), "expected str"),
    "sparsity": (_edited(lambda f: f["rows"][0].update(sparsity="x")), "expected float"),
    "metric": (_edited(lambda f: f["rows"][0]["metrics"].update(one=None)), "expected float"),
    "truth": (_edited(lambda f: f["rows"][0]["metrics"].update(one=True)), "expected float"),
    "dense": (_edited(lambda f: f.update(dense=[1])), "expected dict"),
    "notes": (_edited(lambda f: f["rows"][0].update(notes="x")), "expected list"),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_and_foreign_files(damage: Any, match: str, tmp_path: Path) -> None:
    path, factory = tmp_path / "c.json", Counting()
    run(make, [MagnitudeSpec()], None, error, path=path)
    bad = damage(path.read_text())
    path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    before = path.read_bytes()
    with pytest.raises(ComparisonError, match=match) as caught:
        run(factory, [MagnitudeSpec()], None, error, path=path)
    assert str(path) in str(caught.value)
    assert "name another file" in str(caught.value)
    assert path.read_bytes() == before
    assert not factory.models


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    factory = Counting()
    with pytest.raises(OSError, match="file"):
        run(factory, [MagnitudeSpec()], None, error, path=tmp_path / "file" / "c.json")
    assert not factory.models


def test_a_failed_write_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.json"
    write_whole(path, "earlier")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "later")
    assert [y.name for y in tmp_path.iterdir()] == ["c.json"]
    assert path.read_text() == "earlier"


NUMBERS = st.floats() | st.integers(-9, 9).map(float)
ROWS = st.builds(
    Row,
    *[st.text(max_size=8)] * 7,
    sparsity=st.none() | st.floats(0, 1),
    share=st.none() | st.floats(0, 1),
    metrics=st.dictionaries(st.text(max_size=8), NUMBERS, max_size=3),
    seconds=st.none() | st.floats(0, 1e9),
    peak_held_bytes=st.integers(0, 2**60),
    notes=st.lists(st.text(max_size=8), max_size=2).map(tuple),
    error=st.none() | st.text(max_size=8),
)


@given(st.lists(ROWS, max_size=3), st.none() | st.dictionaries(st.text(max_size=8), NUMBERS))
@example([Row(*"abcdefg", metrics={"m": math.inf})], {"m": math.nan})
def test_json_round_trip(rows: list[Row], dense: dict[str, float] | None) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    written = Comparison(tuple(rows), dense).to_json()
    json.loads(written, parse_constant=refuse)
    read = Comparison.from_json(written)
    assert repr(read) == repr(Comparison(tuple(rows), dense))  # nan is not equal to itself


# -- tables ----------------------------------------------------------------------------------------


def row(label: str, value: float | None, *, draw: str = "", **changes: Any) -> Row:
    metrics = {} if value is None else {"m": value}
    failed = {"error": "Failed: so"} if value is None else {}
    usual = {
        **{"method": "wanda", "options": "", "pattern": "unstructured", "spec": "spec"},
        **{"sparsity": 0.5, "share": 0.25, "seconds": 1.0, "metrics": metrics, **failed},
    }
    return Row(label, draw=draw, **{**usual, **changes})


def cells_of(markdown: str) -> list[list[str]]:
    """The text of every cell as a parser of Markdown reads it."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    assert [t.type for t in tokens if t.level == 0] == ["table_open", "table_close"]
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            children = token.children or []
            assert {c.type for c in children} <= {"text", "text_special"}  # no tags, no emphasis
            rows[-1].append("".join(c.content for c in children))
    return rows


def test_markdown_is_a_table() -> None:
    names = ["plain", "a|b", "back\\slash\\|", "two\nlines", "*up*", "<lambda>", "`\\*`"]
    found = Comparison(
        [*(row(name, 1.5, notes=("x|y",)) for name in names), row("bad", None)], {"m": 1.0}
    )
    head, *rows = cells_of(found.to_markdown())
    assert head == [
        *("", "method", "pattern", "sparsity", "of model", "m", "seconds", "MiB held", "note")
    ]
    assert [y[0] for y in rows] == ["dense", *names[:3], "two lines", *names[4:], "bad"]
    assert all(len(y) == len(head) for y in rows)
    assert rows[2] == [
        *("a|b", "wanda", "unstructured", "50.00%", "25.00%", "1.5", "1.0", "0.0", "x|y")
    ]
    assert rows[-1] == ["bad", "wanda", "unstructured", "", "", "", "", "", "failed: Failed: so"]


def test_plain_text_is_aligned_and_rich_keeps_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Comparison(
        [row("long [cli] label", 12345.0), row("b", math.inf, notes=("see [data]",))], {"m": 1.0}
    )
    assert "long [cli] label" in str(found)
    assert "─" in str(found)
    assert str(found).endswith("b: see [data]")
    for name in ("rich", "rich.box", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)
    *lines, note = str(found).split("\n")
    assert note == "b: see [data]"
    assert len(lines) == 4
    at = lines[0].index("of model") + len("of model")
    assert [line[:at].endswith(("of model", "25.00%")) for line in lines] == [
        *(True, False, True, True)
    ]
    assert lines[2].index("wanda") == lines[3].index("wanda") == lines[0].index("method")
    assert [line.split()[-3] for line in lines[2:]] == ["1.234e+04", "inf"]


# -- ratios ----------------------------------------------------------------------------------------


def test_ratio_is_the_damage_beside_a_baselines() -> None:
    rows = [
        *(row("base", v, draw=d) for d, v in (("a", 6.0), ("b", 8.0))),
        *(row("other", v, draw=d) for d, v in (("a", 5.0), ("b", 7.0))),
        row("half", 4.0, draw="b"),
        row("half", None, draw="a"),
        row("elsewhere", 4.0, draw="c"),
        row("failed", None, draw="a"),
    ]
    found = Comparison(rows, {"m": 4.0}).ratio("m", "base")
    # (5 - 4) / (6 - 4) = 1/2 and (7 - 4) / (8 - 4) = 3/4
    assert found == {
        "base": Spread(1.0, 1.0, 1.0),
        "other": Spread(0.625, 0.5, 0.75),
        "half": Spread(0.0, 0.0, 0.0),
    }


@given(*[st.floats(-100, 100).map(lambda v: round(v, 3))] * 3)
def test_ratio_of_one_draw(dense: float, base: float, value: float) -> None:
    found = Comparison([row("b", base), row("v", value)], {"m": dense})
    if base == dense:
        with pytest.raises(ComparisonError, match="must differ"):
            found.ratio("m", "b")
    else:
        assert found.ratio("m", "b")["v"].mean == (value - dense) / (base - dense)


@pytest.mark.parametrize(
    ("rows", "dense", "metric", "baseline", "match"),
    [
        ([row("base", 2.0)], None, "m", "base", r"needs the dense model's: .*dense=True"),
        ([row("base", 2.0)], {"other": 1.0}, "m", "base", "needs the dense model's"),
        ([row("base", 2.0)], {"m": 1.0}, "n", "base", "no metric 'n'.*measured: 'm'"),
        ([row("base", 2.0)], {"m": 1.0}, "m", "bas", "no row is labelled 'bas' .did you mean"),
        ([row("base", None)], {"m": 1.0}, "m", "base", "'base' has no 'm': Failed: so"),
        ([row("base", 1.0)], {"m": 1.0}, "m", "base", "'m' is 1, the dense model's 1; they must"),
        ([row("base", math.inf)], {"m": 1.0}, "m", "base", "is inf, the dense .* finite"),
        ([row("base", 2.0)], {"m": math.nan}, "m", "base", "the dense model's nan"),
    ],
    ids=["dense", "partly", "metric", "label", "failed", "equal", "inf", "nan"],
)
def test_ratios_that_are_none(
    rows: list[Row], dense: Any, metric: str, baseline: str, match: str
) -> None:
    with pytest.raises(ComparisonError, match=match):
        Comparison(rows, dense).ratio(metric, baseline)


# -- the figure ------------------------------------------------------------------------------------


def drawn() -> Comparison:
    nm = {"pattern": "2:4", "sparsity": 0.5}
    return Comparison(
        [
            row("w70", 9.0, sparsity=0.7, share=0.35),  # not in the order of the axis
            *(row("w50", v, draw=d) for d, v in (("a", 3.0), ("b", 1.0), ("c", 8.0))),
            row("w24", 6.0, **nm),
            row("s50", 2.0, method="sparsegpt"),
            row("s24", 2.5, method="sparsegpt", **nm),
            row("s50 damped", 2.2, method="sparsegpt", options="damping=0.1"),
            row("lost", math.inf, method="magnitude"),
            row("failed", None),
        ],
        {"m": 1.5},
    )


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89")],
)
def test_the_figure_is_written(suffix: str, start: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra figure is not installed")
    drawn().figure("m", tmp_path / f"f.{suffix}")
    written = (tmp_path / f"f.{suffix}").read_bytes()
    assert written.startswith(start)
    assert len(written) > 2000


@pytest.mark.parametrize("x", ["sparsity", "share"])
def test_what_the_figure_shows(x: Any) -> None:
    pytest.importorskip("matplotlib", reason="the extra figure is not installed")
    from matplotlib.container import ErrorbarContainer

    (axes,) = drawn().figure("m", x=x).axes
    places = {"sparsity": (0.5, 0.7), "share": (0.25, 0.35)}[x]
    shown = {}
    for bars in axes.containers:
        assert isinstance(bars, ErrorbarContainer)
        line = bars.lines[0]
        assert line is not None
        shown[bars.get_label()] = line
    where = {k: (list(y.get_xdata()), list(y.get_ydata())) for k, y in shown.items()}
    assert where == {
        "wanda unstructured": (list(places), [4.0, 9.0]),
        "wanda 2:4": ([places[0]], [6.0]),
        "sparsegpt unstructured": ([places[0]], [2.0]),
        "sparsegpt 2:4": ([places[0]], [2.5]),
        "sparsegpt damping=0.1 unstructured": ([places[0]], [2.2]),
    }
    style = {k: (y.get_linestyle(), y.get_marker(), y.get_color()) for k, y in shown.items()}
    lines, nm = [style[k] for k in style if "2:4" not in k], [style[k] for k in style if "2:4" in k]
    assert {y[0] for y in lines} == {"-"}
    assert {y[0] for y in nm} == {"None"}
    assert {y[1] for y in lines} != {y[1] for y in nm}
    assert len({y[1] for y in nm}) == len({y[1] for y in lines}) == 1
    assert style["wanda 2:4"][2] == style["wanda unstructured"][2]
    assert style["sparsegpt 2:4"][2] != style["wanda 2:4"][2]
    ends = axes.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert sorted(ends) == [1.0, 8.0]
    dense = next(y for y in axes.lines if y.get_label() == "dense")
    assert list(dense.get_ydata()) == [1.5, 1.5]
    assert dense.get_linestyle() == "--"
    assert axes.get_ylabel() == "m"
    assert (
        axes.get_xlabel()
        == {
            "sparsity": "sparsity of the pruned layers",
            "share": "zeros of all parameters",
        }[x]
    )
    assert axes.get_legend() is not None


@pytest.mark.parametrize(
    ("values", "scale"),
    [((1.0, 11.0), "log"), ((1.0, 9.0), "linear"), ((0.0, 11.0), "linear")],
    ids=["wide", "narrow", "zero"],
)
def test_values_over_a_decade_are_logarithmic(values: tuple[float, float], scale: str) -> None:
    pytest.importorskip("matplotlib", reason="the extra figure is not installed")
    found = Comparison([row("a", values[1])], {"m": values[0]})
    assert found.figure("m").axes[0].get_yscale() == scale


def test_figures_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"saved as one of \.png, \.svg, \.pdf"):
        drawn().figure("m", tmp_path / "f.jpg")
    with pytest.raises(ComparisonError, match="no metric 'n'"):
        drawn().figure("n")
    with pytest.raises(ComparisonError, match="no row has a finite 'm'"):
        Comparison([row("a", math.nan)], {"m": 1.0}).figure("m")
    with pytest.raises(ComparisonError, match="x must be"):
        drawn().figure("m", x="tokens")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"torchprune\[figure\]"):
        drawn().figure("m", tmp_path / "f.png")
    assert not list(tmp_path.iterdir())
