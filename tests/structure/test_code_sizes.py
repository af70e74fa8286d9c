"""Sizes that a module's code reads from its own attributes, whoever works with them first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchprune
from torchprune import ChannelSpec


class Split(nn.Module):
    """Pieces of one width, each through a convolution of its own: Res2Net's blocks."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.width = nn.Conv2d(3, 32, 3, padding=1), 8
        self.convs = nn.ModuleList(inner() for _ in range(3))
        self.pool, self.last = nn.AvgPool2d(3, 1, 1), nn.Conv2d(32, 3, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(self.act(self.first(x)), self.width, 1)
        made = [conv(piece) for conv, piece in zip(self.convs, pieces, strict=False)]
        out: Tensor = self.last(torch.cat([*made, self.pool(pieces[3])], 1))
        out += x  # written twice in place: the graph is made anew, and cuts where a piece is read
        return self.act(out)


class Within(nn.Sequential):
    """A convolution in a container of torch's."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())


@pytest.mark.parametrize("inner", [lambda: nn.Conv2d(8, 8, 1), Within], ids=["plain", "container"])
def test_a_width_by_which_pieces_are_cut_follows_whoever_reads_them_first(
    inner: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    net, x = Split(inner).eval(), torch.randn(2, 3, 8, 8)
    torchprune.sparsify(net, ChannelSpec(0.5, round_to=1), [x], progress=False)
    with torch.no_grad():
        want = net(x)
        torchprune.shrink(net, torchprune.plan_shrink(net, x))
        assert torch.allclose(net(x), want, atol=1e-6)
    assert (net.width, net.first.out_channels, net.last.in_channels) == (4, 16, 16)
