"""benchmarks/lowering/gpu.py, as far as it goes without a GPU."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchprune.lowering.kernels.launching import Tiles


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "lowering"))
    return importlib.import_module("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where no GPU is")
def test_it_says_that_it_needs_a_device(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


def test_contenders_multiply_by_their_weights_and_take_turns(benchmark: Any) -> None:
    ways, weights = benchmark.contenders((24, 70), [0.5, 0.7], "cpu", 2)
    zeros = [float((weight == 0).float().mean()) for weight in weights.values()]
    assert zeros[0] < 0.01
    assert zeros[1:] == pytest.approx([0.5, 0.5, 0.7, 0.7], abs=0.06)
    x = torch.randn(3, 70).bfloat16()
    for name, products in ways.items():
        assert len(products) == 2
        for product in products:
            assert benchmark.error_of(product(x), x, weights[name]) < 1e-2, name
    order = []

    def clock(products: Sequence[Any], x: Tensor) -> float:
        name = next(name for name, some in ways.items() if some is products)
        order.append(name)
        if name == "bitmask int8 70%":
            raise RuntimeError("does not run\nat all")
        return time.perf_counter()

    medians, failed = benchmark.turns(ways, x, 2, clock)
    assert set(medians) == set(ways) - {"bitmask int8 70%"}
    assert failed == {"bitmask int8 70%": "RuntimeError: does not run"}
    assert order[:5] == list(ways)
    assert len(order) == 5 + 4 * 4


def test_its_checks_see_a_wrong_product(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(benchmark.checks("cpu").values()) < 8
    right = benchmark.multiply
    monkeypatch.setattr(benchmark, "multiply", lambda it, x: right(it, x) * 1.1)
    assert max(benchmark.checks("cpu").values()) > 8


def test_weights_outgrow_the_cache(benchmark: Any) -> None:
    assert benchmark.copies(1 << 20) == 200
    assert benchmark.copies(1 << 30) == 4


def test_tiles_to_try_fit_the_rows_of_input(benchmark: Any) -> None:
    for rows in (1, 2, 4, 16, 17, 32):
        tried = benchmark.candidates(rows)
        assert all(tiles.batch >= min(rows, 16) or not blocks for blocks, tiles in tried)
        assert any(not blocks for blocks, _ in tried) == (rows <= 4)
    assert (True, Tiles(16, 4, 4, 32, 4)) in benchmark.candidates(17)


def test_the_report_has_what_there_is(benchmark: Any, tmp_path: Path) -> None:
    rows = [
        {"rows": 1, "microseconds": {"cuBLAS": 9.0, "bitmask": 6.0, "2:4": 90.0}},
        {"rows": 16, "microseconds": {"cuBLAS": 10.0, "bitmask": 8.0}},
    ]
    tuned = {"16x4 4 warps": 5.0, "chosen": 6.0, "16x2 2 warps": 7.0}
    found = {
        "device": "a device",
        "runs_on": "Triton",
        "wrong": ["2:4 at 16 rows: no"],
        "medians": [{"shape": (64, 32), "rows": rows}],
        "tuning": [{"shape": (64, 32), "rows": 1, "microseconds": tuned, "failed": {}}],
        "composed": {"differences": {"captured": 0.0}, "cudagraph_skips": 0},
    }
    text = benchmark.written(tmp_path / "out", found)
    assert "64x32, microseconds (times cuBLAS):" in text
    assert "| | 1 row | 16 rows |" in text
    assert "| bitmask | 6.0 (1.50) | 8.0 (1.25) |" in text
    assert "| 2:4 | 90.0 (0.10) | - |" in text
    assert "| 64x32 | 1 | 6.0 | 16x4 4 warps 5.0, 16x2 2 warps 7.0 |" in text
    assert "FAILED: 2:4 at 16 rows: no" in text
    assert (tmp_path / "out" / "gpu.md").read_text() == text
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["device"] == "a device"
    early = {"device": "a device", "runs_on": "Triton", "wrong": []}
    assert benchmark.written(None, early).startswith("a device, torch ")
