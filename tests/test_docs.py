"""Everything that the documentation shows runs: all pages, docstrings, the examples.

Where they ask for a pretrained model they get a tiny random one, so that no network is needed.
"""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import shlex
import shutil
import sys
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
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]
RESULTS = [p for p in PAGES if p.parent.name == "results" and p.name != "README.md"]
MODULES = sorted(
    {"torchprune"}
    | {m.name for m in pkgutil.walk_packages(torchprune.__path__, "torchprune.")}
    | {f"torchprune.export.{m.name}" for m in pkgutil.iter_modules([str(ROOT / "export")])}
)
SCRIPTS = sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*/*.py")])


NEEDS = {"torchprune.lowering.kernels.triton_bitmask": "triton"}
"""Modules that are imported only where something is installed."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_lm(directory, context=128)
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
    shutil.copytree(ROOT / "tests" / "study" / "tasks", tmp_path / "tasks")
    for name in ("notes.txt", "held-out.txt"):
        (tmp_path / name).write_text("\n\n".join(ARTICLES * 20), "utf-8")
    return monkeypatch


def blocks_of(page: Path) -> dict[int, str]:
    """The page's Python by the line before it; what is marked, as ```python peer, is others'."""
    text = page.read_text("utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return {text.count("\n", 0, block.start(1)): block[1] for block in found}


def commands_of(page: Path) -> list[str]:
    return re.findall(r"^torchprune (.*)$", page.read_text("utf-8"), re.MULTILINE)


def tables_of(page: Path) -> list[str]:
    return re.findall(r"(?:^\|.*\n)+", page.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=name_of)
def test_the_python_of_a_page_runs(page, stand_ins):
    """In order, in one namespace: a later block may use an earlier one's names."""
    names: dict[str, Any] = {"__name__": "page"}
    for line, block in blocks_of(page).items():
        exec(compile("\n" * line + block, str(page), "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if commands_of(p)], ids=name_of)
def test_the_commands_of_a_page_run(page, stand_ins):
    for command in commands_of(page):
        result = CliRunner().invoke(app, shlex.split(command, comments=True))
        assert result.exit_code == 0, f"torchprune {command}\n{result.output}"


def test_the_first_page_is_short_and_begins_with_the_two_commands():
    text = README.read_text("utf-8")
    assert text.count("\n") <= 200
    first = re.search(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert first is not None
    assert [line.split("  ")[0] for line in first[1].splitlines()] == ["make demo", "make test"]
    assert "from_pretrained" in next(iter(blocks_of(README).values()))


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL | re.M)


def anchors_of(page: Path) -> set[str]:
    """What a heading is called in a link: lower case, without punctuation, spaces as hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"\w+:", link):
            continue
        where, _, anchor = link.partition("#")
        target = (page.parent / where).resolve() if where else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert target.is_relative_to(ROOT), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors_of(target), f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"\b(?:benchmarks|examples|tests|torchprune|export)/[\w/]+\.\w+", page.read_text("utf-8")
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_is_reached_from_the_first():
    seen, ahead = set(), [README]
    while ahead:
        page = ahead.pop()
        if page not in seen:
            seen.add(page)
            links = re.findall(r"\]\(([^)\s#]+\.md)", page.read_text("utf-8"))
            ahead += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert set(PAGES) <= seen


def test_every_table_with_numbers_of_the_first_page_has_its_page():
    """The very same table, on a page of docs/results."""
    tables = [table for table in tables_of(README) if re.search(r"\d", table)]
    assert tables
    pages = {path: tables_of(path) for path in RESULTS}
    for table in tables:
        assert any(table in found for found in pages.values()), table


@pytest.mark.parametrize("page", RESULTS, ids=name_of)
def test_a_page_of_results_says_where_when_and_how(page):
    text = page.read_text("utf-8")
    assert re.search(r"^- Machine: .+$", text, re.MULTILINE)
    assert re.search(r"^- Date: 20\d\d-\d\d-\d\d", text, re.MULTILINE)
    assert re.search(r"^- Command: .+$", text, re.MULTILINE)


def test_every_benchmark_has_a_page():
    told = "".join(page.read_text("utf-8") for page in (ROOT / "docs" / "results").glob("*.md"))
    scripts = {path.relative_to(ROOT) for path in ROOT.glob("benchmarks/*/*.py")}
    assert scripts - {Path("benchmarks/methods/peer.py")} == {  # which prune.py and quality.py run
        path for path in scripts if str(path) in told
    }


def test_the_page_of_quality_shows_the_table_of_the_benchmark():
    recorded, *_ = tables_of(ROOT / "benchmarks" / "methods" / "quality.md")
    assert recorded.count("\n") > 4
    assert recorded in tables_of(ROOT / "docs" / "results" / "quality.md")


def test_the_picture_and_the_table_of_the_first_page_are_of_the_recorded_runs(
    stand_ins, tmp_path, capsys
):
    stand_ins.syspath_prepend(str(ROOT / "benchmarks" / "methods"))
    drawn = tmp_path / "quality.svg"
    importlib.import_module("quality_figure").main(["--output", str(drawn)])
    for name in ("quality_figure", "quality", "prune", "peer"):  # another test may mean others
        sys.modules.pop(name, None)
    assert capsys.readouterr().out in tables_of(README)
    assert drawn.read_bytes() == (ROOT / "docs" / "quality.svg").read_bytes()
    assert drawn.stat().st_size < 10_000


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_there_are_docstring_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = map(importlib.import_module, [name for name in MODULES if name not in NEEDS])
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


@pytest.mark.parametrize(
    "full", [False, pytest.param(True, marks=pytest.mark.sweep)], ids=["short", "full"]
)
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
