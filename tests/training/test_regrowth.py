"""Regrowth by literal loops: what goes, what comes, how many."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import torchprune
from torchprune import NM, Block, MagnitudeSpec, Pruner, Unstructured
from torchprune.masking.projection import project_each
from torchprune.specs.goals import Goal
from torchprune.specs.patterns import prune_count
from torchprune.training import SET, Constant, Cubic, MagnitudeRegrowth, RigL
from torchprune.training.regrowth import exchanged

PATTERNS = st.sampled_from(
    [
        *((Unstructured(), scope) for scope in ("layer", "row", "global")),
        *((NM(n, 4), "layer") for n in (1, 2)),
        *((Block(2, 4), scope) for scope in ("layer", "row")),
    ]
)


def drawn(seed: int, shapes: list[tuple[int, int]], *, ties: bool) -> list[Tensor]:
    own = torch.Generator().manual_seed(seed)
    found = [torch.rand(shape, generator=own) for shape in shapes]
    return [(f * 4).round() for f in found] if ties else found


@settings(max_examples=80, deadline=None)
@given(
    PATTERNS,
    st.floats(0, 0.9),
    st.floats(0, 0.6),
    st.floats(0, 0.95),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_counts_and_patterns_are_those_of_a_fresh_mask(
    kind: tuple[Any, str],
    sparsity: float,
    before: float,
    share: float,
    matrices: int,
    ties: bool,
    seed: int,
) -> None:
    pattern, scope = kind
    sparsity = float(pattern.sparsity) if isinstance(pattern, NM) else sparsity
    shapes = [(4, 8 * (i + 1)) for i in range(matrices)]
    worth, promise = drawn(seed, shapes, ties=ties), drawn(seed + 1, shapes, ties=ties)
    if isinstance(pattern, NM):
        kept = [torch.ones(shape, dtype=torch.bool) for shape in shapes]
        if before > 0.3:
            kept = project_each(drawn(seed + 2, shapes, ties=False), pattern, sparsity, scope)
    else:
        start = drawn(seed + 2, shapes, ties=False)
        kept = project_each(start, pattern, min(before, sparsity), scope)
    goal = Goal(pattern, sparsity)
    found = exchanged(worth, promise, kept, goal, scope, share)
    fresh = project_each(worth, pattern, sparsity, scope)
    if scope == "global":
        assert sum(int(k.sum()) for k in found) == sum(int(k.sum()) for k in fresh)
    for one, other in zip(found, fresh, strict=True):
        if scope == "row":
            assert torch.equal(one.sum(1), other.sum(1))
        elif scope == "layer":
            assert int(one.sum()) == int(other.sum())
        if isinstance(pattern, NM):
            groups = one.reshape(len(one), -1, pattern.m).sum(-1)
            assert bool((groups == pattern.n).all())
        if isinstance(pattern, Block):
            tiles = one.reshape(2, 2, -1, 4)
            assert bool((tiles.all(3).all(1) == tiles.any(3).any(1)).all())


@settings(max_examples=60, deadline=None)
@given(st.floats(0.1, 0.9), st.floats(0, 0.9), st.integers(0, 999))
def test_the_weakest_go_and_the_most_promising_come(
    sparsity: float, share: float, seed: int
) -> None:
    """One matrix, unstructured, against sorted lists."""
    [worth], [promise] = drawn(seed, [(3, 8)], ties=False), drawn(seed + 1, [(3, 8)], ties=False)
    [start] = drawn(seed + 2, [(3, 8)], ties=False)
    goal = Goal(Unstructured(), sparsity)
    [kept] = project_each([start], Unstructured(), sparsity, "layer")
    [found] = exchanged([worth], [promise], [kept], goal, "layer", share)
    places = range(24)
    now = [i for i in places if kept.view(-1)[i]]
    by_worth = sorted(now, key=lambda i: float(worth.view(-1)[i]))
    pruned = prune_count(24, 1 - (1 - sparsity) * (1 - share))
    safe = set(by_worth[max(0, pruned - (24 - len(now))) :]) if share > 0 else set(now)
    rest = sorted(set(places) - safe, key=lambda i: -float(promise.view(-1)[i]))
    wanted = safe | set(rest[: len(now) - len(safe)])
    assert {i for i in places if found.view(-1)[i]} == wanted


def test_nothing_comes_where_nothing_is_known() -> None:
    worth = [torch.rand(4, 8), torch.rand(4, 8)]
    kept = [torch.rand(4, 8) > 0.3 for _ in worth]
    goal = Goal(Unstructured(), 0.75)
    found = exchanged(worth, [None, None], kept, goal, "layer", 0.5)
    for old, new in zip(kept, found, strict=True):
        assert bool((new <= old).all())
    mixed = exchanged(worth, [None, torch.rand(4, 8)], kept, goal, "layer", 0.5)
    assert bool((mixed[0] <= kept[0]).all())
    assert bool((mixed[1] & ~kept[1]).any())


def test_gradients_that_overflowed_are_only_large() -> None:
    promise = torch.zeros(2, 8)
    promise[0, 3], promise[1, 2], promise[1, 5] = torch.inf, torch.nan, -torch.inf
    kept = torch.zeros(2, 8, dtype=torch.bool)
    goal = Goal(Unstructured(), 0.875)
    [found] = exchanged([torch.rand(2, 8)], [promise], [kept], goal, "layer", 0.0)
    assert found.nonzero().tolist() == [[0, 3], [1, 5]]


# -- in models -------------------------------------------------------------------------------------


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_rigl_grows_where_the_dense_gradient_is_largest(compiled: bool, accumulate: int) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    spec = MagnitudeSpec(0.5, targets=["0", "2"])
    pruner = Pruner(model, spec, Constant(0.5, end=100, every=3), regrow=RigL(0.4))
    grown = 0
    for step in range(1, 7):
        before = torchprune.masks(model)
        dense = {k: torch.zeros_like(m, dtype=torch.float32) for k, m in before.items()}
        batches = [torch.randn(6, 8) for _ in range(accumulate)]
        for x in batches:
            act = {k: v.detach().requires_grad_() for k, v in plain(model).items()}
            functional_call(net(), act, (x,)).square().sum().backward()
            for key in dense:
                dense[key] += act[key].grad
            run(x).square().sum().backward()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
        after = torchprune.masks(model)
        for key, old in before.items():
            if step % 3:
                assert torch.equal(old, after[key])
                continue
            comes, size = after[key] & ~old, dense[key].abs()
            grown += int(comes.sum())
            never = ~old & ~after[key]
            assert float(size[comes].min()) >= float(size[never].max()) - 1e-6
            assert int(after[key].sum()) == int(old.sum())
    assert grown > 10


def plain(model: nn.Module) -> dict[str, Tensor]:
    return {f"{n}.{t}": getattr(model[int(n)], t) for n in "024" for t in ("weight", "bias")}


def test_magnitude_regrowth_brings_old_values_back() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    weight = model[0].weight
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    schedule = Constant(0.5, end=9)
    pruner = Pruner(model, MagnitudeSpec(0.5), schedule, regrow=MagnitudeRegrowth())
    assert weight.tolist() == [[pytest.approx(0.4), pytest.approx(0.3), 0, 0]]
    with torch.no_grad():
        weight[0, 0] = 0.05  # shrinks below what was pruned
    assert pruner.step()
    assert weight.tolist() == [[0, pytest.approx(0.3), pytest.approx(0.2), 0]]
    with torch.no_grad():
        weight[0, 1], weight[0, 2] = 0.01, 0.02
    assert pruner.step()
    assert weight.tolist() == [[pytest.approx(0.05), 0, 0, pytest.approx(0.1)]]


def test_set_draws_anew_each_time_and_the_same_from_one_seed() -> None:
    def grown(seed: int) -> list[Tensor]:
        model = net()
        spec, schedule = MagnitudeSpec(0.5, targets=["0", "2"]), Constant(0.5, end=9)
        pruner = Pruner(model, spec, schedule, regrow=SET(0.5), seed=seed)
        found = []
        for _ in range(3):
            before = torchprune.masks(model)
            pruner.step()
            found += [after & ~before[key] for key, after in torchprune.masks(model).items()]
        return found

    one, same, other = grown(0), grown(0), grown(1)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    flat = [tuple(g.flatten().nonzero().flatten().tolist()) for g in one]
    assert all(a != b for a, b in itertools.combinations(flat, 2))


def test_regrowth_goes_with_a_rising_schedule() -> None:
    model = net()
    schedule = Cubic(0.2, 0.75, start=1, end=9, every=2)
    pruner = Pruner(model, MagnitudeSpec(0.75), schedule, regrow=SET(0.3))
    for step in range(1, 12):
        pruner.step()
        for mask in torchprune.masks(model).values():
            assert int((~mask).sum()) == prune_count(mask.numel(), schedule(step))


def test_experts_and_convolutions_regrow_by_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 8, 1))
    schedule = Constant(0.5, end=20, every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, MagnitudeSpec(pattern="2:4"), schedule, regrow=RigL(0.5))
    first = torchprune.masks(model)
    for _ in range(4):
        model(torch.randn(2, 8, 5, 5)).square().mean().backward()
        optimizer.step()
        pruner.step(optimizer)
        for mask in torchprune.masks(model).values():
            groups = mask.permute(0, 2, 3, 1).reshape(-1, 4)
            assert bool((groups.sum(1) == 2).all())
    assert any(not torch.equal(first[k], m) for k, m in torchprune.masks(model).items())
