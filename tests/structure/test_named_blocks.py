"""Blocks that are not called by numbers, as torchvision's encoder layers are not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from structures import close, outputs
from sweeps import share
from torch import Tensor, nn

import torchprune
from torchprune import LayerSpec


class Block(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.up, self.down, self.place = nn.Linear(8, 16), nn.Linear(16, 8), place

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x))) * (self.down.weight != 0).any()


def block(place: int) -> Block:
    made = Block(place)
    made.down.bias.data.zero_()
    return made


class Encoder(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        held = self.layers
        for layer in held.values() if isinstance(held, nn.ModuleDict) else held:
            x = layer(x)
        return self.head(x)


def named(names: list[str]) -> OrderedDict[str, nn.Module]:
    return OrderedDict((name, block(i)) for i, name in enumerate(names))


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "dict with counted names": lambda: nn.ModuleDict(
        named([f"encoder_layer_{i}" for i in range(4)])
    ),
    "dict with words": lambda: nn.ModuleDict(named(["stem", "middle", "late", "last"])),
    "sequence with counted names": lambda: nn.Sequential(
        named([f"encoder_layer_{i}" for i in range(4)])
    ),
    "sequence with numbers that start at one": lambda: nn.Sequential(named(["1", "2", "3", "4"])),
    "dict with numbers": lambda: nn.ModuleDict(named(["0", "1", "2", "3"])),
    "list": lambda: nn.ModuleList(block(i) for i in range(4)),
}


@pytest.mark.parametrize("name", share(MAKERS, 0, 2))
@pytest.mark.parametrize("gone", [[0], [1, 3], [0, 1, 2]], ids=str)
def test_blocks_of_any_name_go_and_come_back_from_a_file(
    name: str, gone: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Encoder(MAKERS[name]()).eval(), torch.randn(2, 5, 8)
    names = list(model.layers._modules)
    rest = [block for i, block in enumerate(model.layers.children()) if i not in gone]
    spec = LayerSpec(drop=len(gone), targets=[f"layers.{names[i]}" for i in gone])
    torchprune.sparsify(model, spec, [x], progress=False)
    want = outputs(model, x)
    plan = torchprune.plan_shrink(model, x)
    assert sorted(plan.blocks) == sorted(f"layers.{names[i]}" for i in gone)
    torchprune.shrink(model, plan)
    assert list(model.layers.children()) == rest
    assert [b.place for b in model.layers.children()] == list(range(len(rest)))
    assert close(outputs(model, x), want, 1e-5)
    numbered = all(n.isdecimal() for n in names)
    kept = [n for i, n in enumerate(names) if i not in gone]
    assert list(model.layers._modules) == ([str(i) for i in range(len(rest))] if numbered else kept)
    torchprune.save(model, tmp_path / "small")
    again = Encoder(MAKERS[name]()).eval()
    torchprune.load_into(again, tmp_path / "small")
    assert close(outputs(again, x), want, 1e-5)
