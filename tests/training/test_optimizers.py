"""Zeros stay zeros whatever an optimizer remembers, and kept weights learn as by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, Pruner
from torchprune.masking.mask import masked_layers, original_of
from torchprune.specs.patterns import prune_count
from torchprune.training import (
    SET,
    Constant,
    Cosine,
    Cubic,
    Iterative,
    Linear,
    MagnitudeRegrowth,
    OneShot,
    RigL,
)


class Lion(torch.optim.Optimizer):
    """Signs of a momentum, with decay (Chen et al., arXiv 2302.06675): nobody's own kernels."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                m = state["exp_avg"]
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_((0.9 * m + 0.1 * p.grad).sign(), alpha=-group["lr"])
                m.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=False
    ),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, dampening=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3, foreach=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3, fused=True),
    "adamw by one": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05, lambd=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02, weight_decay=0.1),
    "lion": lambda p: Lion(p),
}


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 12), nn.GELU(), nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 8, 3), nn.Flatten()
    )


def assert_laws(model: nn.Module, optimizer: Any, count: float | None, pattern: str) -> None:
    """Zeros are `+0.0` where masks prune, nothing is remembered there, counts are exact."""
    for layer, mask in masked_layers(model):
        keep, weight = mask.mask, original_of(layer.module, layer.tensor)
        gone = weight.detach()[~keep]
        assert bool((gone == 0).all())
        assert not bool(torch.signbit(gone).any())
        assert torch.equal(getattr(layer.module, layer.tensor), weight)
        for name, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                fresh = 0.01 if name == "step_size" else 0.0  # Rprop's
                tiny = 1e-7 if name == "exp_inf" else 0.0  # Adamax's epsilon
                assert bool(((value[~keep] - fresh).abs() <= tiny).all()), name
        if count is not None and pattern == "unstructured":
            assert int((~keep).sum()) == prune_count(keep.numel(), count)
        if count == 0.5 and pattern == "2:4":
            groups = keep.flatten(1).reshape(len(keep), -1, 4) if keep.dim() == 2 else None
            if groups is not None:
                assert bool((groups.sum(-1) == 2).all())


SCHEDULES = st.one_of(
    st.builds(lambda s, at: OneShot(s, at=at), st.just(0.5), st.integers(0, 6)),
    st.builds(
        lambda kind, low, start, length, every: kind(low, 0.5, start, start + length, every),
        st.sampled_from([Linear, Cubic, Cosine]),
        st.floats(0, 0.4),
        st.integers(0, 3),
        st.integers(1, 9),
        st.integers(1, 4),
    ),
    st.builds(lambda r, s, e: Iterative(0.0, 0.5, r, s, e), *[st.integers(1, 4)] * 3),
    st.builds(lambda e: Constant(0.5, end=8, every=e), st.integers(1, 4)),
)


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=6, deadline=None)
@given(
    SCHEDULES,
    st.sampled_from(["unstructured", "2:4"]),
    st.sampled_from([None, SET(0.4), RigL(0.5), MagnitudeRegrowth()]),
    st.sampled_from(["plain", "clipped", "accumulated", "autocast", "scaled", "closure"]),
    st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
)
def test_laws_hold_after_every_step(
    name: str, schedule: Any, pattern: str, regrow: Any, manner: str, dtype: torch.dtype
) -> None:
    if isinstance(schedule, OneShot) and isinstance(regrow, RigL) and schedule.end == 0:
        regrow = None
    if dtype == torch.float16 and name not in ("sgd", "momentum", "nesterov", "lion"):
        dtype = torch.float32  # the others' epsilons are 0 in it
    if name == "fused sgd":
        dtype = torch.float32  # torch 2.13's kernel mixes up the elements of bfloat16's momentum
    model = make().to(dtype)
    spec = MagnitudeSpec(
        None if pattern == "2:4" else 0.5, pattern=pattern, ignore=["3"] if pattern == "2:4" else ()
    )
    first = OPTIMIZERS[name](list(model.parameters()))
    pruner = Pruner(model, spec, schedule, regrow=regrow)
    scaled = manner == "scaled" and dtype != torch.float16
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=64.0)
    inputs = torch.Generator().manual_seed(1)

    def loss() -> Tensor:
        x = torch.randn(6, 8, generator=inputs).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=manner == "autocast"):
            return model(x).float().square().mean()  # type: ignore[no-any-return]

    for step in range(1, 12):
        if manner == "closure" and dtype == torch.float32:

            def closure() -> Tensor:
                first.zero_grad()
                value = loss()
                value.backward()
                return value

            first.step(closure if name != "lion" else None)
        else:
            for _ in range(2 if manner == "accumulated" else 1):
                scaler.scale(loss()).backward()
                if manner == "accumulated":
                    assert not pruner.step(first)
            if manner == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if manner == "scaled":
                scaler.step(first)
                scaler.update()
            else:
                first.step()
            first.zero_grad()
        pruner.step(first)
        if pruner.steps != step:  # a step that the scaler skipped, or none
            assert manner in ("scaled",)
            return
        assert_laws(model, first, schedule(step), pattern)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adafactor"])
@settings(max_examples=2, deadline=None)
@given(st.integers(1, 4))
def test_kept_weights_learn_as_by_hand(name: str, every: int) -> None:
    """A loop that zeroes weights, gradients and what is remembered by hand gives the same bits."""
    model = make()
    twin = copy.deepcopy(model)
    optimizer, by_hand = (OPTIMIZERS[name](list(m.parameters())) for m in (model, twin))
    schedule = Linear(0.0, 0.75, start=1, end=8, every=every)
    pruner = Pruner(model, MagnitudeSpec(0.75), schedule)
    own = {"0.weight": twin[0].weight, "3.weight": twin[3].weight}
    keep = {key: torch.ones_like(w, dtype=torch.bool) for key, w in own.items()}
    for step in range(1, 12):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        for m, o in ((model, optimizer), (twin, by_hand)):
            m(x).square().mean().backward()
            if m is twin:
                for key, w in own.items():
                    w.grad = torch.where(keep[key], w.grad, 0)  # type: ignore[arg-type]
            o.step()
            o.zero_grad()
        pruner.step(optimizer)
        for key, w in own.items():
            w.data[~keep[key]] = 0
            if schedule.changes_at(step):
                gone = prune_count(w.numel(), schedule(step))
                size = w.detach().abs().flatten().tolist()
                order = sorted(range(w.numel()), key=lambda i, size=size: (size[i], i))
                keep[key].view(-1)[order[:gone]] = False
                w.data[~keep[key]] = 0
                for n, value in by_hand.state[w].items():
                    if isinstance(value, Tensor) and value.shape == w.shape:
                        value[~keep[key]] = 0.01 if n == "step_size" else 0
            assert torch.equal(torchprune.masks(model)[key], keep[key])
    for a, b in zip(torchprune.fold(model).parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lbfgs_keeps_zeros() -> None:
    model = make()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    pruner = Pruner(model, MagnitudeSpec(0.5), Linear(0.0, 0.5, 1, 5))
    x = torch.randn(6, 8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = model(x).square().mean()
        value.backward()
        return value  # type: ignore[no-any-return]

    for step in range(1, 8):
        optimizer.step(closure)
        pruner.step(optimizer)
        assert pruner.steps == step
        for layer, mask in masked_layers(model):
            assert bool((getattr(layer.module, layer.tensor)[~mask.mask] == 0).all())


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_states_in_few_bits_forget_too(kind: str) -> None:
    low_bit = pytest.importorskip("torchao.optim")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
    optimizer = getattr(low_bit, kind)(model.parameters(), lr=1e-2, weight_decay=0.1)
    pruner = Pruner(model, MagnitudeSpec(0.5), Constant(0.5, end=9, every=3), regrow=SET(0.3))
    seen = 0
    for _ in range(7):
        model(torch.randn(16, 128)).square().mean().backward()
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        optimizer.zero_grad()
        pruner.step(optimizer)
        for layer, mask in masked_layers(model):
            weight = original_of(layer.module, layer.tensor)
            assert bool((weight[~mask.mask] == 0).all())
            for value in optimizer.state[weight].values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    seen += type(value) is not Tensor
                    whole = value.dequantize() if type(value) is not Tensor else value
                    least = 1e-6 if kind == "AdamW4bit" else 0  # whose codes of squares have no 0
                    assert bool((whole[~mask.mask].abs() <= least).all())
    assert seen


def test_hidden_values_do_not_drift() -> None:
    """What pruning hid comes back as it was when it went, whatever was learnt since."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    pruner = Pruner(model, MagnitudeSpec(0.5), OneShot(0.5, at=2), reversible=True)
    for step in range(1, 9):
        model(torch.randn(6, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            before = {k: original_of(y.module, y.tensor).clone() for k, y in layers(model).items()}
        pruner.step(optimizer)
    keep = torchprune.masks(model)
    torchprune.densify(model)
    for key, weight in before.items():
        now = dict(model.named_parameters())[key]
        assert torch.equal(now[~keep[key]], weight[~keep[key]])
        assert not torch.equal(now[keep[key]], weight[keep[key]])


def layers(model: nn.Module) -> dict[str, Any]:
    return {layer.key: layer for layer, _ in masked_layers(model)}


def test_regrown_weights_begin_afresh() -> None:
    """Growth starts at 0 with nothing remembered, though the weight was trained before it went."""
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    pruner = Pruner(model, MagnitudeSpec(0.5), Constant(0.5, end=40, every=4), regrow=SET(0.5))
    grown = 0
    for _ in range(12):
        before = torchprune.masks(model)
        model(torch.randn(6, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(optimizer)
        for key, layer in layers(model).items():
            comes = torchprune.masks(model)[key] & ~before[key]
            weight = original_of(layer.module, layer.tensor)
            grown += int(comes.sum())
            assert bool((weight[comes] == 0).all())
            for value in optimizer.state[weight].values():
                if value.shape == weight.shape:
                    assert bool((value[comes] == 0).all())
    assert grown > 10
