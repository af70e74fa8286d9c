"""Padding that models add themselves, to fill windows, does not count where padding is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import VOCABULARY
from padded import PAD, REAL, assert_nothing_leaks, padded
from torch import Tensor, nn

import torchprune
from torchprune import WandaSpec
from torchprune.calibration.own_padding import Ids

WIDTH, WINDOW = 16, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        items, length, _ = x.shape
        chunks = x.view(items * length // WINDOW, WINDOW, WIDTH)
        q, k, v = self.qkv(chunks).chunk(3, -1)
        open_ = seen.view(len(chunks), 1, WINDOW)
        scores = (q @ k.mT).masked_fill(~open_, -1e4) * open_.any(-1, keepdim=True)
        x = x + self.out(scores.softmax(-1) @ (v * open_.mT)).view_as(x)
        return x + self.down(self.up(x).relu())


class Windowed(nn.Module):
    """Makes its input as long as a number of windows: its ids, or what it made of them."""

    def __init__(self, how: str, front: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.how, self.front = how, front

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        more = -input_ids.shape[1] % WINDOW
        sides = (more, 0) if self.front else (0, more)
        seen = F.pad(attention_mask.bool(), sides, value=False)
        if self.how == "ids":
            x = self.table(F.pad(input_ids, sides, value=PAD))
        else:
            x = self.table(input_ids)
            own = self.table(input_ids.new_full((len(input_ids), more), PAD))
            x = torch.cat([own, x] if self.front else [x, own], 1)
        for block in self.blocks:
            x = block(x, seen)
        return x


@pytest.mark.parametrize("front", [False, True], ids=["behind", "in front"])
@pytest.mark.parametrize("how", ["ids", "rows"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("sequential", ["layer", "block"])
def test_it_does_not_count(how: str, front: bool, side: str, sequential: Any) -> None:
    spec = WandaSpec(sequential=sequential)
    model = assert_nothing_leaks(Windowed(how, front), [padded(side)], spec)
    tokens = {layer.name: layer.tokens for layer in torchprune.report(model).layers}
    assert {tokens[name] for name in tokens if not name.endswith("out")} == {REAL}


def test_what_is_no_padding_is_left_alone() -> None:
    ids, tokens = torch.tensor([[5, 6, 7], [8, PAD, PAD]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    shadow = torch.tensor([[5, 6, 7], [8, 6, 5]])
    known = Ids.of(ids, shadow, tokens.bool())
    assert known is not None
    pads = torch.full((2, 2), PAD)
    assert known.added(torch.cat([shadow, pads], 1)) == (0, 2)
    assert known.added(torch.cat([pads, shadow], 1)) == (2, 0)
    for other in (shadow, ids, torch.cat([shadow, pads + 1], 1), torch.cat([ids, pads], 1), pads):
        assert known.added(other) is None
    assert known.alone(pads)
    assert not known.alone(pads[:1])
    assert not known.alone(pads + 1)
    # a token or several ids that stand at padding: nothing is known of what the model adds
    assert Ids.of(ids, torch.tensor([[5, PAD, 7], [8, 6, 5]]), tokens.bool()) is None
    assert Ids.of(torch.tensor([[5, 6, 7], [8, PAD, 3]]), shadow, tokens.bool()) is None


def test_no_hooks_are_left() -> None:
    model = Windowed("rows", False)
    torchprune.sparsify(model, WandaSpec(), [padded()], progress=False)
    assert not model.table._forward_pre_hooks
