"""Layers with so many inputs that their second moment is too large to collect."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import torchprune
from torchprune import ChannelSpec, NeuronSpec, SparseGPTSpec, WandaSpec
from torchprune.calibration import moments, room
from torchprune.errors import CalibrationError


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv1d(1, 24, 9, padding=4),
        nn.ReLU(),
        nn.Conv1d(24, 6, 5, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 40, 5),
    )


def test_channels_are_refitted_on_rows_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.randn(4, 1, 40) for _ in range(4)]
    found = {}
    for widest in (100, 1_000):  # the second convolution reads 120 inputs, the linear layer 240
        monkeypatch.setattr(moments, "WIDEST", widest)
        model = torchprune.sparsify(net(), ChannelSpec(0.5, round_to=1), batches, progress=False)
        found[widest] = {y.name: y.error for y in torchprune.report(model).layers}, model
    by_rows, by_gram = found[100], found[1_000]
    for name, error in by_gram[0].items():
        assert by_rows[0][name] == (error and pytest.approx(error, rel=1e-3, abs=1e-6)), name
    x = torch.randn(3, 1, 40)
    torch.testing.assert_close(by_rows[1](x), by_gram[1](x), rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(moments, "WIDEST", 100)
    cut = ChannelSpec(0.5, round_to=1, refit=False)
    plain = torchprune.sparsify(net(), cut, batches, progress=False)
    dense, given = net(), torch.cat(batches)
    assert _off(by_rows[1], dense, given) < 0.7 * _off(plain, dense, given)


def _off(model: nn.Module, dense: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - dense(x)).square().sum())


def test_few_rows_stand_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "WIDEST", 100)
    monkeypatch.setattr(moments, "WIDE_ROWS", 64)
    batches = [torch.randn(4, 1, 40) for _ in range(8)]
    dense = net()
    fitted, cut = (
        torchprune.sparsify(
            copy.deepcopy(dense), ChannelSpec(0.5, refit=refit), batches, progress=False
        )
        for refit in (True, False)
    )
    given = torch.cat(batches)
    assert _off(fitted, dense, given) < _off(cut, dense, given)


@pytest.mark.parametrize("spec", [SparseGPTSpec(0.5), NeuronSpec(0.5)], ids=lambda s: s.method)
def test_what_does_not_fit_into_memory_is_refused(spec: Any, monkeypatch: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(room, "available", lambda device: 30_000)
    with pytest.raises(CalibrationError, match=r"^2: .* GB of memory are free on cpu: leave this"):
        torchprune.sparsify(model, spec, [torch.randn(4, 8)], progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torchprune.sparsify(model, WandaSpec(0.5), [torch.randn(4, 8)], progress=False)


def test_memory_is_told_where_it_can_be() -> None:
    there = room.available(torch.device("cpu"))
    assert there is None or there > 1 << 20
    assert room.available(torch.device("meta")) is None
