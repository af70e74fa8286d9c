"""The arithmetic of benchmarks/methods/quality.py, whose table docs/results shows."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchprune.study.comparison_rows import Row
from torchprune.study.results import Comparison

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("benchmarks/methods", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    yield importlib.import_module("quality")
    for name in ("effort", "quality", "prune", "peer"):  # another test may mean others by them
        sys.modules.pop(name, None)


def row(label: str, draw: str, wikipedia: float, news: float, seconds: float = 1.0) -> Row:
    metrics = {"Wikipedia": wikipedia, "news": news}
    return Row(label, "", "", "", draw, "", metrics=metrics, seconds=seconds)


def test_the_base_is_the_better_sparsegpt_of_each_draw_and_text(quality):
    found = Comparison(
        (
            row("SparseGPT | 2:4", "0", 24.0, 50.0),
            row("SparseGPT of llm-compressor | 2:4", "0", 32.0, 40.0),
            row("SparseGPT | 2:4", "1", 26.0, 70.0),
            row("ADMM | 2:4", "0", 20.0, 30.0, seconds=9.0),
            row("ADMM | 2:4", "1", 21.0, 30.0, seconds=7.0),
        ),
        {"Wikipedia": 16.0, "news": 20.0},
    )
    # Wikipedia: (4/8 + 5/10) / 2; news: (10/20 + 10/50) / 2. The peer ran on draw 0 alone.
    lines = quality.table(found).splitlines()
    assert lines[2] == "| dense | | 16.00 | 4.000 | 0 | 20.00 | 4.322 | 0 | | |"
    assert lines[-1].startswith("| ADMM | 2:4 | 20.50 | 4.357 | 0.50 | 30.00 | 4.907 | 0.35 | 2 |")
    assert lines[-1].endswith(" 7 |")
    assert (
        "| SparseGPT of llm-compressor | 2:4 | 32.00 | 5.000 | 2.00 | 40.00 | 5.322 | 1.00 |"
        in (lines[4])
    )


def test_a_run_that_failed_is_no_base(quality):
    failed = Row("SparseGPT | 2:4", "", "", "", "0", "", error="MemoryError")
    peer = row("SparseGPT of llm-compressor | 2:4", "0", 24.0, 50.0)
    rows = (failed, peer, row("ADMM | 2:4", "0", 20.0, 35.0))
    lines = quality.table(Comparison(rows, {"Wikipedia": 16.0, "news": 20.0})).splitlines()
    assert lines[-1] == "| ADMM | 2:4 | 20.00 | 4.322 | 0.50 | 35.00 | 5.129 | 0.50 | 1 | 1 |"


def test_costs_are_compared_round_by_round(quality):
    effort = importlib.import_module("effort")
    runs = {"SparseGPT": [1.0, 2.0, 4.0], "ADMM": [4.0, 2.0, 4.0]}
    assert effort.table({"2:4": runs}).splitlines()[2:] == [
        "| SparseGPT | 2:4 | 2.0 | 1.00 |",
        "| ADMM | 2:4 | 4.0 | 1.00 |",  # of medians it would be 2
    ]


def test_the_runs_on_a_gpu_are_of_specs_the_benchmark_has(quality):
    text = (ROOT / "benchmarks" / "methods" / "quality_cuda.json").read_text("utf-8")
    for found in Comparison.from_json(text).rows:
        name, goal = found.label.split(" | ")
        assert found.spec == repr(quality.specs(quality.GOALS[goal])[name])


def test_methods_can_be_asked_for_by_goal(quality):
    assert "best and permuted" in quality.specs({"pattern": "2:4"})
    assert {"ADMM, owl", "ADMM, error"} <= quality.specs({"sparsity": 0.5}).keys()


def test_the_peer_runs_once_for_each_draw_and_also_where_ours_failed(
    quality, monkeypatch, tmp_path
):
    failed = Row("SparseGPT | 2:4", "", "2:4", "", "1", "", error="MemoryError")
    found = Comparison((row("SparseGPT | 2:4", "0", 24.0, 50.0), failed), {"Wikipedia": 16.0})
    asked = []

    def run(command: list[str], threads: int) -> Any:
        asked.append(json.loads(command[-1]))
        text = {"Wikipedia": 20.0 + len(asked), "news": 40.0}
        return quality_peer.Result(1.0, 2.0, 0, 0, 1, 2, 0, text, {})

    quality_peer = importlib.import_module("peer")
    monkeypatch.setattr(quality, "run", run)
    monkeypatch.setattr(quality, "peer_python", lambda: Path("python"))
    monkeypatch.setattr(quality.smollm2, "model_directory", lambda: tmp_path)
    draws = {name: [torch.arange(4).view(1, 4)] for name in "01"}
    texts = {"Wikipedia": torch.arange(9), "news": torch.arange(8)}
    options = argparse.Namespace(output=None, length=4)
    both = quality.with_peer(found, options, draws, texts, tmp_path)
    assert [job["pattern"] for job in asked] == ["2:4", "2:4"]
    peers = [y for y in both.rows if y.label == "SparseGPT of llm-compressor | 2:4"]
    assert [(y.draw, y.metrics["Wikipedia"], y.error) for y in peers] == [
        ("0", 21.0, None),
        ("1", 22.0, None),
    ]
