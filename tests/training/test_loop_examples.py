"""The examples of training loops run."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("name", ["plain_loop", "trainer"])
def test_an_example_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert importlib.import_module(name).main(["--tiny"]) == 0
    said = capsys.readouterr().out
    assert "sparsity" in said
    assert name != "trainer" or "the same bits: True" in said
