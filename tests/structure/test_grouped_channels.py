"""Channels within the groups of convolutions: the same places of all groups go, exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from structures import close, outputs
from torch import Tensor, nn

import torchprune
from torchprune import ChannelSpec

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SPREAD: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Net(nn.Module):
    """A layer, one with groups that reads it, something behind it, and a layer that reads that."""

    def __init__(
        self,
        into: int = 16,
        out: int = 32,
        groups: int = 4,
        space: int = 2,
        behind: str = "norm",
        *,
        spread: bool = False,
    ) -> None:
        super().__init__()
        self.behind = behind
        self.first = CONV[space](3, into, 1)
        if spread:
            self.grouped = SPREAD[space](into, out, 2, 2, groups=groups)
        else:
            self.grouped = CONV[space](into, out, 3, padding=1, groups=groups)
        if behind == "norm":
            self.norm = NORM[space](out)
        elif behind == "group norm":
            self.norm = nn.GroupNorm(4 * groups, out)
        elif behind == "norm of each":
            self.norm = nn.GroupNorm(groups, out)
        elif behind == "residual":
            self.beside = CONV[space](3, out, 1)
        elif behind == "depthwise":
            self.depth = CONV[space](out, 2 * out, 3, padding=1, groups=out)
        elif behind == "grouped again":
            self.again = CONV[space](out, out, 1, groups=2 * groups)
        elif behind == "prelu":
            self.norm = nn.PReLU(out)
        out *= 2 if behind == "depthwise" else 1
        self.last = nn.Linear(out * 4**space, 5) if behind == "flat" else CONV[space](out, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(self.first(x).relu())
        if hasattr(self, "norm"):
            y = self.norm(y)
        elif self.behind == "residual":
            y = y + self.beside(x)
        elif self.behind == "depthwise":
            y = self.depth(y)
        elif self.behind == "grouped again":
            y = self.again(y.relu())
        elif self.behind == "flat":
            y = y.flatten(1)
        return self.last(y.relu())


class Alone(nn.Module):
    """What has groups reads the model's input."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.last = nn.Conv2d(6, 24, 3, padding=1, groups=3), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.grouped(x.repeat(1, 2, 1, 1)).relu())


class Twice(nn.Module):
    """One layer with groups, called twice; another of other groups reads the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 5, 1)
        self.grouped, self.other = nn.Conv2d(32, 32, 1, groups=2), nn.Conv2d(32, 32, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        return self.last(self.grouped(self.grouped(y).relu()) + self.other(y))


class Split(nn.Module):
    """ResNeSt: copies from one convolution with groups, weighed and summed."""

    def __init__(self, width: int = 16, cardinality: int = 2) -> None:
        super().__init__()
        self.cardinality = cardinality
        self.first, self.last = nn.Conv2d(3, width, 1), nn.Conv2d(width, 5, 1)
        self.grouped = nn.Conv2d(width, 2 * width, 3, padding=1, groups=2 * cardinality)
        self.norm = nn.BatchNorm2d(2 * width)
        self.down = nn.Conv2d(width, 16, 1, groups=cardinality)
        self.up = nn.Conv2d(16, 2 * width, 1, groups=cardinality)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.grouped(self.first(x).relu())).relu()
        b, c, h, w = y.shape
        y = y.reshape(b, 2, c // 2, h, w)
        gate = self.up(self.down(y.sum(1).mean((2, 3), keepdim=True)).relu())
        gate = gate.view(b, self.cardinality, 2, -1).transpose(1, 2).softmax(1)
        return self.last((y * gate.reshape(b, 2, c // 2, 1, 1)).sum(1))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (Net, 2),
    "one axis, fewer": (lambda: Net(32, 16, 2, 1), 1),
    "three axes": (lambda: Net(16, 16, 2, 3), 3),
    "spread": (lambda: Net(spread=True), 2),
    "spread, one axis": (lambda: Net(32, 16, 2, 1, spread=True), 1),
    **{
        behind: (lambda behind=behind: Net(behind=behind), 2)
        for behind in ("residual", "depthwise", "grouped again", "prelu", "flat")
    },
    "group norm": (lambda: Net(32, 64, 2, behind="group norm"), 2),
    "alone": (Alone, 2),
    "twice": (Twice, 2),
    "split": (Split, 2),
    "split, one": (lambda: Split(16, 1), 2),
}


def made(name: str) -> tuple[Any, Tensor]:
    """A net in float64, its statistics not neutral, and an input."""
    make, space = NETS[name]
    torch.manual_seed(0)
    net = make().double()
    x = torch.randn(2, 3, *(4,) * space).double()
    with torch.no_grad():
        net.train()(x)
    return net.eval(), x


def pruned(net: nn.Module, x: Tensor, share: float = 0.5, seed: int = 0, **options: Any) -> None:
    spec = ChannelSpec(share, score="random", refit=False, round_to=1, seed=seed, **options)
    torchprune.sparsify(net, spec, [x], progress=False)


def shrunk(net: nn.Module, x: Tensor, training: bool = False) -> Any:
    """The plan, carried out; outputs stay those of the masked model."""
    want = outputs(net, x)
    plan = torchprune.plan_shrink(net, x, modes=("eval", "train") if training else ("eval",))
    torchprune.shrink(net, plan)
    assert close(outputs(net, x), want, 1e-12)
    said(net)
    return plan


def said(net: nn.Module) -> None:
    """Every convolution says the sizes that it has."""
    for conv in (m for m in net.modules() if isinstance(m, (*CONV.values(), *SPREAD.values()))):
        sizes = [conv.out_channels, conv.in_channels]
        if isinstance(conv, tuple(SPREAD.values())):
            sizes.reverse()
        assert [conv.weight.shape[0], conv.weight.shape[1] * conv.groups] == sizes


@pytest.mark.parametrize("name", NETS)
def test_places_within_groups_go_exactly_and_files_keep_it(name: str, tmp_path: Path) -> None:
    net, x = made(name)
    conv, (rows, inner) = net.grouped, net.grouped.weight.shape[:2]
    groups = conv.groups
    pruned(net, x)
    shrunk(net, x)
    assert conv.groups == groups
    assert conv.weight.shape[0] < rows
    assert conv.weight.shape[1] < inner or name == "alone"
    torchprune.save(net, tmp_path)
    again = torchprune.load_into(NETS[name][0]().double().eval(), tmp_path)
    said(again)
    assert again.grouped.groups == groups
    assert torch.equal(again(x), net(x))
    assert torch.equal(again.train()(x), net.train()(x))
