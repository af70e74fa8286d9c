"""Adapters stay as they are: what is pruned is the layer they stand beside, by its plain name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, WandaSpec
from torchprune.masking.targets import make_plan


class Beside(nn.Module):
    """A low-rank adapter around a layer, with no name that anyone knows."""

    def __init__(self, inner: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.first = nn.Linear(inner.in_features, rank, bias=False)
        self.second = nn.Linear(rank, inner.out_features, bias=False)
        self.magnitude = nn.Parameter(torch.ones(inner.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.magnitude * (self.inner(x) + self.second(self.first(x)))


class Within(nn.Linear):
    """An adapter of raw matrices on the layer itself, as loralib makes them."""

    def __init__(self, inner: nn.Linear, rank: int = 2) -> None:
        super().__init__(inner.in_features, inner.out_features)
        self.load_state_dict(inner.state_dict())
        self.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, inner.in_features))
        self.b = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


class BesideConv(nn.Module):
    """The same of a convolution."""

    def __init__(self, inner: nn.Conv2d, rank: int = 2) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        size = inner.kernel_size
        self.down = nn.Conv2d(inner.in_channels, rank, size, padding=1, bias=False)
        self.up = nn.Conv2d(rank, inner.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


class Block(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.up, self.down = wrap(nn.Linear(16, 24)), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def blocks(wrap: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(wrap) for _ in range(2)])


PLAIN = ["0.up", "0.down", "1.up", "1.down"]


@pytest.mark.parametrize("wrap", [nn.Identity, Beside, Within])
def test_the_layer_is_pruned_by_its_plain_name(wrap: Any) -> None:
    model = blocks((lambda layer: layer) if wrap is nn.Identity else wrap)
    assert [t.name for t in make_plan(model, MagnitudeSpec()).targets] == PLAIN
    assert [t.name for t in make_plan(model, MagnitudeSpec(targets="0.up")).targets] == ["0.up"]
    assert [t.name for t in make_plan(model, MagnitudeSpec(targets="0")).targets] == PLAIN[:2]
    assert [t.name for t in make_plan(model, MagnitudeSpec(targets=nn.Linear)).targets] == PLAIN
    dense = make_plan(model, MagnitudeSpec(ignore="*.up"))
    assert [t.name for t in dense.targets] == ["0.down", "1.down"]


@pytest.mark.parametrize("wrap", [Beside, Within])
def test_masks_are_those_of_the_plain_model(wrap: Any) -> None:
    plain, adapted = blocks(lambda layer: layer), blocks(wrap)
    with torch.no_grad():  # the adapters drew numbers, too
        for mine, its in zip(plain, adapted, strict=True):
            layer = its.up.inner if wrap is Beside else its.up
            mine.up.weight.copy_(layer.weight)
            mine.down.load_state_dict(its.down.state_dict())
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    for model in (plain, adapted):
        torchprune.sparsify(model, MagnitudeSpec(0.5, scope="row"), progress=False)
    found = list(torchprune.masks(adapted).values())
    wanted = list(torchprune.masks(plain).values())
    assert len(found) == 4
    assert all(map(torch.equal, found, wanted))
    assert torchprune.report(adapted).coverage.share == 1.0
    torchprune.fold(adapted)
    after = adapted.state_dict()
    own = [k for k in before if not k.endswith(("inner.weight", "down.weight", "up.weight"))]
    assert own
    assert all(torch.equal(before[k], after[k]) for k in own)


def test_a_pruned_model_with_adapters_can_be_pruned_further() -> None:
    model = blocks(Beside)
    for share in (0.25, 0.5):
        torchprune.sparsify(model, MagnitudeSpec(share), progress=False)
    assert {y.name for y in torchprune.report(model).layers} == set(PLAIN)
    assert torchprune.report(model).sparsity == 0.5


def test_an_adapter_is_pruned_by_its_own_name() -> None:
    model = blocks(Beside)
    found = make_plan(model, MagnitudeSpec())
    assert found.skipped["0.up.first"] == "an adapter, to be merged into the layer beside it"
    named = make_plan(model, MagnitudeSpec(targets="0.up.first"))
    assert [t.name for t in named.targets] == ["0.up.first"]


def test_convolutions_have_adapters_too() -> None:
    model = nn.Sequential(BesideConv(nn.Conv2d(8, 12, 3, padding=1)), nn.Conv2d(12, 4, 3))
    assert [t.name for t in make_plan(model, MagnitudeSpec()).targets] == ["0", "1"]


def test_frozen_and_trained_layers_alone_make_no_adapter() -> None:
    """Transfer learning freezes layers beside small ones that are no factors of their shape."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(16, 16).requires_grad_(False)
            self.narrow, self.out = nn.Linear(16, 4), nn.Linear(4, 10)

    found = make_plan(nn.Sequential(Head(), Head()), MagnitudeSpec())
    assert [t.name for t in found.targets if t.name.startswith("0")] == [
        "0.body",
        "0.narrow",
        "0.out",
    ]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft and transformers, to one another
def test_a_peft_model_is_pruned_as_its_base() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    family = FAMILIES["llama"]
    plain, model = family.make(), family.make()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    data = tokens(count=2)
    for one in (plain, adapted):
        torchprune.sparsify(one, WandaSpec(), data, progress=False)
    names = [y.name for y in torchprune.report(plain).layers]
    assert [y.name for y in torchprune.report(adapted).layers] == names
    pairs = zip(torchprune.masks(plain).values(), torchprune.masks(adapted).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    chosen = make_plan(adapted, MagnitudeSpec(targets="model.layers.0.self_attn.q_proj"))
    assert [t.name for t in chosen.targets] == ["model.layers.0.self_attn.q_proj"]
    assert [
        t.name for t in make_plan(adapted, MagnitudeSpec(targets="model.layers.1")).targets
    ] == [name for name in names if ".1." in name]
