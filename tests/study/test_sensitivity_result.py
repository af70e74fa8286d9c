"""What `sensitivity` returns: JSON, tables, heat maps, the page, overrides; units by hand."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import assert_as_it_was, fingerprint
from families import FAMILIES, llama, tokens
from torch import nn

import torchprune
from torchprune import ChannelSpec, HeadSpec, LayerSpec, NeuronSpec, WandaSpec, sensitivity
from torchprune.errors import MissingExtraError
from torchprune.reports.pieces import Bars, Code, Grid, Heat
from torchprune.specs.patterns import prune_count
from torchprune.study.costs import sensitivities
from torchprune.study.costs.costs import Cost, SensitivityError, _short
from torchprune.study.costs.damage import Estimate, estimates
from torchprune.study.costs.kinds import depth_of, kind_of
from torchprune.study.costs.sensitivities import SensitivityResult


def made(levels: tuple[str, ...] = ("0.3", "0.7")) -> SensitivityResult:
    """Four layers in two blocks, and one in none."""
    names = [f"blocks.{at}.{kind}" for at in range(2) for kind in ("up", "down")] + ["out"]
    rows = [
        Cost(
            name,
            name.rpartition(".")[2],
            int(name.split(".")[1]) if "." in name else None,
            level,
            int(float(level) * 100),
            100,
            error=0.1,
            kl=Estimate(0.01 * (place + 1) * float(level), 0.001),
            loss=Estimate(-0.02, None),
        )
        for place, name in enumerate(names)
        for level in levels
    ]
    return SensitivityResult(
        rows, "kl", "weights", "exact", "WandaSpec()", levels, 3.5, 4, ("a note",), "abc"
    )


def test_json_holds_all_of_it():
    found = made()
    again = SensitivityResult.from_json(found.to_json())
    assert list(again.rows) == list(found.rows)
    assert again.to_json() == found.to_json()


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("format"),
        lambda d: d.pop("rows"),
        lambda d: d.update(rows=[{"name": "x"}]),
        lambda d: d["rows"][0].update(zeros="many"),
        lambda d: d["rows"][0].update(error=float("inf")),
        lambda d: d["rows"][0].update(kl=[1, 2]),
        lambda d: d.update(levels="0.5"),
        lambda d: d.update(metric=None),
        lambda d: d.update(extra=1),
    ],
)
def test_damaged_json_is_refused(change):
    data = json.loads(made().to_json())
    change(data)
    with pytest.raises(SensitivityError, match="damaged"):
        SensitivityResult.from_json(json.dumps(data))


def test_kinds_are_sums_and_costs_go_by_sparsity():
    found = made()
    assert found.kinds()["up"]["0.7"] == pytest.approx(0.01 * 0.7 * (1 + 3))
    assert found.costs()["out"] == [(0.3, pytest.approx(0.015)), (0.7, pytest.approx(0.035))]
    assert found.measures == ["kl", "loss", "error"]
    with pytest.raises(SensitivityError, match="nothing was measured as 'predicted'"):
        found.costs("predicted")


def test_a_decimal_stands_for_each_count():
    for total in (1, 3, 7, 64, 576, 1536, 331776):
        for count in {0, 1, total // 3, total // 2, total - 1}:
            assert prune_count(total, _short(count, total)) == count
    assert _short(50, 100) == 0.5


def test_overrides_give_the_dear_layers_less():
    found = made().overrides(0.5, spread=0.2)
    assert sum(prune_count(100, v) for v in found.values()) == 250
    assert found["blocks.0.up"] == max(found.values()) > found["out"] == min(found.values())
    with pytest.raises(SensitivityError, match="there is one"):
        made(("0.3",)).overrides()


def test_the_table_shows_the_dearest_first_and_what_it_leaves_out():
    text = str(made())
    assert text.index("out") < text.index("blocks.1.down") < text.index("blocks.0.up")
    assert "0.035 ± 0.001" in text
    assert text.endswith("a note")
    many = made()
    rows = [Cost(f"layer{i}", "layer", None, "0.3", 1, 2, kl=Estimate(i)) for i in range(50)]
    assert "and 10 that cost less" in str(
        SensitivityResult(rows, "kl", "weights", "exact", "", ("0.3",))
    )
    assert many.layers[0] == "blocks.0.up"


def test_the_page_has_maps_bars_tables_and_overrides():
    found = made()
    page = found.page()
    pieces = [piece for section in page.sections for piece in section.pieces]
    heats = [p for p in pieces if isinstance(p, Heat)]
    assert [h.title for h in heats] == [
        "Kinds by depth at 0.3",
        "Kinds by depth at 0.7",
        "Layers by level",
    ]
    assert heats[1].rows == ["up", "down"]
    assert heats[1].columns == ["0", "1"]
    assert heats[1].values[1][1] == pytest.approx(0.01 * 0.7 * 4)
    (bars,) = (p for p in pieces if isinstance(p, Bars))
    last = bars.bars[-1]
    assert (last.name, last.kind, last.value) == ("out", "out", pytest.approx(0.035))
    assert (last.low, last.high) == (pytest.approx(0.034), pytest.approx(0.036))
    grids = [p for p in pieces if isinstance(p, Grid)]
    assert all(len(row) == len(g.columns) for g in grids for row in g.rows)
    assert all(len(row) == len(g.columns) for g in grids for row in g.raw)
    codes = [p for p in pieces if isinstance(p, Code)]
    assert [c.title for c in codes] == ["50% in all", "60% in all", "70% in all"]
    names: dict[str, Any] = {}
    exec(codes[0].text, names)
    assert names["overrides"] == found.overrides(0.5)
    assert page.warnings == ("a note",)
    assert page.data == json.loads(found.to_json())
    assert json.dumps(page.data)


def test_saving_goes_by_the_suffix(tmp_path, monkeypatch):
    found, pages = made(), list[Any]()
    monkeypatch.setattr(sensitivities, "save_page", lambda page, path: pages.append((page, path)))
    for name in ("a.html", "a.json", "a.svg", "a.png"):
        found.save(tmp_path / name)
    assert pages == [(found.page(), tmp_path / "a.html")]
    assert (tmp_path / "a.json").read_text("utf-8") == found.to_json() + "\n"
    assert (tmp_path / "a.svg").stat().st_size > 2000
    for call in (found.save, found.figure):
        with pytest.raises(SensitivityError, match=r"\.svg"):
            call(tmp_path / "a.txt")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="figure"):
        found.figure()


def test_error_bars_are_of_the_mean():
    found = estimates([{"kl": 1.0}, {"kl": 2.0}, {"kl": 6.0}])["kl"]
    assert found.mean == 3
    assert found.error == pytest.approx((7 / 3) ** 0.5)  # variance 7, of three
    assert estimates([{"kl": 1.0}])["kl"] == Estimate(1.0, None)
    assert estimates([]) == {}


def test_kinds_and_depths_are_read_off_names():
    linear = nn.Linear(1, 1)
    assert kind_of("h.3.attn.c_attn", linear) == "c_attn"
    assert kind_of("layers.0.experts.gate_up_proj", linear) == "gate_up_proj"
    assert kind_of("", linear) == "Linear"
    assert depth_of("h.11.attn.weight", ["h.1", "h.11"]) == 1
    assert depth_of("h.1", ["h.1"]) == 0
    assert depth_of("head.weight", ["h"]) is None


# -- whole units -----------------------------------------------------------------------------------


def loss_of(model: nn.Module, batch: Any) -> float:
    with torch.no_grad():
        return float(model(batch, labels=batch, use_cache=False).loss)


def test_a_block_costs_what_the_model_loses_without_it():
    model, data = llama(num_hidden_layers=3).eval(), tokens(count=2)
    before = fingerprint(model)
    found = sensitivity(model, data, LayerSpec(), mode="exact", progress=False)
    assert_as_it_was(model, before)
    before = fingerprint(model)
    assert [row.name for row in found.rows] == [f"model.layers.{i}" for i in range(3)]
    for at, row in enumerate(found.rows):
        other = copy.deepcopy(model)
        del other.model.layers[at]
        losses = [loss_of(other, b) - loss_of(model, b) for b in data]
        assert row.loss.mean == pytest.approx(sum(losses) / 2, abs=1e-6)
    cheap = sensitivity(model, data, LayerSpec(), progress=False)
    assert cheap.metric == "error"
    assert len(cheap.rows) == 3
    assert_as_it_was(model, before)


def test_a_head_costs_what_the_model_loses_without_it():
    model, data = llama().eval(), tokens(count=2)
    before = fingerprint(model)
    found = sensitivity(model, data, HeadSpec(), mode="exact", progress=False)
    cheap = sensitivity(model, data, HeadSpec(), probes=8, progress=False)
    assert_as_it_was(model, before)
    assert [(row.name, row.level) for row in found.rows] == [
        (f"model.layers.{i}.self_attn", str(unit)) for i in range(2) for unit in range(2)
    ]
    for row in found.rows:
        other = copy.deepcopy(model)
        wide, unit = 16, int(row.level)  # a key-value head and its two queries
        o_proj = other.get_submodule(f"{row.name}.o_proj")
        o_proj.weight.data[:, unit * wide : (unit + 1) * wide] = 0
        losses = [loss_of(other, b) - loss_of(model, b) for b in data]
        assert row.loss.mean == pytest.approx(sum(losses) / 2, abs=1e-6)
    by_kl = [sorted(r, key=lambda row: row.value(m).mean)[-1].name
             for r, m in ((found.rows, "kl"), (cheap.rows, "predicted"))]  # fmt: skip
    assert by_kl[0] == by_kl[1]
    assert all(row.taylor is not None for row in cheap.rows)


def test_heads_by_the_loss_of_a_task():
    family = FAMILIES["bert"]
    model, data = family.make(), family.data(count=2)

    def task(model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(**batch) if isinstance(batch, dict) else model(*batch)
        return next(iter(out.values()))[:, 0, :4].square().mean()

    before = fingerprint(model)
    cheap = sensitivity(model, data, HeadSpec(), loss=task, probes=0, progress=False)
    assert cheap.metric == "taylor"
    exact = sensitivity(
        model, data, HeadSpec(), loss=task, mode="exact", metric="loss", progress=False
    )
    assert_as_it_was(model, before)
    assert len(exact.rows) == len(cheap.rows) == 8
    assert exact.rows[0].loss is not None


@pytest.mark.parametrize(("name", "spec"), [("gpt2", NeuronSpec()), ("resnet", ChannelSpec())])
def test_units_that_score_least_go_at_each_level(name, spec):
    family = FAMILIES[name]
    model, data = family.make(), family.data(count=2)
    before = fingerprint(model)
    found = sensitivity(model, data, spec, levels=(0.25, 0.5), mode="exact", progress=False)
    cheap = sensitivity(model, data, spec, levels=(0.25, 0.5), probes=2, progress=False)
    assert_as_it_was(model, before)
    rows = [(r.name, r.level, r.zeros, r.size) for r in found.rows]
    assert rows == [(r.name, r.level, r.zeros, r.size) for r in cheap.rows]
    assert len({(r.name, r.level) for r in found.rows}) == len(found.rows)
    for quarter, half in zip(found.rows[::2], found.rows[1::2], strict=True):
        assert quarter.zeros <= half.zeros
    assert found.page().title == "Sensitivity"
    with pytest.raises(SensitivityError, match="not for"):
        found.overrides()


def test_a_result_of_one_call_is_shown(tmp_path: Path):
    model, data = llama().eval(), tokens(count=1)
    found = torchprune.sensitivity(
        model, data, WandaSpec(targets="*.mlp.*"), probes=1, progress=False
    )
    assert "model.layers.0.mlp.up_proj" in str(found)
    assert SensitivityResult.from_json(found.to_json()) == found
