"""Convolutions that spread their input: what they read and what they make can go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from structures import close, outputs
from torch import Tensor, nn

import torchprune
from torchprune import ChannelSpec
from torchprune.errors import TargetError

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SPREAD = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def net(space: int, into: int, out: int, **options: Any) -> nn.Module:
    return nn.Sequential(
        CONV[space](3, into, 3, padding=1),
        nn.ReLU(),
        SPREAD[space](into, out, 2, 2, **options),
        nn.ReLU(),
        CONV[space](out, 4, 3, padding=1),
    ).eval()


class UNet(nn.Module):
    """Two levels down and up, joined along channels and by addition."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.up1, self.up2 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.relu(self.down1(x))
        two = torch.relu(self.down2(one))
        up = torch.cat([one, torch.relu(self.up1(two))], 1)
        return self.last(torch.relu(self.up2(up)))


SHAPES = {
    "plain": (2, 16, 32, 1, 0.45),
    "grouped": (2, 32, 32, 4, 0.55),
    "depthwise": (2, 32, 32, 32, 0.55),
    "depthwise, two each": (2, 16, 32, 16, 0.55),
    "grouped, fewer": (2, 32, 16, 8, 0.55),
    "of one axis": (1, 32, 32, 4, 0.55),
    "of three axes": (3, 16, 32, 1, 0.45),
}


@pytest.mark.parametrize("name", SHAPES)
def test_channels_around_it_go_exactly(name: str) -> None:
    space, into, out, groups, share = SHAPES[name]
    torch.manual_seed(0)
    model = net(space, into, out, groups=groups)
    data = [torch.randn(2, 3, *(4,) * space) for _ in range(2)]
    torchprune.sparsify(model, ChannelSpec(0.5, round_to=1), data, progress=False)
    assert not torchprune.report(model).skipped
    want = outputs(model, data[0])
    plan = torchprune.plan_shrink(model, data[0])
    torchprune.shrink(model, plan)
    assert close(outputs(model, data[0]), want, 1e-5)
    before, after = plan.parameters
    assert after <= share * before
    spread: Any = model[2]
    assert spread.weight.shape[0] == spread.in_channels == model[0].out_channels
    assert spread.weight.shape[1] * spread.groups == spread.out_channels == model[4].in_channels


def test_a_net_of_levels_shrinks_as_a_whole() -> None:
    torch.manual_seed(0)
    model, x = UNet().eval(), torch.randn(2, 3, 16, 16)
    torchprune.sparsify(model, ChannelSpec(0.5), [x], progress=False)
    assert not torchprune.report(model).skipped
    want = outputs(model, x)
    plan = torchprune.plan_shrink(model, x)
    torchprune.shrink(model, plan)
    assert close(outputs(model, x), want, 1e-5)
    assert plan.parameters[1] < 0.4 * plan.parameters[0]


def test_reading_layers_are_refitted() -> None:
    torch.manual_seed(0)
    data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    lost = {}
    for refit in (False, True):
        torch.manual_seed(1)
        model = net(2, 32, 16)
        want = outputs(model, data[0])[0]
        spec = ChannelSpec(0.5, refit=refit, ignore="4")
        torchprune.sparsify(model, spec, data, progress=False)
        lost[refit] = float((outputs(model, data[0])[0] - want).square().mean())
    assert lost[True] < lost[False]


def test_a_layer_left_out_is_told() -> None:
    model, x = net(2, 16, 32), torch.randn(2, 3, 4, 4)
    with pytest.raises(TargetError, match="2: ignored"):
        torchprune.sparsify(model, ChannelSpec(0.5, ignore="2"), [x], progress=False)


@pytest.mark.parametrize("space", [1, 2, 3])
def test_a_net_of_nothing_else_has_channels(space: int) -> None:
    """As generators of images are made."""
    torch.manual_seed(0)
    spread = SPREAD[space]
    model = nn.Sequential(spread(8, 16, 4, 2, 1), nn.ReLU(), spread(16, 16, 2, 2), nn.Tanh()).eval()
    x = torch.randn(2, 8, *[3] * space)
    torchprune.sparsify(model, ChannelSpec(0.5, refit=False), [x], progress=False)
    before = outputs(model, x)
    plan = torchprune.plan_shrink(model, x)
    assert [(r.group.kind, r.after) for r in plan.removals] == [("channels", 8)]
    assert close(outputs(torchprune.shrink(model, plan), x), before, 1e-5)
