"""A model's own hooks see each run of a block once, whatever is tried with the block besides."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchprune
from torchprune import LayerSpec, Reconstruct, WandaSpec, modes
from torchprune.structure.specs import StructuredSpec


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.down.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Mixed(nn.Module):
    """Its head reads what hooks recorded, as nets with a weighted sum of layers do."""

    def __init__(self, kind: str, count: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(8, 3)
        self.states: list[Tensor] = []
        for block in self.blocks:
            match kind:
                case "method":
                    block.register_forward_hook(self.keep)
                case "closure":
                    block.register_forward_hook(lambda _, args, out: self.states.append(out))
                case "partial":
                    block.register_forward_hook(functools.partial(Mixed.keep, self))
                case "inside":
                    block.down.register_forward_hook(self.keep)
                case "before":
                    block.register_forward_pre_hook(lambda _, args: self.states.append(args[0]))

    def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.states.append(out)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        states = torch.stack(self.states)
        self.states.clear()
        if len(states) != len(self.blocks):
            raise RuntimeError(f"{len(states)} states of {len(self.blocks)} blocks")
        return self.head(states.mean(0))


def squares(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch if isinstance(batch, tuple) else (batch,)).square().mean()


KINDS = ["method", "closure", "partial", "inside", "before"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(drop=1),
        LayerSpec(drop=2, score="loss", loss=squares),
        WandaSpec(reconstruct=Reconstruct(epochs=2)),
        torchprune.NeuronSpec(0.3, reconstruct=Reconstruct(epochs=2)),
        WandaSpec(ignore=["head"]),
    ],
    ids=["cosine", "loss", "reconstruct", "neurons", "all but the head"],
)
def test_recorded_states_stay_as_many(kind: str, spec: Any) -> None:
    torch.manual_seed(0)
    model, data = Mixed(kind).eval(), [torch.randn(2, 5, 8) for _ in range(4)]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    torchprune.sparsify(model, spec, data, progress=False)
    assert model.states == []
    assert model(data[0]).shape == (2, 5, 3)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    if not isinstance(spec, StructuredSpec | LayerSpec):
        assert torchprune.report(model).sparsity == pytest.approx(0.5, abs=0.01)


def test_a_head_sees_the_blocks_as_they_will_be() -> None:
    """Loss without a block: recorded states are those of the model without it."""
    torch.manual_seed(0)
    model, x = Mixed("method").eval(), torch.randn(2, 5, 8)
    torchprune.sparsify(model, LayerSpec(drop=1, score="loss", loss=squares), [x], progress=False)
    note = next(y.note for y in torchprune.report(model).layers)
    with torch.no_grad():
        assert f"{float(squares(model, x)):.4g}" in note


def test_hooks_that_make_weights_stay() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Linear(4, 4))
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer.weight_g.data.mul_(2)
    want = layer(torch.ones(4))
    layer.weight_g.data.mul_(2)
    with modes.without_hooks(layer):
        twice = layer(torch.ones(4))
    assert not torch.allclose(twice, want)
    assert seen == [1]
    with pytest.raises(ValueError, match="x"), modes.without_hooks(layer):
        raise ValueError("x")
    layer(torch.ones(4))
    assert seen == [1, 1]
