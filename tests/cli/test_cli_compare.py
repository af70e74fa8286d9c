"""`torchprune compare`: the table, its files, what it refuses, and going on after Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, call, complaint, make_home, worked

import torchprune
from torchprune import MagnitudeSpec, NeuronSpec, SparseGPTSpec, WandaSpec
from torchprune.cli.spec_texts import made, parsed
from torchprune.specs.quantize import Int4
from torchprune.study.tasks import evaluation


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("compare"))


def comparing(home: Path, *more: object) -> tuple[object, ...]:
    text = ("--text", home / "text.txt", "--data", home / "text.txt", "--seqlen", "16")
    return ("compare", home / "model", *text, *SMALL, *more)


MANY = ("--spec", "magnitude", "--spec", "wanda,pattern=2:4", "--spec", "neurons,sparsity=0.25")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("wanda", WandaSpec()),
        ("wanda,pattern=2:4,refine=swaps", WandaSpec(pattern="2:4", refine="swaps")),
        ("magnitude, sparsity=0.25", MagnitudeSpec(0.25)),
        ("neurons,sparsity=0.25,refit=false", NeuronSpec(0.25, refit=False)),
        ("layers,drop=2", torchprune.LayerSpec(drop=2)),
        ("budget,parameters=0.7", torchprune.BudgetSpec(parameters=0.7)),
        (
            "budget,flops=0.5,over=neurons+layers",
            torchprune.BudgetSpec(flops=0.5, over=(torchprune.NeuronSpec, torchprune.LayerSpec)),
        ),
        ("sparsegpt,quantize=int4", SparseGPTSpec(quantize=Int4())),
        ("best,effort=fast", torchprune.BestSpec(effort="fast")),
        ("wanda,pattern=2:4,permute", WandaSpec(pattern="2:4", permute=True)),
    ],
)
def test_a_line_is_a_spec(text, spec):
    assert made(*parsed(text)) == spec


def test_compare_shows_a_row_for_each_and_keeps_them(home, tmp_path):
    out = tmp_path / "comparison.json"
    said = worked(*comparing(home, *MANY, "--output", out, "--draws", "2"))
    for label in ("dense", *MANY[1::2]):
        assert f"{label} " in said
    found = torchprune.Comparison.from_json(out.read_text("utf-8"))
    assert found.labels == list(MANY[1::2])
    assert {row.draw for row in found.rows} == {"seed 0", "seed 1"}
    assert all(row.error is None for row in found.rows)
    one = worked("eval", home / "model", "--text", home / "text.txt", "--seqlen", "16", "--json")
    assert found.dense == {"perplexity": json.loads(one)["perplexity"]}
    assert "torchprune compare" in (tmp_path / "comparison.run.toml").read_text("utf-8")


def test_its_rows_are_what_prune_and_eval_give(home, tmp_path):
    out = tmp_path / "pruned"
    worked("prune", home / "model", "--data", home / "text.txt", *SMALL, "--output", out)
    text = ("--text", home / "text.txt", "--seqlen", "16", "--json")
    alone = json.loads(worked("eval", out, *text))["perplexity"]
    result = call(*comparing(home, "--spec", "wanda", "--json"))
    (row,) = json.loads(result.stdout)["rows"]
    assert row["metrics"] == {"perplexity": alone}


@pytest.mark.parametrize("form", ["md", "svg"])
def test_other_forms(home, tmp_path, form):
    out = tmp_path / f"comparison.{form}"
    worked(*comparing(home, "--spec", "magnitude", "--output", out))
    assert out.stat().st_size > 50
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {out.name, "comparison.json", "comparison.run.toml"}


def test_after_ctrl_c_only_the_rest_is_run(home, tmp_path, monkeypatch):
    out = ("--output", tmp_path / "c.json")
    real, measured = evaluation.perplexity, list[int]()

    def perplexity(*some: Any, **more: Any) -> Any:
        measured.append(1)
        if len(measured) == 3:  # the dense model, one spec, and now the second
            raise KeyboardInterrupt  # as Ctrl-C does; pytest-xdist ignores the signal
        return real(*some, **more)

    monkeypatch.setattr(evaluation, "perplexity", perplexity)
    result = call(*comparing(home, *MANY, *out))
    last = f"error: interrupted; --resume goes on from {out[1]}\n"
    assert (result.exit_code, result.stderr) == (130, last)
    assert "by --resume" in complaint(*comparing(home, *MANY, *out))
    said = complaint(*comparing(home, *MANY, *out, "--resume", "--seqlen", "8"))
    assert "is of --seqlen 16, and not 8" in said
    worked(*comparing(home, *MANY, *out, "--resume"))
    assert len(measured) == 5  # the second again, and the third
    monkeypatch.undo()
    worked(*comparing(home, *MANY, "--output", tmp_path / "whole.json"))
    rows = [json.loads((tmp_path / f).read_text("utf-8"))["rows"] for f in ("c.json", "whole.json")]
    assert rows[0] != rows[1]  # seconds
    for row in (*rows[0], *rows[1]):
        del row["seconds"]
    assert rows[0] == rows[1]


def test_specs_in_a_file_may_be_tables(home, tmp_path):
    (tmp_path / "study.toml").write_text(
        '[compare]\nspec = ["magnitude", {method = "wanda", pattern = "2:4", permute = true}]\n',
        "utf-8",
    )
    found = call(*comparing(home, "--config", tmp_path / "study.toml", "--json"))
    labels = [row["label"] for row in json.loads(found.stdout)["rows"]]
    assert labels == ["magnitude", "wanda,pattern=2:4,permute=true"]


def test_a_spec_that_fails_is_a_row_and_all_failing_is_an_error(home):
    bad = ("--spec", "wanda,pattern=2:5")
    said = worked(*comparing(home, *bad, "--spec", "magnitude"))
    assert "failed: SpecError" in said
    assert call(*comparing(home, *bad)).exit_code == 1


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--spec", "wandaa"), 2, "layers, budget (did you mean 'wanda'?"),
        (("--spec", "wanda,=2"), 2, "is not NAME=VALUE"),
        (("--spec", "wanda", "--spec", "wanda"), 2, "is given twice"),
        (("--spec", "wanda,sparsity=0.5,sparsity=0.6"), 2, "gives sparsity twice"),
        (("--spec", "wanda", "--resume"), 2, "nothing is kept without --output"),
        (("--spec", "wanda,sparsty=0.5"), 1, "has no option 'sparsty' (did you mean 'sparsity'"),
        (("--spec", "wanda", "--output", "c.csv"), 1, "is saved as one of .json, .html, .md"),
        (("--spec", "wanda", "--data", "absent.txt"), 1, "no such file"),
    ],
)
def test_what_is_wrong_is_one_line(home, tmp_path, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    assert message in complaint(*comparing(home, *options), code=code)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_could_be_run_an_error_says_so(home):
    said = complaint(*comparing(home, "--spec", "magnitude,targets=nosuch"))
    assert said == "error: no --spec could be run; each line above says why"
