"""Compiled models see masks change without compiling again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchprune
from torchprune import MagnitudeSpec, Pruner, WandaSpec
from torchprune.masking.mask import masked_layers, original_of
from torchprune.training import SET, Constant, Cubic, MagnitudeRegrowth, RigL, StraightThrough

KINDS: dict[str, dict[str, Any]] = {
    "gradual": {"spec": MagnitudeSpec(0.8), "schedule": Cubic(0.0, 0.8, 2, 9, 2)},
    "data": {
        "spec": WandaSpec(0.8),
        "schedule": Cubic(0.0, 0.8, 2, 9, 2),
        "data": [torch.randn(8, 16) for _ in range(2)],
    },
    "rigl": {
        "spec": MagnitudeSpec(pattern="2:4"),
        "schedule": Constant(0.5, end=9, every=2),
        "regrow": RigL(),
    },
    "set": {
        "spec": MagnitudeSpec(0.8),
        "schedule": Constant(0.8, start=1, end=9, every=2),
        "regrow": SET(),
    },
    "back": {
        "spec": MagnitudeSpec(0.8),
        "schedule": Cubic(0.0, 0.8, 2, 9, 2),
        "regrow": MagnitudeRegrowth(),
    },
    "straight": {
        "spec": MagnitudeSpec(pattern="2:4"),
        "schedule": Constant(0.5),
        "regrow": StraightThrough(),
    },
}


@pytest.mark.parametrize("order", ["compiled first", "pruner first", "in place"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_change_without_compiling_again(kind: str, order: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    run: Any = model
    if order == "compiled first":
        run = torch.compile(model, backend="aot_eager")
    elif order == "in place":
        model.compile(backend="aot_eager")
    pruner = Pruner(run, **KINDS[kind])
    if order == "pruner first":
        run = torch.compile(model, backend="aot_eager")
    changes = 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(12):
            run(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            changes += pruner.step(optimizer)
            for layer, mask in masked_layers(model):
                gone = ~mask.mask
                assert bool((getattr(layer.module, layer.tensor)[gone] == 0).all())
                if kind != "straight":
                    assert bool((original_of(layer.module, layer.tensor)[gone] == 0).all())
    assert changes >= 3
    x = torch.randn(8, 16)
    with torch.no_grad():
        assert torch.allclose(run(x), torchprune.fold(model)(x), atol=1e-6)
