"""Units that carry a constant go; what only looks like one stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from structures import close, outputs
from torch import Tensor, nn
from torch.nn.utils import prune

import torchprune
from torchprune.structure.same_outputs import Fault

Sequential = nn.Sequential
FIVE = slice(0, 5)


def conv(i: int, o: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, size, **{"padding": size // 2, **options})


def cleared(layer: Any, *, bias: bool) -> Any:
    layer.weight.data[FIVE] = 0
    if bias and layer.bias is not None:
        layer.bias.data[FIVE] = 0
    return layer


def pruned_by_torch() -> nn.Module:
    layer = conv(3, 16, bias=False)
    prune.ln_structured(layer, "weight", 5, 2, 0)
    prune.remove(layer, "weight")
    return layer


def norm(*, weight: float, bias: float) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(16)
    made.running_mean.normal_()
    made.weight.data[FIVE], made.bias.data[FIVE] = weight, bias
    return made


class Residual(nn.Module):
    """Two ways to the same channels: both must be constant."""

    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.one, self.two = cleared(conv(3, 16), bias=True), conv(3, 16)
        if both:
            cleared(self.two, bias=True)
        self.last = conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.one(x) + self.two(x)))


class HalfDead(nn.Module):
    """One way is multiplied by zero; the other is dead here, and may not be on other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = conv(3, 16), norm(weight=0, bias=0), conv(3, 16)
        self.two.bias.data[FIVE] = -100
        self.last = conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.one(x)) + torch.relu(self.two(x)))


class TwoReaders(nn.Module):
    """One of the layers that read the constant can hold it, the other cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first = cleared(nn.Linear(8, 16), bias=False)
        self.good, self.bad = nn.Linear(16, 4), nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.first(x))
        return self.good(h) + self.bad(h)


GO: dict[str, Callable[[], nn.Module]] = {
    "filters by torch's own pruning": lambda: Sequential(pruned_by_torch(), nn.ReLU(), conv(16, 4)),
    "zero filters": lambda: Sequential(cleared(conv(3, 16), bias=True), nn.ReLU(), conv(16, 4)),
    "zero rows": lambda: Sequential(
        cleared(nn.Linear(8, 16), bias=True), nn.GELU(), nn.Linear(16, 4, bias=False)
    ),
    "zero rows, a bias that stays": lambda: Sequential(
        cleared(nn.Linear(8, 16), bias=False), nn.SiLU(), nn.Linear(16, 4)
    ),
    "a constant by its activation": lambda: Sequential(
        cleared(nn.Linear(8, 16), bias=True), nn.Sigmoid(), nn.Linear(16, 4)
    ),
    "a constant through an unpadded convolution": lambda: Sequential(
        cleared(conv(3, 16), bias=False), nn.Tanh(), conv(16, 4, padding=0)
    ),
    "a constant through one that repeats its border": lambda: Sequential(
        cleared(conv(3, 16), bias=False), nn.Tanh(), conv(16, 4, padding_mode="replicate")
    ),
    "norm of nothing": lambda: Sequential(
        conv(3, 16), norm(weight=0, bias=0), nn.ReLU(), conv(16, 4)
    ),
    "norm of a constant": lambda: Sequential(
        conv(3, 16), norm(weight=0, bias=0.3), nn.ReLU(), conv(16, 4, 1)
    ),
    "norm that is cut off": lambda: Sequential(
        conv(3, 16), norm(weight=0, bias=-0.3), nn.ReLU(), conv(16, 4)
    ),
    "zero filters before a norm": lambda: Sequential(
        cleared(conv(3, 16), bias=True), norm(weight=1, bias=0.2), nn.ReLU(), conv(16, 4, 1)
    ),
    "both of two ways": lambda: Residual(both=True),
    "pooled": lambda: Sequential(
        cleared(conv(3, 16), bias=False),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ),
}

STAY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a constant that borders change": (
        lambda: Sequential(cleared(conv(3, 16), bias=False), nn.Tanh(), conv(16, 4)),
        "pads with zeros",
    ),
    "no bias to hold it": (
        lambda: Sequential(
            cleared(nn.Linear(8, 16), bias=True), nn.Sigmoid(), nn.Linear(16, 4, bias=False)
        ),
        "has no bias",
    ),
    "one reader cannot": (TwoReaders, "bad reads them"),
    "one of two ways": (lambda: Residual(both=False), ""),
    "dead beside what is zero": (HalfDead, ""),
    "dead on these inputs": (
        lambda: Sequential(dead(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4)),
        "",
    ),
}


def dead(layer: nn.Linear) -> nn.Linear:
    layer.bias.data[FIVE] = -100
    return layer


def example(net: nn.Module) -> Tensor:
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return torch.randn(4, 8) if isinstance(first, nn.Linear) else torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("name", GO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_constants_go_exactly(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = GO[name]().eval().to(dtype)
    x = example(net).to(dtype)
    other = torch.randn_like(x) * 3
    before = {k: v.clone() for k, v in net.state_dict().items()}
    want = outputs(net, x), outputs(net, other)
    plan = torchprune.plan_shrink(net, x)
    assert [(r.before, r.after) for r in plan.removals] == [(16, 11)]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    torchprune.shrink(net, plan)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    assert close(outputs(net, x), want[0], tolerance)
    assert close(outputs(net, other), want[1], tolerance)
    assert not torchprune.plan_shrink(net, x)


@pytest.mark.parametrize("name", STAY)
def test_what_cannot_be_held_stays_with_a_note(name: str) -> None:
    torch.manual_seed(0)
    make, says = STAY[name]
    net = make().eval()
    x = example(net)
    plan = torchprune.plan_shrink(net, x)
    assert not plan
    assert says in " ".join(plan.notes)
    assert bool(says) == bool(plan.notes)


def test_a_refused_shrink_takes_the_constants_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = GO["a constant by its activation"]().eval()
    x = example(net)
    plan = torchprune.plan_shrink(net, x)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    monkeypatch.setattr("torchprune.structure.shrink.difference", lambda *_: Fault("differs"))
    with pytest.raises(torchprune.TorchpruneError, match="differs"):
        torchprune.shrink(net, plan)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.ReLU, nn.Tanh])
def test_one_unit_stays_and_speaks_for_itself(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    first = nn.Linear(8, 16)
    first.weight.data.zero_()
    net = Sequential(first, activation(), nn.Linear(16, 4)).eval()
    x = example(net)
    want = outputs(net, x)
    plan = torchprune.plan_shrink(net, x)
    torchprune.shrink(net, plan)
    assert net[0].out_features == 1
    assert close(outputs(net, x), want, 1e-5)


def test_masked_units_and_constants_go_together() -> None:
    torch.manual_seed(0)
    net = Sequential(cleared(nn.Linear(8, 32), bias=False), nn.Sigmoid(), nn.Linear(32, 4)).eval()
    x = example(net)
    torchprune.sparsify(net, torchprune.NeuronSpec(0.25), [x], progress=False)
    want = outputs(net, x)
    alive = int((net[2].weight != 0).any(0).sum())
    plan = torchprune.plan_shrink(net, x)
    torchprune.shrink(net, plan)
    assert net[0].out_features <= alive
    assert not (net[0].weight == 0).all(1).any()
    assert close(outputs(net, x), want, 1e-5)
