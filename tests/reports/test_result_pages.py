"""What results put on their pages: counts, sizes, reasons, curves, and how to do it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import torchprune
from torchprune.reports.layer_report import LayerReport, by_block
from torchprune.reports.page import page_html
from torchprune.reports.pieces import Bars, Grid, Heat, Lines, Page, Pair, Pairs, Prose
from torchprune.reports.spec_calls import spec_call
from torchprune.reports.wording import PageError
from torchprune.study.comparison_rows import ComparisonError, Row
from torchprune.study.results import Comparison
from torchprune.study.tasks.text_quality import mean_of, quality_page
from torchprune.training.level_history import History, LevelRow


class Blocks(nn.Module):
    """Three blocks of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return x


@pytest.fixture
def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = Blocks()
    spec = torchprune.WandaSpec(pattern="2:4", ignore="*.1.down", overrides={"*.0.up": "dense"})
    torchprune.sparsify(model, spec, [torch.randn(20, 16)], progress=False)
    return model


def pieces_of(page: Page, kind: type) -> list:
    return [
        piece for section in page.sections for piece in section.pieces if isinstance(piece, kind)
    ]


def test_the_page_of_a_report_holds_what_the_report_knows(pruned):
    report = torchprune.report(pruned)
    page = report.page()
    assert page.title == "Pruning report: Blocks"
    assert page.data["layers"] == report.to_dict()["layers"]
    assert page.command == (
        "torchprune.sparsify(model, torchprune.WandaSpec(pattern='2:4', ignore='*.1.down', "
        "overrides={'*.0.up': 'dense'}), batches)"
    )
    facts = {fact.label: (fact.value, fact.note) for fact in page.facts}
    assert facts["zeros"] == ("50.00 %", "1,024 of 2,048 weights in 4 layers")
    # half of 2048 float32 values, and a bit for each weight
    assert report.layers[0].kept_bytes * 4 == 1024 * 4 + 2048 // 8
    assert facts["size"][0] == "4.35 kB"
    assert "8.19 kB dense" in facts["size"][1]
    error, share = pieces_of(page, Bars)
    assert [bar.value for bar in error.bars] == [layer.error for layer in report.layers]
    assert [bar.kind for bar in error.bars] == ["down", "up", "up", "down"]
    assert {bar.value for bar in share.bars} == {50.0}
    (heat,) = pieces_of(page, Heat)
    assert heat.rows == ["layers.0", "layers.1", "layers.2"]
    assert sum(value is None for row in heat.values for value in row) == 2
    dense = next(g for g in pieces_of(page, Grid) if g.title == "Without a mask")
    assert {which for *_, which in dense.rows} == {"layers.1.down", "layers.0.up"}
    assert {int(row[1] or 0) for row in dense.raw} == {1}
    assert {row[2] for row in dense.raw} == {512}


def test_a_dense_model_has_a_page_too():
    page = torchprune.report(nn.Linear(4, 4)).page()
    assert page.lead == "No layer of the model has a mask: all its weights are dense."
    assert "Without a mask" in page_html(page)


def test_a_report_is_saved_as_page_data_and_figure(pruned, tmp_path: Path):
    report = torchprune.report(pruned)
    for name in ("r.html", "r.json", "r.pdf", "r.png", "r.svg"):
        report.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    assert json.loads((tmp_path / "r.json").read_text())["model"] == "Blocks"
    beside = quality_page({"dense": [1.0, 1.2], "pruned": [1.5, 1.6]}, seqlen=8, text="a text")
    report.save(tmp_path / "all.html", beside, Pairs("Both", [Pair("a", "b", "c")]))
    html = (tmp_path / "all.html").read_text("utf-8")
    assert "On the same windows pruned needs 0.4500 nats per token more than dense" in html
    with pytest.raises(PageError, match="nothing to draw"):
        torchprune.report(nn.Linear(4, 4)).save(tmp_path / "none.svg")


def test_bytes_are_those_of_the_dtype():
    for dtype, each in (("float32", 4), ("bfloat16", 2), ("float64", 8), ("int8", 1)):
        layer = LayerReport("a", (3, 3), dtype, "m", "p", 4, 9, None, None, "")
        assert layer.dense_bytes == 9 * each
        assert layer.kept_bytes == 5 * each + 2  # nine bits are two bytes


def test_a_heat_map_needs_blocks_and_kinds():
    assert by_block({"a": 1.0, "b": 2.0}) is None
    assert by_block({"h.0.a": 1.0, "h.0.b": 2.0}) is None
    assert by_block({"h.0.a": 1.0, "h.1.a": 2.0}) is None
    experts = {f"h.{i}.experts.{j}.up": 1.0 for i in range(2) for j in range(3)}
    found = by_block(experts)
    assert found is not None
    assert found[:2] == (["h.0", "h.1"], [f"experts.{j}.up" for j in range(3)])


@pytest.mark.parametrize(
    "spec",
    [
        torchprune.MagnitudeSpec(),
        torchprune.WandaSpec(sparsity=0.7, scope="layer", refine="swaps"),
        torchprune.SparseGPTSpec(pattern="block:4x4", sparsity=0.6),
        torchprune.BestSpec(pattern="4:8", effort="fast"),
        torchprune.RIASpec(sparsity=0.3, allocation="owl", overrides={"*.q": ("2:4", None)}),
        torchprune.ChannelSpec(0.25),
        torchprune.LayerSpec(drop=2),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_the_call_makes_the_same_spec_again(spec):
    assert eval(spec_call(spec), {"torchprune": torchprune}) == spec


def comparison() -> Comparison:
    def row(label: str, pattern: str, draw: str, sparsity: float, value: float) -> Row:
        method = label.split()[0]
        metrics = {"perplexity": value}
        return Row(
            label, method, "", pattern, draw, "spec", "data", sparsity, 0.8 * sparsity, metrics, 1.0
        )

    rows = [
        row("wanda 50%", "unstructured", "a", 0.5, 20.0),
        row("wanda 50%", "unstructured", "b", 0.5, 22.0),
        row("wanda 70%", "unstructured", "a", 0.7, 60.0),
        row("sparsegpt 2:4", "2:4", "a", 0.5, 18.0),
        Row("bad 90%", "bad", "", "unstructured", "a", "spec", error="it broke"),
    ]
    return Comparison(rows, {"perplexity": 12.0})


def test_the_page_of_a_comparison(tmp_path: Path):
    page = comparison().page()
    (lines,) = pieces_of(page, Lines)
    assert [(line.name, line.joined) for line in lines.lines] == [
        ("wanda unstructured", True),
        ("sparsegpt 2:4", False),
    ]
    first = lines.lines[0].spots[0]
    assert (first.x, first.y, first.low, first.high) == (0.5, 21.0, 20.0, 22.0)
    assert (lines.level, lines.logarithmic, lines.percent) == (12.0, True, True)
    (bars,) = pieces_of(page, Bars)
    assert [bar.name for bar in bars.bars] == ["dense", "wanda 50%", "wanda 70%", "sparsegpt 2:4"]
    damage, table = pieces_of(page, Grid)
    assert "wanda 50%" in damage.title
    assert [row[0] for row in damage.raw] == ["wanda 50%", "wanda 70%", "sparsegpt 2:4"]
    assert damage.raw[2][1] == pytest.approx(6 / 8)
    assert len(table.rows) == 5
    assert page.warnings == ["bad 90% a failed: it broke"]
    assert Comparison.from_json(json.dumps(page.data)) == Comparison.from_json(
        comparison().to_json()
    )
    for name in ("c.html", "c.json", "c.svg"):
        comparison().save(tmp_path / name)
    assert Comparison.from_json((tmp_path / "c.json").read_text()).labels == comparison().labels
    with pytest.raises(ComparisonError, match="no row is labelled"):
        comparison().page(baseline="other")
    page_html(Comparison([], None).page())


def test_the_page_of_a_history(tmp_path: Path):
    rows = [
        LevelRow("dense", 0.0, 0.0, {"accuracy": 0.9}, 0.0, 1.0, 1.0, True, False),
        LevelRow("0.5", 0.5, 0.4, {"accuracy": 0.89}, 0.1, 1.0, 1.0, True, True),
        LevelRow("0.9", 0.9, 0.7, {"accuracy": float("nan")}, 0.1, 1.0, 1.0, False, False),
    ]
    history = History(rows, "accuracy")
    page = history.page()
    (lines,) = pieces_of(page, Lines)
    assert [spot.x for spot in lines.lines[0].spots] == [0.5, 0.9]
    assert lines.level == 0.9
    assert page.warnings == ["outside the tolerance: level 0.9"]
    for name in ("h.html", "h.svg", "h.json", "h"):
        history.save(tmp_path / name)
    assert "Pruning level by level" in (tmp_path / "h.html").read_text("utf-8")
    assert str(History.load(tmp_path / "h")) == str(history)


def test_the_interval_of_perplexity_is_of_the_mean_over_windows():
    losses = [1.0, 1.2, 0.8, 1.4]
    mean = mean_of(losses)
    error = torch.tensor(losses, dtype=torch.float64).std() / 2
    assert mean.value == pytest.approx(1.1)
    assert mean.high - mean.value == pytest.approx(1.96 * float(error))
    page = quality_page({"dense": losses, "pruned": [x + 0.01 for x in losses]}, seqlen=8, text="t")
    (told,) = pieces_of(page, Prose)
    assert "0.0100 nats per token more" in told.text
    assert "no difference" not in told.text  # paired: the windows' own spread does not hide it
    page = quality_page({"dense": [1.0, 2.0], "pruned": [2.0, 1.0]}, seqlen=8, text="t")
    assert "no difference" in pieces_of(page, Prose)[0].text
