"""Modules of torch that hold the width of what they read say the smaller one in the end."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from structures import close, outputs, unit_masks
from torch import Tensor, nn

import torchprune
from torchprune import plan_shrink, shrink
from torchprune.graph.groups import structure_of

ROWS, LINES, IMAGES = (
    torch.randn(*shape).double() for shape in ((5, 12), (2, 5, 12), (2, 12, 4, 4))
)


class Between(nn.Module):
    """A module between two layers."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.inner: Any = nn.Linear(12, 12) if x.dim() < 4 else nn.Conv2d(12, 12, 1)
        self.module = module
        self.last: Any = nn.LazyLinear(3) if x.dim() < 4 else nn.LazyConv2d(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = self.module(self.inner(x))
        return self.last(made[0] if isinstance(made, tuple) else made)


MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor, tuple[str, ...]]] = {
    "batch norm": (lambda: nn.BatchNorm1d(12), ROWS, ("num_features",)),
    "without tensors": (
        lambda: nn.BatchNorm1d(12, affine=False, track_running_stats=False),
        ROWS,
        ("num_features",),
    ),
    "instance norm": (lambda: nn.InstanceNorm2d(12), IMAGES, ("num_features",)),
    "with weights": (lambda: nn.InstanceNorm2d(12, affine=True), IMAGES, ("num_features",)),
    "group norm": (lambda: nn.GroupNorm(4, 12), IMAGES, ("num_channels",)),
    "group norm without": (lambda: nn.GroupNorm(4, 12, affine=False), IMAGES, ("num_channels",)),
    "each channel": (
        lambda: nn.GroupNorm(12, 12, affine=False),
        IMAGES,
        ("num_channels", "num_groups"),
    ),
    "slopes": (lambda: nn.PReLU(12), ROWS, ("num_parameters",)),
    "convolution": (
        lambda: nn.Conv2d(12, 8, 3, padding=1, padding_mode="circular"),
        IMAGES,
        ("in_channels",),
    ),
    "lstm": (lambda: nn.LSTM(12, 8, batch_first=True), LINES, ("input_size",)),
    "gru": (lambda: nn.GRU(12, 8, 2, bidirectional=True), LINES, ("input_size",)),
    "cell": (lambda: nn.GRUCell(12, 8), ROWS, ("input_size",)),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_width_that_is_told_is_the_one_that_is_read(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, x, told = MODULES[name]
    model = Between(make(), x).double().eval()
    outputs(model, x)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    fresh = copy.deepcopy(model)
    structure = structure_of(model, x)
    gone = {
        at: torch.arange(group.count) % 4 == 1
        for at, group in enumerate(structure.groups)
        if any("inner" in member.key for member in group.members)
    }
    torchprune.apply_masks(model, unit_masks(model, gone, structure))
    want = outputs(model, x)
    shrink(model, plan_shrink(model, x))
    assert {getattr(model.module, one) for one in told} == {9}
    torchprune.save(model, tmp_path)
    again: Any = torchprune.load_into(fresh, tmp_path)
    assert {getattr(again.module, one) for one in told} == {9}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an instance norm of another width only warns
        assert close(outputs(model, x), want, 1e-12)
        assert close(outputs(again, x), want, 1e-12)
