"""Block mode counts all that a layer reads in its block's dense pass, shared or not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from plain_wanda import difference, sums_by_block
from torch import Tensor, nn

import torchprune
from torchprune import WandaSpec

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


@pytest.mark.parametrize("trick", [both_again, one_again, late, now_and_then])
@pytest.mark.parametrize("sizes", [(40, 20), (20, 40), (9, 30, 30)])
def test_masks_are_those_of_a_plain_loop(trick: Trick, sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.1, 3, 16)
    data = [{"x": torch.randn(n, 16, generator=generator) * scale} for n in sizes]
    model = Net(trick)
    dense = copy.deepcopy(model)
    torchprune.sparsify(model, WandaSpec(sequential="block"), data, progress=False)
    masks = torchprune.masks(model)
    sums = sums_by_block(dense, torchprune.fold(model), list(masks), data)
    for name, mask in masks.items():
        assert not difference(dense.get_parameter(name), mask, sums[name], 0.5), name
