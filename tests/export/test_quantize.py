"""Quantization by torchao on top of pruning: zeros stay zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from torch import nn

import torchprune
from torchprune import MagnitudeSpec

torchao = pytest.importorskip("torchao", reason="the extra quant is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own


def configs() -> dict[str, Any]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    return {
        "weight-only": Int8WeightOnlyConfig(),
        "dynamic": Int8DynamicActivationInt8WeightConfig(),
    }


@pytest.mark.parametrize("config", ["weight-only", "dynamic"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_stay_exactly_zero_and_outputs_close(config: str, pattern: str) -> None:
    from torchao.quantization import quantize_

    model = torchprune.sparsify(
        FAMILIES["llama"].make(), MagnitudeSpec(pattern=pattern), progress=False
    ).eval()
    masks = {name: mask.clone() for name, mask in torchprune.masks(model).items()}
    torchprune.fold(model)
    batch = tokens()[0]
    with torch.no_grad():
        expected = model(batch).logits
    quantize_(model, configs()[config])
    with torch.no_grad():
        found = model(batch).logits
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < 0.05
    for name, mask in masks.items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        assert type(weight.data) is not torch.Tensor or type(weight) is not nn.Parameter
        dense = weight.dequantize()
        assert not dense[~mask].any(), name
        assert dense[mask].any(), name


def test_a_quantized_layer_is_left_by_the_next_step() -> None:
    from torchao.quantization import quantize_

    model = torchprune.fold(
        torchprune.sparsify(FAMILIES["llama"].make(), MagnitudeSpec(), progress=False)
    )
    quantize_(model, configs()["weight-only"])
    plan = torchprune.plan_lowering(model, "bitmask")
    assert not plan.layers
    assert any("holds no plain dense values" in why or "int8" in why for why in plan.left.values())
