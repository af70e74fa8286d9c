"""Adapters merged into masked weights: what is kept takes the change, the zeros stay."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec


class Adapted(nn.Module):
    """A low-rank adapter that merges as peft's do: through `.data`, and back."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(3, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ (self.up @ self.down).T

    def merge(self, *, safely: bool, sign: float = 1.0) -> None:
        delta = sign * (self.up @ self.down).detach()
        if safely:
            merged = self.base.weight.data.clone()
            merged += delta
            self.base.weight.data = merged
        else:
            self.base.weight.data += delta


@pytest.mark.parametrize("safely", [False, True])
def test_a_merge_reaches_kept_weights_only(safely: bool) -> None:
    torch.manual_seed(0)
    base = torchprune.sparsify(nn.Linear(12, 8), MagnitudeSpec(), progress=False)
    mask, before = torchprune.masks(base)["weight"], base.weight.detach().clone()
    adapted = Adapted(base)
    optimizer = torch.optim.AdamW([adapted.down, adapted.up], lr=0.1)
    adapted(torch.randn(5, 12)).square().sum().backward()
    optimizer.step()
    adapted.merge(safely=safely)
    expected = before + (adapted.up @ adapted.down).detach()
    assert torch.equal(base.weight, torch.where(mask, expected, 0))
    adapted.merge(safely=safely, sign=-1.0)
    torch.testing.assert_close(base.weight.detach(), before)
    assert torch.equal(base.weight == 0, ~mask)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
def test_pefts_own_merge() -> None:
    import peft

    torch.manual_seed(0)
    model: Any = FAMILIES["llama"].make().eval()
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    masks = torchprune.masks(model)
    before = {k: model.get_submodule(k[:-7]).weight.detach().clone() for k in masks}
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    ids = tokens()[0]
    adapted(input_ids=ids, labels=ids).loss.backward()
    deltas = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in adapted.named_modules()
        if name.endswith("q_proj")
    }
    merged = adapted.merge_and_unload()
    assert deltas
    for key, mask in masks.items():
        weight = merged.get_submodule(key[:-7]).weight
        assert torch.equal(weight, torch.where(mask, before[key] + deltas.get(key[:-7], 0), 0))
