"""What layers read may be written in place between them, also where nothing counts the writes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchprune
from torchprune import SparseGPTSpec, WandaSpec
from torchprune.specs.spec import Spec


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.a(h)
        h.mul_(torch.arange(16.0))  # the tensor that `a` read, and other numbers
        return y + self.b(h)


class Inside(Between):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("spec", [WandaSpec(), SparseGPTSpec(damping=0.1)], ids=str)
@pytest.mark.parametrize(
    ("kind", "mode"),
    [(Between, torch.inference_mode), (Inside, contextlib.nullcontext)],
    ids=["around", "inside"],
)
def test_inference_mode_hides_no_write(kind: type[nn.Module], mode: Any, spec: Spec) -> None:
    data = list(torch.randn(3, 40, 16))
    plain, other = Between(), kind()
    other.load_state_dict(plain.state_dict())
    torchprune.sparsify(plain, spec, data, progress=False)
    with mode():
        torchprune.sparsify(other, spec, data, progress=False)
    found = torchprune.masks(other)
    for name, mask in torchprune.masks(plain).items():
        assert torch.equal(found[name], mask), name
