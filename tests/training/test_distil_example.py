"""The example of distillation, on a model that takes seconds."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest


def test_the_example_makes_up_for_some_of_the_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples"))
    importlib.import_module("distil").main(["--tiny"])
    said = capsys.readouterr().out
    dense, pruned, recovered = map(float, re.findall(r"^\w+ +([\d.]+)$", said, re.MULTILINE))
    assert dense < recovered < pruned
    assert "50% of the weights are zero" in said
