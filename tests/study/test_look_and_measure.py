"""examples/look_and_measure.py: three results on one page."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "look_and_measure.py"


def test_answers_speed_and_zeros_are_on_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("look_and_measure", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before = torch.get_rng_state()
    script.main(["--output", str(tmp_path)])
    torch.set_rng_state(before)
    assert "accuracy" in capsys.readouterr().out
    html = (tmp_path / "page.html").read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found is not None
    assert len(json.loads(found[1])) == 3
    assert len(html) < 1_500_000
