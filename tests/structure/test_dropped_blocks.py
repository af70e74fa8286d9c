"""Whole blocks are masked with all in them that multiplies, whether a module tells of it or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from structures import close, outputs
from torch import Tensor, nn

import torchprune
from torchprune import LayerSpec, plan_shrink, shrink
from torchprune.errors import ShrinkError

WIDTH, EXPERTS = 8, 3


class Raw(nn.Module):
    """Raw matrices alone, with a raw bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.shift = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear((self.norm(x) @ self.up).relu(), self.down, self.shift)


class Batched(Raw):
    """Experts in one product, as Llama4's, beside layers that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.norm(x))
        each = torch.bmm(self.norm(x).flatten(0, 1).expand(EXPERTS, -1, -1), self.experts)
        return x + each.sum(0).view_as(x)


class Spread(Raw):
    """A convolution that spreads its input, which is no target by default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x).mT).mT


class Divided(Raw):
    """Numbers of two axes that may not be zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shares = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(2, WIDTH) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x)) / self.shares[0]


class Stubborn(Raw):
    """What multiplies here does not say so by its number of axes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.ParameterList([nn.Parameter(torch.randn(WIDTH))])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.norm(x) * self.scale[0]


def net(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(kind()) for _ in range(3)), nn.Linear(WIDTH, WIDTH))


KINDS: dict[Callable[[], nn.Module], set[str]] = {
    Raw: {"up", "down", "shift"},
    Batched: {"first.weight", "first.bias", "experts", "up", "down", "shift"},
    Spread: {"conv.weight", "conv.bias", "up", "down", "shift"},
    Divided: {"inner.weight", "inner.bias"},
}


@pytest.mark.parametrize("targets", [None, "1"])
@pytest.mark.parametrize("score", ["cosine", "loss"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_goes_with_its_raw_parameters(kind: Any, score: Any, targets: str | None) -> None:
    model, x = net(kind), torch.randn(2, 5, WIDTH)
    loss = {"loss": lambda m, b: m(*b).square().mean()} if score == "loss" else {}
    spec = LayerSpec(1, score=score, targets=targets, **loss)
    torchprune.sparsify(model, spec, [x], progress=False)
    masks, masked = torchprune.masks(model), outputs(model, x)
    (block,) = {name.split(".")[0] for name in masks}
    assert targets in (None, block)
    assert set(masks) == {f"{block}.0.{name}" for name in KINDS[kind]}
    assert not any(mask.any() for mask in masks.values())
    plan = plan_shrink(model, x)
    assert plan.blocks == [block]
    small = shrink(model, plan)
    assert len(small) == 3
    assert close(outputs(small, x), masked, 1e-6)


def test_a_block_that_goes_on_changing_its_input_is_refused() -> None:
    model = net(Stubborn)
    with pytest.raises(ShrinkError, match="would not hand on its input"):
        torchprune.sparsify(model, LayerSpec(1), [torch.randn(2, 5, WIDTH)], progress=False)


def test_llama4s_experts_go_with_their_block() -> None:
    from zoo import build

    built = build("llama4_text")
    data = built.data()
    torchprune.sparsify(built.model, LayerSpec(1), data, progress=False)
    dense = {k for k, p in built.model.named_parameters() if "experts.gate_up_proj" in k}
    assert (
        sum("experts.gate_up_proj" in k for k in torchprune.masks(built.model)) == 1 <= len(dense)
    )
    assert len(plan_shrink(built.model, data[0]).blocks) == 1
