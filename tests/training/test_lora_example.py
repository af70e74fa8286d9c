"""The example of LoRA through peft, at its tiny size."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest


def test_the_lora_example_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    example = importlib.import_module("lora")
    try:
        example.main(["--tiny", "--output", str(tmp_path / "merged")])
    finally:
        sys.modules.pop("lora", None)
    said = capsys.readouterr().out
    pruned, merged = (float(number) for number in re.findall(r"perplexity +([\d.]+)", said))
    assert merged < pruned
    assert "the same logits, 2:4 in every projection" in said
    assert (tmp_path / "merged" / "model.safetensors").exists()
