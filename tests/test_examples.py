"""The short examples run at their tiny size, and every example is known to somebody.

The longer ones, which are studies as well, are run by tests beside what they show.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
START = ROOT / "docs" / "start.md"
SAYS = {
    "prune_texts": "stock transformers computes the same logits",
    "own_batches": "dense again, parametrizations gone",
    "own_method": "my solver",
    "smaller_model": "parameters, the masked model's outputs",
    "lower_and_decode": "lifted: the folded weights, bit for bit: True",
    "compiler_passes": "compiled: the masked module's outputs",
    "prune_and_quantize": "one after the other",
    "export_onnx": "both give the pruned net's outputs",
}
"""What a script prints when it comes to its end."""

HELPERS = {"calm", "decoding", "deployed", "small_llama", "smollm2"}
LONGER = {
    "demo": "make demo: a table of all that ships",
    "compare_methods": "takes models and texts by name",
    "cnn_channels": "by hand and level by level",
    "from_scratch": "compares ten ways",
    "lora": "checks every step of the way to a stock model",
    "tickets": "a study, with its figure",
    "trainer": "stops and goes on",
}
"""Scripts of more than 80 lines, and why."""

SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in HELPERS)


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The examples import each other; what they write goes nowhere."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    yield
    for name in (*SAYS, "small_llama", "decoding"):  # another test may mean others
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SAYS)
def test_a_short_example_runs(name: str, on_path: None, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(name).main(["--tiny"])
    assert SAYS[name] in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_short_and_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    told = ast.get_docstring(ast.parse(text)) or ""
    assert re.match(r".+[.:]", told.splitlines()[0])
    assert re.search(rf"(python|pytest) examples/{name}\.py", told)
    assert (text.count("\n") <= 80) == (name not in LONGER), f"{name}: {text.count(chr(10))} lines"


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_run_by_a_test_and_named_on_the_page(name: str) -> None:
    assert f"`examples/{name}.py`" in START.read_text("utf-8"), "add its row to docs/start.md"
    tests = [p.read_text("utf-8") for p in (ROOT / "tests").rglob("test_*.py")]
    assert any(re.search(rf"\b{name}\b", text) for text in tests)


def test_the_page_names_no_example_that_is_not_there() -> None:
    named = re.findall(r"`examples/(\w+)\.py`", START.read_text("utf-8"))
    assert sorted(named) == SCRIPTS
