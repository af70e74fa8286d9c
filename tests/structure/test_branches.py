"""Structures of models that do more than one example shows."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from structures import close
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchprune
from torchprune import ChannelSpec, NeuronSpec
from torchprune.errors import ShrinkError


def conv(i: int, o: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1)


class Auxiliary(nn.Module):
    """A second head in training alone, as Inception and segmentation nets have."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm, self.last = conv(3, 16), nn.BatchNorm2d(16), conv(16, 4)
        self.drop, self.aux = nn.Dropout(dropout), conv(16, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.drop(torch.relu(self.norm(self.first(x))))
        return (self.last(h), self.aux(h)) if self.training else self.last(h)


class Encoder(nn.Module):
    """A method beside forward that reads what forward makes, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.code = conv(3, 16), conv(16, 4), nn.Linear(16 * 64, 10)
        self.up, self.down = nn.Linear(10, 48), nn.Linear(48, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.first(x))
        return self.last(h), self.down(torch.relu(self.up(x[:, 0, 0, :].repeat(1, 2)[:, :10])))

    def encode(self, x: Tensor) -> Tensor:
        return self.code(self.first(x).flatten(1))


class Flagged(nn.Module):
    """A branch by a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 6)

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        h = torch.relu(self.up(x))
        return self.other(h) if other else self.down(h)


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def given(model: nn.Module, *args: Any) -> list[Tensor]:
    with torch.no_grad():
        return [y for y in pytree.tree_leaves(model(*args)) if isinstance(y, Tensor)]


@pytest.mark.parametrize("modes", [("eval",), ("train",), ("eval", "train")], ids=str)
def test_a_head_that_only_training_uses_goes_along(modes: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    net, x = Auxiliary().eval(), images()
    torchprune.sparsify(net, ChannelSpec(0.5), [x], progress=False)
    state = {k: v.clone() for k, v in net.state_dict().items() if "parametrizations" not in k}
    want = given(net, x), given(net.train(), x)
    net.load_state_dict(state, strict=False)
    plan = torchprune.plan_shrink(net, x, modes=modes)
    torchprune.shrink(net, plan)
    assert net.training
    assert net.aux.weight.shape[1] == net.last.weight.shape[1] == 8
    statistics = net.norm.running_mean.clone(), net.norm.num_batches_tracked.clone()
    assert int(statistics[1]) == int(state["norm.num_batches_tracked"])  # checking trained nothing
    assert close(given(net.eval(), x), want[0], 1e-5)
    assert close(given(net.train(), x), want[1], 1e-5)


def test_dropout_does_not_count_as_a_difference() -> None:
    torch.manual_seed(0)
    net, x = Auxiliary(0.5), images()
    torchprune.sparsify(net, ChannelSpec(0.5), [x], progress=False)
    before = torch.get_rng_state()
    plan = torchprune.plan_shrink(net, x, modes=("eval", "train"))
    torchprune.shrink(net, plan)
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(y.shape) for y in given(net.train(), x)] == [(2, 4, 8, 8), (2, 5, 8, 8)]


def test_what_no_example_reads_keeps_what_may_belong_to_it() -> None:
    torch.manual_seed(0)
    net, x = Encoder().eval(), images()
    torchprune.sparsify(net, ChannelSpec(0.5), [x], progress=False)
    torchprune.sparsify(net, NeuronSpec(0.5), [x], progress=False)
    want = given(net, x)
    plan = torchprune.plan_shrink(net, x)
    assert "no example reads code.weight, code.bias" in str(plan)
    assert any("code.weight, which no example reads" in f.why for f in plan.frozen)
    torchprune.shrink(net, plan)
    assert net.first.weight.shape[0] == 16  # 16 * 64 inputs of `code` may hold these 16 channels
    assert net.up.weight.shape[0] == 24  # and nothing of it is 48 long
    assert close(given(net, x), want, 1e-5)
    assert net.encode(x).shape == (2, 10)


def test_the_note_says_why_the_other_mode_could_not_be_tried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = Auxiliary().eval()
    net.aux = nn.Sequential(nn.AvgPool2d(9), net.aux)  # larger than the example is
    net.last.weight.data[:, :8] = 0
    plan = torchprune.plan_shrink(net, images())
    assert "no example reads aux.1.weight" in str(plan)
    assert "the other mode was tried for them, and failed: torch.export cannot capture" in str(plan)
    assert "test_branches.py" in str(plan)
    assert "too small" in str(plan)
    assert all(r.levelno < logging.WARNING for r in caplog.records)  # torch tells it too
    assert not net.training
    assert "the other mode" not in str(torchprune.plan_shrink(Encoder().eval(), images()))


def test_every_example_is_honoured_and_checked() -> None:
    torch.manual_seed(0)
    net, x = Flagged().eval(), torch.randn(5, 8)
    net.up.weight.data[:8], net.up.bias.data[:8] = 0, 0
    net.down.weight.data[:, :8] = 0
    assert not torchprune.plan_shrink(net, x).removals  # `other` may read them
    one_reads = torchprune.plan_shrink(net, [x, (x, True)])
    assert not one_reads.removals
    net.other.weight.data[:, :8] = 0
    want = given(net, x) + given(net, x, True)
    plan = torchprune.plan_shrink(net, [x, (x, True)], modes=("eval", "train"))
    assert [(r.before, r.after) for r in plan.removals] == [(32, 24)]
    assert len(plan.calls) == 4
    torchprune.shrink(net, plan)
    assert close(given(net, x) + given(net, x, True), want, 1e-5)
    assert net.other.in_features == 24


def test_flops_are_of_the_first_example() -> None:
    net, x = Flagged(), torch.randn(5, 8)
    one, two = torchprune.plan_shrink(net, x), torchprune.plan_shrink(net, [x, (x, True)])
    assert one.flops == two.flops
    assert torchprune.plan_shrink(net, [(x, True), x]).flops[0] == 2 * 5 * (8 * 32 + 32 * 6)


@pytest.mark.parametrize(
    ("inputs", "modes", "says"),
    [
        ([], ("eval",), "no example input"),
        ("x", (), "modes must be some of"),
        ("x", ("test",), "modes must be some of"),
    ],
)
def test_what_is_no_example_or_mode_is_refused(inputs: Any, modes: Any, says: str) -> None:
    x = torch.randn(5, 8)
    with pytest.raises(ShrinkError, match=says):
        torchprune.plan_shrink(Flagged(), x if inputs == "x" else inputs, modes=modes)
