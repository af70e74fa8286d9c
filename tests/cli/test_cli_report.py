"""`torchprune report`: the page of a saved model, alone and beside the dense one."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path

import pytest
from commands import SMALL, call, complaint, make_home, worked

import torchprune
from torchprune.cli.report_page import READERS, lying_in
from torchprune.errors import InputError
from torchprune.study.comparison_rows import Row
from torchprune.study.results import Comparison


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model, and one pruned from it."""
    home = make_home(tmp_path_factory.mktemp("report"))
    pruned = ("--pattern", "2:4", "--data", home / "text.txt", "--output", home / "pruned")
    worked("prune", home / "model", *pruned, "--quiet", *SMALL)
    return home


def data_of(path: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    assert found is not None
    return json.loads(found[1])


def test_the_page_of_a_directory_lies_in_it(home):
    said = worked("report", home / "pruned")
    path = home / "pruned" / "report.html"
    assert said.splitlines()[-1].startswith(f"wrote {path} (")
    expected = torchprune.report(torchprune.load(home / "pruned"))
    assert data_of(path)["total"] == expected.to_dict()["total"]
    page = path.read_text("utf-8")
    assert "Pruning report: pruned" in page
    assert f"torchprune prune {home / 'model'}" in page
    assert "--pattern 2:4" in page
    assert f"torchprune report {home / 'pruned'}" in page
    path.unlink()


def test_dense_and_pruned_are_measured_and_read_side_by_side(home, tmp_path):
    out, text = tmp_path / "page.html", home / "text.txt"
    worked(
        *("report", home / "pruned", "--dense", home / "model", "--text", text),
        *("--seqlen", 16, "--windows", 5, "--prompt", "w1 w2", "--prompt", "w<3>"),
        *("--tokens", 4, "--output", out),
    )
    data = data_of(out)
    assert list(data) == ["Pruning report: pruned", "Perplexity", "Greedy continuations"]
    shown = html.unescape(re.sub(r"</?(pre|code)[^>]*>", "\n", out.read_text("utf-8")))
    (again,) = [line for line in shown.splitlines() if line.startswith("torchprune report")]
    words = shlex.split(again)
    for pair in (["--seqlen", "16"], ["--windows", "5"], ["--tokens", "4"], ["--prompt", "w<3>"]):
        assert words[words.index(pair[1]) - 1] == pair[0]
    quality = data["Perplexity"]
    assert (quality["windows"], quality["seqlen"], quality["text"]) == (5, 16, "text.txt")
    ids = json.loads(
        worked("eval", home / "pruned", "--text", text, "--seqlen", 16, "--windows", 5, "--json")
    )
    mean = sum(quality["nats_per_token"]["pruned"]) / 5
    assert mean == pytest.approx(ids["nats_per_token"], abs=1e-6)
    spread = quality["perplexity"]["pruned"]
    assert spread["low"] < spread["value"] < spread["high"]
    assert [p["prompt"] for p in data["Greedy continuations"]["pairs"]] == ["w1 w2", "w<3>"]
    assert all(len(p["dense"].split()) == 4 for p in data["Greedy continuations"]["pairs"])


def test_json_is_printed_and_a_file_written_only_if_named(home, tmp_path):
    data = json.loads(worked("report", home / "pruned", "--json"))
    assert data["total"]["sparsity"] == 0.5
    assert not (home / "pruned" / "report.html").exists()
    worked("report", home / "pruned", "--quiet", "--output", tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == data
    worked("report", home / "pruned", "--quiet", "--output", tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().count("<path") > 20


def test_results_that_lie_beside_are_on_the_page(home):
    row = Row(
        "wanda",
        "wanda",
        "",
        "2:4",
        "",
        "WandaSpec()",
        sparsity=0.5,
        share=0.4,
        metrics={"perplexity": 9.0},
        seconds=1.0,
    )
    path = home / "pruned" / "comparison.json"
    path.write_text(Comparison([row], {"perplexity": 8.0}).to_json(), "utf-8")
    (page,) = lying_in(home / "pruned")
    assert page.title == "Comparison"
    data = json.loads(worked("report", home / "pruned", "--json"))
    assert data["Comparison"]["dense"] == {"perplexity": 8.0}
    path.write_text("{", "utf-8")
    assert "comparison.json: not JSON" in complaint("report", home / "pruned")
    with pytest.raises(InputError):
        lying_in(home / "pruned")
    path.unlink()


def test_every_reader_is_there():
    from importlib import import_module

    for module, kind in READERS.values():
        assert callable(getattr(import_module(module), kind).from_json)


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        (["{home}/nowhere"], "no such directory", 1),
        (["{home}/model"], "holds no manifest.json", 1),
        (["{home}/pruned", "--output", "x.docx"], "saved as one of .html, .json", 1),
        (["{home}/pruned", "--prompt", "a"], "--prompt needs --dense", 2),
        (["{home}/pruned", "--text", "{home}/no.txt"], "no.txt", 1),
        (["{home}/pruned", "--dense", "{home}/no"], "no", 1),
    ],
)
def test_mistakes_are_one_line(home, tmp_path, monkeypatch, arguments, told, code):
    monkeypatch.chdir(tmp_path)
    line = complaint("report", *(a.format(home=home) for a in arguments), code=code)
    assert told in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [31, 32, 40])
def test_texts_end_where_the_context_does(home, tmp_path, count):
    """A model with a table of positions fails beyond them; this tiny one holds 32 tokens."""
    words = " ".join(f"w{i}" for i in range(count))
    asked = ("report", home / "pruned", "--dense", home / "model", "--prompt", words)
    page = ("--output", tmp_path / "r.html")
    if count < 32:
        worked(*asked, *page)
    else:
        said = complaint_of(*asked, *page)
        assert f"a prompt of {count} tokens leaves no room in the model's context of 32" in said


def complaint_of(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 1
    return result.stderr
