"""The benchmark of recovery: its table, and that it goes on where it was."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recovery(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("benchmarks/training", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.delitem(sys.modules, "recovery", raising=False)
    return importlib.import_module("recovery")


def test_the_page_shows_the_table_of_the_recorded_runs(recovery: Any) -> None:
    rows = json.loads((ROOT / "benchmarks" / "training" / "recovery.json").read_text("utf-8"))
    assert recovery.table(rows) in (ROOT / "docs" / "results" / "recovery.md").read_text("utf-8")


def test_r_is_the_share_of_the_loss_that_is_left(recovery: Any) -> None:
    dense = {"goal": "dense", "method": "", "minutes": 0.0, "Wikipedia": 19.27, "news": 30.66}
    base = dict(zip(("Wikipedia", "news"), recovery.SPARSEGPT["2:4"], strict=True))
    half = {name: (dense[name] + value) / 2 for name, value in base.items()}
    run = {"goal": "2:4", "method": "x", "minutes": 3.0, "note": "on 1,234 tokens in 3", **half}
    *_, row = recovery.table([dense, run]).splitlines()
    assert row.startswith("| 2:4 | x | 3 | 1,234 |")
    assert row.count("| 0.50") == 2


def test_every_method_is_one_that_recover_takes(recovery: Any) -> None:
    import inspect

    import torchprune

    known = inspect.signature(torchprune.recover).parameters
    assert all(set(options) <= set(known) for options in recovery.METHODS.values())
