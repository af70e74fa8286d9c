"""Block mode counts all that a layer reads in its block's dense pass, shared or not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from plain_wanda import Sums, difference, sums_by_block, sums_by_layer
from torch import Tensor, nn

import torchprune
from torchprune import WandaSpec
from torchprune.specs.options import Reconstruct

Trick = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    def __init__(self, trick: Trick) -> None:
        super().__init__()
        self.q, self.k, self.last = (nn.Linear(16, 16) for _ in range(3))
        self.trick = trick

    def forward(self, x: Tensor) -> Tensor:
        return x + self.trick(self, x)


def both_again(block: Block, x: Tensor) -> Tensor:
    """As where some tokens are read once more by the layers that read all of them."""
    few = x[:3] * torch.linspace(0, 9, 16)
    out = block.q(x) * block.k(x)
    return block.last(out + (block.q(few) * block.k(few)).mean(0))


def one_again(block: Block, x: Tensor) -> Tensor:
    """The second tensor of one layer is the only one of the other."""
    few = x[:3] * torch.linspace(0, 9, 16)
    return block.last(block.q(x) + block.q(few).mean(0) * block.k(few).mean(0))


def late(block: Block, x: Tensor) -> Tensor:
    """After the last layer was reached, all are reached again."""
    x = block.last(block.q(x) * block.k(x))
    return x + block.last(block.q(x * torch.linspace(0, 9, 16)) * block.k(x.flip(-1)))


def now_and_then(block: Block, x: Tensor) -> Tensor:
    """What the layers share in the first batch they do not in another."""
    return block.last(block.q(x) * block.k(x if len(x) > 20 else x.flip(-1)))


class Net(nn.Module):
    def __init__(self, trick: Trick) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block(trick) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def squares(model: nn.Module, names: list[str], data: list[dict[str, Tensor]]) -> dict[str, Sums]:
    """By the way that the report says weights were read: all uses, dense, or the block's own."""
    notes = [note for note in torchprune.report(model).notes if " is read more than once " in note]
    said = {note.partition(" ")[0] for note in notes}
    often = [name for name in names if name.removesuffix(".weight") in said]
    dense = torchprune.densify(copy.deepcopy(model))
    rest = [name for name in names if name not in often]
    found = sums_by_block(dense, torchprune.fold(copy.deepcopy(model)), rest, data, often)
    return found | sums_by_layer(dense, often, data)


@pytest.mark.parametrize("trick", [both_again, one_again, late, now_and_then])
@pytest.mark.parametrize("sizes", [(40, 20), (20, 40), (9, 30, 30)])
def test_masks_are_those_of_a_plain_loop(trick: Trick, sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.1, 3, 16)
    data = [{"x": torch.randn(n, 16, generator=generator) * scale} for n in sizes]
    model = Net(trick)
    torchprune.sparsify(model, WandaSpec(sequential="block"), data, progress=False)
    masks = torchprune.masks(model)
    sums, dense = squares(model, list(masks), data), torchprune.densify(copy.deepcopy(model))
    for name, mask in masks.items():
        assert not difference(dense.get_parameter(name), mask, sums[name], 0.5), name


def raw(block: Block, x: Tensor) -> Tensor:
    """A product that no module makes, so that the model is looked over before."""
    return block.last(F.linear(x, block.q.weight) * block.k(x))


class Shared(nn.Module):
    """One block for all depths, as ALBERT's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.raw = nn.Parameter(torch.randn(16, 16))
        self.blocks = nn.ModuleList([Block(raw)])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.blocks[0](x)
        return x @ self.raw


@pytest.mark.parametrize(
    "spec",
    [
        WandaSpec(),
        WandaSpec(sequential="block"),
        WandaSpec(reconstruct=Reconstruct(epochs=1)),
        WandaSpec(reconstruct=Reconstruct(epochs=1, alpha=0.5)),
    ],
    ids=["layer", "block", "reconstruct", "both"],
)
def test_a_shared_block_is_pruned_on_all_its_uses(spec: WandaSpec) -> None:
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(n, 16, generator=generator)} for n in (30, 20)]
    model = Shared()
    dense = copy.deepcopy(model)
    torchprune.sparsify(model, spec, data, progress=False)
    masks = torchprune.masks(model)
    sums = sums_by_layer(dense, list(masks), data)
    for name, mask in masks.items():
        assert not difference(dense.get_parameter(name), mask, sums[name], 0.5), name
    if spec.reconstruct:
        assert any("reconstructed 1 blocks" in note for note in torchprune.report(model).notes)
