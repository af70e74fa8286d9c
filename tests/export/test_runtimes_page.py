"""The page of families in runtimes: a number or a sentence in each cell, and a sample is true."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from families import FAMILIES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # while exporting, of third parties


@pytest.fixture(scope="module")
def runtimes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("runtimes", ROOT / "tools" / "runtimes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_cell_is_a_number_or_a_sentence(runtimes):
    rows = runtimes.read_page(runtimes.PAGE.read_text("utf-8"))
    assert {dtype for _, dtype in rows} == set(runtimes.DTYPES)
    assert len(rows) == len({name for name, _ in rows}) * len(runtimes.DTYPES)
    assert {name for name, _ in rows} == set(FAMILIES)
    for cells in rows.values():
        assert set(cells) == set(runtimes.EXPORTERS)
        for said in cells.values():
            assert runtimes.is_number(said) or len(said.split()) > 5


@pytest.mark.parametrize(
    ("dtype", "to"),
    [
        (torch.float32, "to_pt2"),
        (torch.float16, "to_onnx"),
        (torch.bfloat16, "to_onnx"),
        (torch.bfloat16, "to_pt2"),
    ],
    ids=str,
)
def test_a_sample_says_the_same(runtimes, dtype, to):
    told = runtimes.read_page(runtimes.PAGE.read_text("utf-8"))["mlp", dtype][to]
    found = runtimes.cell("mlp", dtype, to)
    assert runtimes.is_number(found) is runtimes.is_number(told)
    assert found == told or float(found) < 3e-2


def test_a_page_is_read_as_it_was_written(runtimes):
    said = ["1e-07", "no: `a_b` | *c*", "no way", "0e+00", "r1: said", "2e-03"]
    rows = {
        ("mlp", dtype): dict(zip(runtimes.EXPORTERS, said, strict=False))
        for dtype in runtimes.DTYPES
    }
    assert runtimes.read_page(runtimes.page(rows)) == rows
