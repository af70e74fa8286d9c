"""In models of torch's own layers alone, a layer that is used again is pruned on every use."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from plain_wanda import difference, sums_by_layer
from torch import Tensor, nn

import torchprune
from torchprune import WandaSpec
from torchprune.specs.options import Reconstruct

SPECS = {
    "layer": WandaSpec(),
    "block": WandaSpec(sequential="block"),
    "none": WandaSpec(sequential="none"),
    "reconstruct": WandaSpec(reconstruct=Reconstruct(epochs=1)),
}


class Block(nn.Module):
    """Layers that read one tensor, and at its end or beginning what others have too."""

    def __init__(self, shared: nn.Module | None = None, *, first: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.shared, self.first = shared, first

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is not None and self.first:
            x = x + self.shared(x)
        x = x + self.out(self.q(x).tanh() * self.k(x) + self.v(x))
        if self.shared is not None and not self.first:
            x = x + self.shared(x)
        return x * torch.linspace(0.3, 2, 16)


class Net(nn.Module):
    def __init__(self, blocks: Callable[[], list[Block]], depth: int = 1) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks, self.depth = nn.ModuleList(blocks()), depth

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.depth):
            for block in self.blocks:
                x = block(x)
        return x


def _with(one: nn.Module, *, first: bool) -> list[Block]:
    return [Block(one, first=first), Block(), Block(one, first=first)]


def _q_of_the_first() -> list[Block]:
    """What is foreseen to be read beside others is the first block's."""
    blocks = [Block(), Block(), Block()]
    blocks[2].q = blocks[0].q
    return blocks


def _k_of_the_second() -> list[Block]:
    blocks = [Block() for _ in range(4)]
    blocks[3].k = blocks[1].k
    return blocks


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "at the end of two blocks": (
        lambda: Net(lambda: _with(nn.Linear(16, 16), first=False)),
        {"blocks.0.shared"},
    ),
    "at the beginning of two blocks": (
        lambda: Net(lambda: _with(nn.Linear(16, 16), first=True)),
        {"blocks.0.shared"},
    ),
    "a query": (lambda: Net(_q_of_the_first), {"blocks.0.q"}),
    "a key, foreseen": (lambda: Net(_k_of_the_second), {"blocks.1.k"}),
    "one block, for all depths": (
        lambda: Net(lambda: [Block()], depth=3),
        {f"blocks.0.{name}" for name in ("q", "k", "v", "out")},
    ),
    "a list, twice": (
        lambda: Net(lambda: [Block(), Block()], depth=2),
        {f"blocks.{b}.{name}" for b in (0, 1) for name in ("q", "k", "v", "out")},
    ),
}


@pytest.mark.parametrize("how", SPECS)
@pytest.mark.parametrize("kind", MODELS)
def test_masks_are_of_every_use_and_the_report_says_so(kind: str, how: str) -> None:
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(n, 16, generator=generator)} for n in (30, 20)]
    make, often = MODELS[kind]
    model = make()
    dense = copy.deepcopy(model)
    torchprune.sparsify(model, SPECS[how], data, progress=False)
    masks, notes = torchprune.masks(model), torchprune.report(model).notes
    sums = sums_by_layer(dense, list(masks), data)
    for name, mask in masks.items():
        if how == "none" or name.removesuffix(".weight") in often:
            assert not difference(dense.get_parameter(name), mask, sums[name], 0.5), name
    said = {note.partition(" ")[0] for note in notes if "more than once" in note}
    assert said == often, notes


@pytest.mark.parametrize("how", ["layer", "block"])
def test_what_fails_behind_the_last_layer_is_no_error(how: str) -> None:
    class Tail(Net):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("the tail")

    model = Tail(lambda: [Block(), Block()])
    torchprune.sparsify(model, SPECS[how], [torch.randn(20, 16)], progress=False)
    assert torchprune.report(model).notes == []
