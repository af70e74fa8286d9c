"""What an export says that zeros brought: measured, and not what one would like."""

from __future__ import annotations

import copy
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import sample
from torch import nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.export import to_aoti, to_coreml, to_executorch, to_onnx, to_openvino, to_pt2
from torchprune.study.speed.file_gains import file_gains, without_zeros

pytestmark = pytest.mark.filterwarnings("ignore")  # while exporting, of third parties


def net() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64))
    return torchprune.sparsify(made, MagnitudeSpec(0.5), progress=False)


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "onnx": (to_onnx, "m.onnx", {"weights": "packed"}),
    "pt2": (to_pt2, "m.pt2", {"weights": "packed"}),
    "pt2, dense": (to_pt2, "m.pt2", {"weights": "dense"}),
    "aoti": (to_aoti, "m.pt2", {"weights": "packed"}),
    "openvino": (to_openvino, "m.xml", {}),
    "executorch": (to_executorch, "m.pte", {}),
}
SKIPPING = {"pt2": 2, "aoti": 2}
"""Layers whose zeros are left out."""


@pytest.mark.parametrize("name", sample(CASES, "onnx", "pt2", "openvino", "executorch"))
def test_each_target_tells_bytes_times_and_kernels(name: str, tmp_path: Path) -> None:
    write, file, options = CASES[name]
    model, x = net(), torch.randn(3, 96)
    before = copy.deepcopy(model.state_dict())
    report = write(model, tmp_path / file, x, **options)
    found = file_gains(write, model, report, x, seconds=0.01, **options)
    assert found.bytes == report.bytes
    smaller = found.bytes < 0.75 * found.dense_bytes
    # of so small a package the kernels beside it are the larger part
    assert smaller == (options.get("weights") == "packed" and name != "aoti")
    assert found.latency is not None
    assert found.ratio is not None
    assert found.latency.median > 0
    if name == "executorch":
        assert found.kernels is None
    else:
        assert found.kernels is not None
        assert found.kernels.count > 1
        assert len(found.kernels.sparse) == SKIPPING.get(name, 0)
    told = str(found)
    assert f"{found.bytes:,} instead of {found.dense_bytes:,}" in told
    assert "ms a call instead of" in told
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_what_runs_elsewhere_is_not_timed(tmp_path: Path) -> None:
    model, x = net(), torch.randn(3, 96)
    report = to_coreml(model, tmp_path / "m.mlpackage", x, weights="packed")
    found = file_gains(to_coreml, model, report, x, weights="packed")
    assert found.latency is None
    assert "time: not measured: Core ML runs on Apple's systems alone" in str(found)
    assert found.bytes < 0.7 * found.dense_bytes


def test_what_is_within_the_noise_is_called_so(tmp_path: Path) -> None:
    model, x = net(), torch.randn(3, 96)
    report = to_pt2(model, tmp_path / "m.pt2", x)
    ticks = count()
    found = file_gains(to_pt2, model, report, x, seconds=0.01, clock=lambda: float(next(ticks)))
    assert "that may be noise" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_other_side_has_no_zeros_and_the_same_other_weights(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    full, folded = without_zeros(model), torchprune.fold(copy.deepcopy(model))
    for (name, filled), weight in zip(full.named_parameters(), folded.parameters(), strict=True):
        if weight.dim() == 2:
            assert int((filled == 0).sum()) == 0, name
            assert torch.equal(filled[weight != 0], weight[weight != 0])
            spread = filled[weight == 0].detach().std() / weight[weight != 0].detach().std()
            assert 0.5 < float(spread) < 2
        else:
            assert torch.equal(filled, weight)
    empty = nn.Linear(8, 8)
    nn.init.zeros_(empty.weight)
    assert bool(without_zeros(empty).weight.all())
