"""The example that learns zeros from scratch, at its smallest."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest


def test_all_ways_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples"))
    monkeypatch.setattr(sys, "argv", ["from_scratch.py", "--tiny"])
    importlib.import_module("from_scratch").main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    for name, zeros in (("2:4 gradual", "50.00%"), ("95 % SR-STE", "95.00%"), ("dense", "0.00%")):
        row = next(line for line in lines if line.startswith(name))
        assert row.endswith(zeros)
