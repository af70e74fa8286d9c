"""examples/sensitivity.py, and the arithmetic of benchmarks/study/sensitivity.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from torchprune.study.costs.costs import Cost
from torchprune.study.costs.damage import Estimate
from torchprune.study.costs.sensitivities import SensitivityResult

ROOT = Path(__file__).resolve().parents[2]


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script as a module; two of them have one name."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(path.replace("/", "_")[:-3], ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs_and_goes_on(monkeypatch, tmp_path, capsys):
    example = script("examples/sensitivity.py", monkeypatch)
    example.main(["--output", str(tmp_path)])
    first = capsys.readouterr().out
    assert "model.layers.1.mlp.up_proj" in first
    written = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert set(written) == {"sensitivity.json", "sensitivity.svg"}
    example.main(["--output", str(tmp_path)])
    assert capsys.readouterr().out == first
    assert (tmp_path / "sensitivity.json").stat().st_mtime_ns == written["sensitivity.json"]


def test_ranks_are_compared_and_not_values(monkeypatch):
    bench = script("benchmarks/study/sensitivity.py", monkeypatch)
    assert bench.ranks([3.0, 1.0, 3.0, 9.0]).tolist() == [1.5, 0.0, 1.5, 3.0]
    assert bench.spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert bench.spearman([1, 2, 3], [9, 5, 2]) == pytest.approx(-1)
    rows = [
        Cost(f"{kind}{at}", kind, at, "0.5", 1, 2, 1, at + 1.0, -at - 1.0, at + 2.0, None,
             Estimate(at + 0.5), Estimate(at + 1.0))
        for kind in "ab" for at in range(3)
    ]  # fmt: skip
    found = SensitivityResult(rows, "kl", "weights", "exact", "", ("0.5",))
    lines = bench.rank_table(found, found).splitlines()
    assert lines[2] == "| 0.5 | predicted | 1.000 | 1.000 | 1.000 |"
    assert lines[4] == "| 0.5 | squared | -1.000 | -1.000 | -1.000 |"
