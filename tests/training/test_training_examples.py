"""The examples of pruning level by level and of tickets run, made small."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


def test_tickets_are_searched_for_and_drawn(example, tmp_path, capsys):
    found = example("tickets").main(["--tiny", "--output", str(tmp_path)])
    assert [one.asked for one in found.rounds] == ["0.5", "0.75"]
    assert "lead on reinit" in capsys.readouterr().out
    drawn = (tmp_path / "tickets.svg").read_text("utf-8")
    assert drawn.count("<text") > 8
    assert "prefers-color-scheme: dark" in drawn
    assert len(drawn) < 30_000


def test_a_cnn_loses_channels_and_stays_a_cnn(example, tmp_path, capsys):
    history = example("cnn_channels").main(["--tiny", "--path", str(tmp_path / "run")])
    assert history.rows[0].asked == "dense"
    said = capsys.readouterr().out
    assert "half of the channels" in said
    assert "masked" in said
    last = said.strip().splitlines()[-1]
    masked, removed = last.split("accuracy ")[1].split(" masked, ")
    assert masked == removed.removesuffix(" removed")
