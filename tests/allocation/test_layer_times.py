"""A budget of milliseconds: layers measured at a few widths, by a stopwatch that is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchprune
from torchprune import BudgetSpec, ChannelSpec, LayerSpec, NeuronSpec, plan_shrink, shrink
from torchprune.allocation.layer_times import time_of, times_of
from torchprune.allocation.stopwatches import _as_onnx, in_onnx_runtime, in_torch, stopwatches_of
from torchprune.calibration.batches import Batch
from torchprune.reports.report import RunRecord
from torchprune.structure.offers import offers_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.last(x)


def watch(module: nn.Module, inputs: tuple[Any, ...]) -> float:
    """A machine on which each multiplication takes its time, and each norm and call some more."""
    taken = [1.0]

    def ran(module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(module, nn.LayerNorm):
            taken.append(7.0)
        elif isinstance(module, nn.Linear):
            taken.append(1e-2 * out.numel() * module.in_features)
        else:
            taken.append(1e-2 * out.numel() * module.weight[0].numel())

    kinds = (nn.LayerNorm, nn.Linear, nn.Conv2d)
    handles = [m.register_forward_hook(ran) for m in module.modules() if isinstance(m, kinds)]
    try:
        module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sum(taken) - (1.0 if isinstance(module, kinds) else 0.0)


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, 5, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("share", [0.75, 0.4])
def test_the_smaller_model_takes_what_was_asked_for(share: float) -> None:
    model, data = Net().eval(), rows()
    batch = Batch((data[0],), {})
    limit = share * time_of(model, batch, watch)
    spec = BudgetSpec(latency_ms=limit, over=(NeuronSpec(round_to=4), LayerSpec), runtime=watch)
    torchprune.sparsify(model, spec, data, progress=False)
    (told,) = (n for n in torchprune.report(model).notes if "was measured to take" in n)
    shrink(model, plan_shrink(model, data[0]))
    found = time_of(model, batch, watch)
    assert 0.5 * limit < found <= limit
    assert f"{found:.4g} ms" in told


@pytest.mark.parametrize("gone", [(), ("blocks.1",)])
def test_what_is_predicted_is_what_takes_place(gone: tuple[str, ...]) -> None:
    """Where time is a product of widths, interpolation is exact; a block takes its rest along."""
    model, data = Net().eval(), rows()
    batch = Batch((data[0],), {})
    spec = BudgetSpec(latency_ms=1.0, over=(NeuronSpec(round_to=1), LayerSpec), runtime=watch)
    offers = offers_of(model, spec, [batch], RunRecord(spec=spec))
    ledger = times_of(offers, batch, *stopwatches_of(spec))
    groups = offers.groups
    account = ledger.of(
        [torch.arange(g.count) for g in groups], [torch.tensor([0, 5]) for _ in groups]
    )
    account.open([0] * len(groups), gone)
    whole = account.total
    for name in gone:
        del model.blocks[int(name[-1])]
    assert whole == pytest.approx(time_of(model, batch, watch), abs=1.0)
    at = next(i for i, g in enumerate(groups) if g.name == "blocks.0")
    account.go(at, 1)
    assert whole - account.total == pytest.approx(1e-2 * 40 * 5 * (8 + 8))


def test_convolutions_are_made_narrower_in_both_axes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    ).eval()
    batch = Batch((torch.randn(2, 3, 6, 6),), {})
    spec = BudgetSpec(latency_ms=1.0, over=ChannelSpec(round_to=1), runtime=watch)
    offers = offers_of(model, spec, [batch], RunRecord(spec=spec))
    ledger = times_of(offers, batch, *stopwatches_of(spec))
    (group,) = offers.groups
    account = ledger.of([torch.arange(8)], [torch.arange(8)])
    account.open([0], ())
    assert account.total == pytest.approx(time_of(model, batch, watch))
    account.go(0, 2)
    assert group.count == 8
    each = 1e-2 * 2 * (36 * 27 + 16 * 9 + 16 * 4)  # of a channel, in the three of them
    assert time_of(model, batch, watch) - account.total == pytest.approx(2 * each)


def test_convolutions_with_groups_are_made_with_narrower_ones() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 1, groups=2), nn.Conv2d(32, 4, 1)
    ).eval()
    batch, made = Batch((torch.randn(2, 3, 6, 6),), {}), set[tuple[int, int]]()

    def noting(module: nn.Module, inputs: tuple[Any, ...]) -> float:
        if isinstance(module, nn.Conv2d) and module.in_channels != 3 and module.out_channels != 4:
            made.add((module.out_channels, module.groups))
        return watch(module, inputs)

    spec = BudgetSpec(latency_ms=1.0, over=ChannelSpec(round_to=1), runtime=noting)
    offers = offers_of(model, spec, [batch], RunRecord(spec=spec))
    ledger = times_of(offers, batch, *stopwatches_of(spec))
    assert made == {(8, 2), (16, 2), (24, 2), (32, 2)}
    first, second = offers.groups
    assert (first.count, second.count) == (8, 16)
    account = ledger.of([torch.arange(8), torch.arange(16)], [torch.tensor([0, 4])] * 2)
    account.open([0, 0], ())
    assert account.total == pytest.approx(time_of(model, batch, watch))
    account.go(0, 1)
    account.go(1, 1)
    small = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 24, 1, groups=2), nn.Conv2d(24, 4, 1)
    )
    assert account.total == pytest.approx(time_of(small, batch, watch))


LAYERS = [
    (nn.Linear(6, 5), (2, 3, 6)),
    (nn.Linear(6, 5, bias=False), (4, 6)),
    (nn.Conv1d(4, 6, 3, padding=2, dilation=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), bias=False), (2, 4, 9, 8)),
    (nn.Conv2d(4, 4, (3, 5), padding="same", groups=4), (2, 4, 9, 8)),
    (nn.Conv3d(2, 3, 2, padding="valid"), (1, 2, 4, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_layer_in_onnx_runtime_computes_what_it_does_in_torch(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x = torch.randn(*shape)
    session = onnxruntime.InferenceSession(_as_onnx(layer, x), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), layer(x), atol=1e-5)
    assert in_onnx_runtime(layer, (x,)) > 0
    assert in_torch(layer, (x,)) > 0
