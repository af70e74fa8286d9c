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
        self.mix = wrap(nn.Linear(16, 16))
        self.up, self.down = wrap(nn.Linear(16, 24)), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.mix(x)).relu())


def blocks(wrap: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(wrap) for _ in range(2)])


PLAIN = ["0.mix", "0.up", "0.down", "1.mix", "1.up", "1.down"]


@pytest.mark.parametrize("wrap", [nn.Identity, Beside, Within])
def test_the_layer_is_pruned_by_its_plain_name(wrap: Any) -> None:
    model = blocks((lambda layer: layer) if wrap is nn.Identity else wrap)
    assert [t.name for t in make_plan(model, MagnitudeSpec()).targets] == PLAIN
    assert [t.name for t in make_plan(model, MagnitudeSpec(targets="0.up")).targets] == ["0.up"]
    assert [t.name for t in make_plan(model, MagnitudeSpec(targets="0")).targets] == PLAIN[:3]
    assert [t.name for t in make_plan(model, MagnitudeSpec(targets=nn.Linear)).targets] == PLAIN
    dense = make_plan(model, MagnitudeSpec(ignore="*.up"))
    assert [t.name for t in dense.targets] == ["0.mix", "0.down", "1.mix", "1.down"]


@pytest.mark.parametrize("wrap", [Beside, Within])
def test_masks_are_those_of_the_plain_model(wrap: Any) -> None:
    plain, adapted = blocks(lambda layer: layer), blocks(wrap)
    with torch.no_grad():  # the adapters drew numbers, too
        for mine, its in zip(plain, adapted, strict=True):
            for name in ("mix", "up"):
                layer = its.get_submodule(f"{name}.inner" if wrap is Beside else name)
                mine.get_submodule(name).weight.copy_(layer.weight)
            mine.down.load_state_dict(its.down.state_dict())
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    for model in (plain, adapted):
        torchprune.sparsify(model, MagnitudeSpec(0.5, scope="row"), progress=False)
    found = list(torchprune.masks(adapted).values())
    wanted = list(torchprune.masks(plain).values())
    assert len(found) == 6
    assert all(map(torch.equal, found, wanted))
    assert torchprune.report(adapted).coverage.share == 1.0
    torchprune.fold(adapted)
    after = adapted.state_dict()
    masked = ("inner.weight", "mix.weight", "up.weight", "down.weight")
    own = [k for k in before if not k.endswith(masked)]
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
        def __init__(self, *sizes: tuple[int, int]) -> None:
            super().__init__()
            self.body = nn.Linear(16, 16).requires_grad_(False)
            self.more = nn.ModuleList(nn.Linear(*size) for size in sizes)

    for sizes in (
        [(16, 4), (4, 10)],
        [(16, 4)],
        [(16, 4), (4, 16), (20, 20)],
        [(16, 24), (24, 16)],
    ):
        model = nn.Sequential(Head(*sizes), Head(*sizes))
        found = [t.name for t in make_plan(model, MagnitudeSpec()).targets]
        assert found[0] == "0.body"
        assert len(found) == 2 * (1 + len(sizes))


class PeftModel(nn.Module):
    """peft's, as far as names and protocols go: root, tuner, and a layer with its adapters."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class BaseTuner(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class LoraModel(BaseTuner):
    pass


class LoraLinear(nn.Module):
    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        down = nn.Linear(base_layer.in_features, 2, bias=False)
        up = nn.Linear(2, base_layer.out_features, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


for kind in (PeftModel, BaseTuner, LoraModel):
    kind.__module__ = "peft.as_imitated"


@pytest.mark.parametrize("trained", [True, False])
def test_what_stands_for_peft_is_pruned_as_its_base(trained: bool) -> None:
    """Also for inference, when the adapters are as frozen as the rest."""
    model = PeftModel(LoraModel(blocks(LoraLinear)))
    model.requires_grad_(trained)
    assert [t.name for t in make_plan(model, MagnitudeSpec()).targets] == PLAIN
    for one in ("0.up", "base_model.model.0.up", "base_model.model.0.up.base_layer"):
        assert [t.name for t in make_plan(model, MagnitudeSpec(targets=one)).targets] == ["0.up"]
    assert [t.name for t in make_plan(model, MagnitudeSpec(ignore="1")).targets] == PLAIN[:3]
    torchprune.sparsify(model, WandaSpec(), [torch.randn(9, 16)], progress=False)
    report = torchprune.report(model)
    assert [y.name for y in report.layers] == PLAIN
    assert report.coverage.share == 1.0
    key = "base_model.model.0.up.base_layer.weight"  # where it really is, for state_dict and files
    assert key in torchprune.masks(model)


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


class Attends(nn.Module):
    """Of whose projections some have an adapter and one is frozen and bare."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj = wrap(nn.Linear(16, 16)), wrap(nn.Linear(16, 16))
        self.v_proj = nn.Linear(16, 16, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.v_proj(self.q_proj(x) + self.k_proj(x))
        return out


@pytest.mark.parametrize("wrap", [Beside, Within])
def test_a_bare_layer_among_adapted_ones_is_no_adapters_own(wrap: Any) -> None:
    model = nn.Sequential(Attends(wrap), Attends(wrap))
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    found = {y.name.rpartition(".")[2] for y in torchprune.report(model).layers}
    assert found == {"q_proj", "k_proj", "v_proj"}
    assert len(torchprune.report(model).layers) == 6
