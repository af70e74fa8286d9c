"""Structures of models whose weights are shared, renamed, or made of others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from structures import close, outputs
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import torchprune
from torchprune import ChannelSpec, NeuronSpec
from torchprune.errors import TargetError

Sequential = nn.Sequential


def conv(i: int, o: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1)


def old(norm: Callable[..., nn.Module], module: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(module, **options)


class Alias(nn.Module):
    """One module under two names, the later of which runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = conv(3, 16), conv(16, 16), conv(16, 4)
        self.other = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.other(torch.relu(self.first(x)))))


class Twice(nn.Module):
    """A list that holds one block twice."""

    def __init__(self) -> None:
        super().__init__()
        block = Sequential(conv(16, 32), nn.ReLU(), conv(32, 16))
        self.first, self.last = conv(3, 16), conv(16, 4)
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Standardised(nn.Conv2d):
    """A convolution with weight standardisation by batch_norm."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias, padding=1)


def between(middle: nn.Module) -> nn.Module:
    return Sequential(conv(3, 16), nn.ReLU(), middle, nn.ReLU(), conv(16, 4))


def inner(middle: nn.Module) -> nn.Module:
    return Sequential(nn.Linear(8, 16), nn.ReLU(), middle, nn.ReLU(), nn.Linear(16, 4))


weight_norm, old_norm = parametrizations.weight_norm, nn.utils.weight_norm

NETS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    # how much of the parameters may be left at half of all that can go
    "one module twice": (lambda: (b := conv(16, 16)) and between(Sequential(b, b)), 0.4),
    "alias": (Alias, 0.4),
    "a list with one block twice": (Twice, 0.35),
    "weight norm makes": (lambda: between(weight_norm(conv(16, 16))), 0.6),
    "weight norm first": (
        lambda: Sequential(
            weight_norm(conv(3, 16)), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 4)
        ),
        0.4,
    ),
    "weight norm of a linear": (lambda: inner(weight_norm(nn.Linear(16, 16))), 0.7),
    "weight norm by a hook": (lambda: between(old(old_norm, conv(16, 16))), 0.6),
    "weight norm in a chain": (
        lambda: Sequential(
            conv(3, 16),
            *(m for _ in range(3) for m in (nn.ReLU(), weight_norm(conv(16, 16)))),
            nn.ReLU(),
            conv(16, 4),
        ),
        0.9,
    ),
    "standardised": (lambda: between(Standardised(16, 16, 3)), 0.6),
    "batch norm on batches": (
        lambda: Sequential(
            conv(3, 16), nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU(), conv(16, 4)
        ),
        0.55,
    ),
    "instance norm": (
        lambda: Sequential(conv(3, 16), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), conv(16, 4)),
        0.55,
    ),
}


def example(net: nn.Module) -> Tensor:
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return torch.randn(2, 8) if isinstance(first, nn.Linear) else torch.randn(2, 3, 8, 8)


def spec_for(x: Tensor) -> Any:
    return NeuronSpec(0.5) if x.dim() == 2 else ChannelSpec(0.5)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_what_goes_is_exact(name: str, training: bool) -> None:
    torch.manual_seed(0)
    make, share = NETS[name]
    net = make().eval()
    x = example(net)
    torchprune.sparsify(net, spec_for(x), [x], progress=False)
    want = outputs(net, x)
    plan = torchprune.plan_shrink(net, x)
    torchprune.shrink(net.train(training), plan)
    assert close(outputs(net.eval(), x), want, 1e-5)
    before, after = plan.parameters
    assert after <= share * before
    assert sum(p.numel() for p in net.parameters()) == after
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels) == tuple(module.weight.shape[:2])


@pytest.mark.parametrize(
    "middle",
    [
        lambda: weight_norm(conv(16, 16), dim=1),
        lambda: weight_norm(conv(16, 16), dim=None),
        lambda: parametrizations.spectral_norm(conv(16, 16)),
        lambda: old(nn.utils.spectral_norm, conv(16, 16)),
        lambda: parametrizations.orthogonal(conv(16, 16)),
    ],
    ids=["by input", "of all", "spectral", "spectral by a hook", "orthogonal"],
)
def test_what_a_norm_reads_stays(middle: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = between(middle()).eval()
    x = example(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(TargetError, match="no channels to prune"):
        torchprune.sparsify(net, ChannelSpec(0.5), [x], progress=False)
    net[0].weight.data[:4] = 0
    net[0].bias.data[:4] = 0
    net[4].weight.data[:, :4] = 0
    want = outputs(net, x)
    plan = torchprune.plan_shrink(net, x)
    torchprune.shrink(net, plan)
    assert close(outputs(net, x), want, 1e-5)
    assert net.state_dict().keys() == before.keys()


def test_a_norm_in_training_is_not_run_to_learn_sizes() -> None:
    net = Sequential(
        parametrizations.spectral_norm(nn.Linear(8, 8)),
        nn.ReLU(),
        nn.Linear(8, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    ).eval()
    x = torch.randn(2, 8)
    torchprune.sparsify(net, NeuronSpec(0.5), [x], progress=False)
    plan = torchprune.plan_shrink(net, x)
    before = {k: v.clone() for k, v in net[0].state_dict().items()}
    torchprune.shrink(net.train(), plan)
    assert all(torch.equal(v, before[k]) for k, v in net[0].state_dict().items())
    assert net[0].training
