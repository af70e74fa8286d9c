"""Everything that the documentation shows runs: the README, docstrings, the examples.

Where they ask for a pretrained model they get a tiny random one, so that no network is needed.
"""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_lm import ARTICLES, save_tiny_lm
from typer.testing import CliRunner

import torchprune
from torchprune.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MODULES = sorted(
    {"torchprune"}
    | {m.name for m in pkgutil.walk_packages(torchprune.__path__, "torchprune.")}
    | {f"torchprune.export.{m.name}" for m in pkgutil.iter_modules([str(ROOT / "export")])}
)
SCRIPTS = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*/*.py")])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_lm(directory, context=512)
    return directory


@pytest.fixture
def stand_ins(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny model for every name on the hub and for SmolLM2; an empty working directory."""

    def from_pretrained(kind: Any) -> Any:
        real = kind.from_pretrained

        def load(name: Any, *args: Any, **kwargs: Any) -> Any:
            return real(name if Path(name).is_dir() else tiny, *args, **kwargs)

        return load

    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained(kind))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    smollm2 = importlib.import_module("smollm2")
    monkeypatch.setattr(smollm2, "model_directory", lambda: tiny)
    for name in ("wikipedia_articles", "news_articles"):
        monkeypatch.setattr(smollm2, name, lambda *_: ARTICLES * 20)
    monkeypatch.chdir(tmp_path)
    for name in ("notes.txt", "held-out.txt"):
        (tmp_path / name).write_text("\n\n".join(ARTICLES * 20), "utf-8")
    return monkeypatch


def test_the_readme_runs(stand_ins):
    """Its python blocks, in order, in one namespace: a later one may use an earlier one's names."""
    if not README.exists():
        pytest.skip("there is no README.md")
    text = README.read_text("utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks, "README.md shows no python"
    names: dict[str, Any] = {"__name__": "readme"}
    for block in blocks:
        lines_before = text.count("\n", 0, block.start(1))
        code = compile("\n" * lines_before + block[1], str(README), "exec")
        exec(code, names)


def test_the_commands_of_the_readme_run(stand_ins):
    if not README.exists():
        pytest.skip("there is no README.md")
    commands = re.findall(r"^torchprune (.*)$", README.read_text("utf-8"), re.MULTILINE)
    assert commands
    for command in commands:
        result = CliRunner().invoke(app, shlex.split(command, comments=True))
        assert result.exit_code == 0, f"torchprune {command}\n{result.output}"


def test_the_readme_shows_the_table_of_the_quality_benchmark():
    lines = (ROOT / "benchmarks" / "methods" / "quality.md").read_text("utf-8").splitlines()
    table = "\n".join(line for line in lines if line.startswith("|"))
    assert table.count("\n") > 4
    assert f"\n\n{table}\n\n" in README.read_text("utf-8")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_there_are_docstring_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = map(importlib.import_module, MODULES)
    found = sum(len(test.examples) for m in modules for test in finder.find(m, m.__name__))
    assert found > 5


def test_the_wheel_has_every_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    named = set(project["tool"]["setuptools"]["packages"])
    found = {
        m.name for m in pkgutil.walk_packages(torchprune.__path__, "torchprune.") if m.ispkg
    } | {"torchprune", "torchprune.export"}
    assert named == found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_compile(script):
    compile(script.read_text("utf-8"), str(script), "exec")


@pytest.fixture
def demo(stand_ins: pytest.MonkeyPatch) -> Any:
    """The demo, made small."""
    module = importlib.import_module("demo")
    stand_ins.setattr(module, "LENGTH", 16)
    for name in ("SHORT", "FULL"):
        stand_ins.setattr(module, name, module.Size(3, 4, 2, getattr(module, name).goals))
    return module


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
def test_the_demo_runs(demo, tmp_path, capsys, full):
    options = ["--full"] * full
    assert demo.main([*options, "--artifacts", str(tmp_path / "artifacts")]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    record = json.loads((tmp_path / "artifacts" / "demo.json").read_text("utf-8"))
    dense, *rows = record["rows"]
    assert (dense["method"], dense["relative"], dense["identical"]) == ("dense", 1.0, None)
    *masked, shrunk = rows
    goals = [(row["method"], row["pattern"]) for row in masked]
    assert goals == list((demo.FULL if full else demo.SHORT).goals)
    assert len(goals) == (8 if full else 3)
    assert all(row["sparsity"] == 0.5 and row["identical"] for row in masked)
    assert shrunk["pattern"] == "neurons 20 %"
    assert shrunk["identical"]
    assert 0 < record["shrunk_flops"] < 1
    assert shrunk["megabytes"] < dense["megabytes"]
    assert record["transformers_logits_equal"] is True
    assert [form["name"] for form in record["forms"]] == [
        "dense",
        "folded",
        "bitmask",
        "ONNX packed",
    ]
    assert all(form["tokens_per_second"] > 0 for form in record["forms"])
    table = (tmp_path / "artifacts" / "demo.md").read_text("utf-8")
    assert table.count("| equal |") == len(rows)
    if not full:
        again = demo.main(["--artifacts", str(tmp_path / "artifacts")])  # over the earlier ones
        assert again == 0


def test_the_demo_shows_each_row_as_soon_as_it_is_known(demo, tmp_path, monkeypatch, capsys):
    """And then fails, since what is reloaded differs."""
    load, shown = torchprune.load, list[int]()

    def damaged(directory: Path) -> Any:
        shown.append(len(re.findall(r"^(?:dense|wanda|sparsegpt|best|flap)\b.*%", told(), re.M)))
        model = load(directory)
        model.get_submodule("model.norm").weight.data[0] += 1
        return model

    def told() -> str:
        so_far.append(capsys.readouterr().out)
        return "".join(so_far)

    so_far = list[str]()
    monkeypatch.setattr(torchprune, "load", damaged)
    assert demo.main(["--artifacts", str(tmp_path / "artifacts")]) == 1
    assert shown[:4] == [1, 2, 3, 4]  # each model is loaded to complete its own row
    assert "wanda unstructured: reloaded perplexity differs" in capsys.readouterr().err


def test_the_comparison_runs_and_goes_on(stand_ins, tmp_path, capsys):
    example = importlib.import_module("compare_methods")
    stand_ins.setattr(example, "SPECS", dict(list(example.SPECS.items())[3:6]))  # to sparsegpt 70%
    assert "sparsegpt 50%" in example.SPECS
    example.main(["--draws", "1"])
    first, made = capsys.readouterr().out, tmp_path / "comparison"
    assert "dense" in first
    assert "failed" not in first
    written = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert set(written) == {"comparison.json", "comparison.md", "comparison.svg"}
    example.main(["--draws", "1"])
    assert capsys.readouterr().out == first
    assert (made / "comparison.json").stat().st_mtime_ns == written["comparison.json"]


def test_the_comparison_of_a_named_model_runs(stand_ins, tmp_path, capsys):
    example = importlib.import_module("compare_methods")
    stand_ins.setattr(example, "SPECS", {"sparsegpt 50%": torchprune.SparseGPTSpec()})
    with pytest.raises(SystemExit):
        example.main(["--model", "SomeOne/SomeModel"])
    given = ["--model", "SomeOne/SomeModel", "--data", "notes.txt", "--text", "held-out.txt"]
    example.main([*given, "--samples", "4", "--length", "16", "--output", str(tmp_path / "named")])
    said = capsys.readouterr().out
    assert "failed" not in said
    assert "sparsegpt 50%: 1" in said
    assert (tmp_path / "named" / "comparison.svg").stat().st_size > 2000
