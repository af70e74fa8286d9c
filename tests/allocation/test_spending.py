"""One budget spent on many groups: met, by no more than it needs, at about the least cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchprune.allocation.spending import spent
from torchprune.structure.ledger import Account, Item, Ledger, Use, counted


def account_of(ledger: Ledger, counts: list[int], width: int = 1) -> Account:
    """By steps of so many units; the first units go first."""
    orders = [torch.arange(count) for count in counts]
    steps = [torch.arange(0, count, width) for count in counts]
    account = ledger.of(orders, steps)
    account.open([0] * len(counts), ())
    return account


def chain(counts: list[int], width: int = 3) -> Ledger:
    """Matrices between the groups, as in a plain net: what one saves depends on its neighbours."""
    sizes = [width, *counts, width]
    items = [
        Item((b, a), (f"{at}.weight",), counted(a * b, (b, a)))
        for at, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    uses = [
        [Use(at, 0, torch.ones(n).long()), Use(at + 1, 1, torch.ones(n).long())]
        for at, n in enumerate(counts)
    ]
    return Ledger(items, uses)


def apart(counts: list[int], sizes: list[int]) -> Ledger:
    """Every group by itself: a unit of it always saves the same."""
    items = [
        Item((n,), (f"{at}.weight",), counted(n * size, (n,)))
        for at, (n, size) in enumerate(zip(counts, sizes, strict=True))
    ]
    return Ledger(items, [[Use(at, 0, torch.ones(n).long())] for at, n in enumerate(counts)])


def convex(generator: torch.Generator, steps: int) -> Tensor:
    """A cost that rises faster and faster."""
    each = torch.rand(steps, generator=generator, dtype=torch.float64).sort().values
    return torch.cat([torch.zeros(1, dtype=torch.float64), each[1:].cumsum(0)])


def total_at(ledger: Ledger, counts: list[int], state: tuple[int, ...]) -> float:
    account = account_of(ledger, counts)
    account.open(list(state), ())
    return account.total


nets = st.lists(st.integers(2, 5), min_size=1, max_size=4)


@given(nets, st.floats(0.3, 1.0), st.integers(0, 999), st.booleans())
def test_a_budget_is_met_and_nothing_could_stay(
    counts: list[int], share: float, seed: int, coupled: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (len(counts),), generator=generator).tolist()
    ledger = chain(counts) if coupled else apart(counts, sizes)
    costs = [convex(generator, n) for n in counts]
    account = account_of(ledger, counts)
    budget = share * account.total
    met = spent(account, costs, budget)
    least = total_at(ledger, counts, tuple(n - 1 for n in counts))
    assert met == (least <= budget)
    assert account.total == total_at(ledger, counts, tuple(account.now))
    if not met:
        assert account.now == [n - 1 for n in counts]
        return
    assert account.total <= budget
    for at, step in enumerate(account.now):
        if step:
            back = tuple(n - (at == other) for other, n in enumerate(account.now))
            assert total_at(ledger, counts, back) > budget


@settings(max_examples=15)
@given(nets, st.floats(0.3, 0.95), st.integers(0, 999), st.booleans())
def test_the_cost_is_within_a_step_of_brute_force(
    counts: list[int], share: float, seed: int, coupled: bool
) -> None:
    """Where units save the same whatever else goes and cost more and more, greedy choice is the
    best up to its last step; between matrices it is nearly so."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (len(counts),), generator=generator).tolist()
    ledger = chain(counts) if coupled else apart(counts, sizes)
    costs = [convex(generator, n) for n in counts]
    account = account_of(ledger, counts)
    budget = share * account.total
    if not spent(account, costs, budget):
        return
    found = sum(float(cost[step]) for cost, step in zip(costs, account.now, strict=True))
    best = min(
        sum(float(cost[step]) for cost, step in zip(costs, state, strict=True))
        for state in itertools.product(*(range(n) for n in counts))
        if total_at(ledger, counts, state) <= budget
    )
    step = max(float(cost.diff().max()) for cost in costs)
    assert found <= (1.3 if coupled else 1.0) * best + step + 1e-12


def test_steps_that_pay_only_together_go_together() -> None:
    """A first step that saves nothing, as where a kernel's time is a staircase."""

    def stairs(now: list[Tensor]) -> Tensor:
        return (now[0] // 4 * 4).double()

    ledger = Ledger(
        [Item((8,), ("a",), stairs), Item((8,), ("b",), counted(8, (8,)))],
        [[Use(0, 0, torch.ones(8).long())], [Use(1, 0, torch.ones(8).long())]],
    )
    account = account_of(ledger, [8, 8])
    cheap, dear = torch.arange(8).double() * 0.1, torch.arange(8).double()
    assert spent(account, [cheap, dear], 12)
    assert account.now == [1, 0] or account.total <= 12
    assert account.now[1] == 0


@given(nets, st.integers(0, 99))
def test_a_ledger_along_a_group_is_the_ledger_at_each_step(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ledger = chain(counts)
    state = [int(torch.randint(n, (1,), generator=generator)) for n in counts]
    account = account_of(ledger, counts)
    account.open(state, ())
    for at, count in enumerate(counts):
        along = account.along(at)
        for step in range(count):
            other = (*state[:at], step, *state[at + 1 :])
            change = float(along[step] - along[state[at]])
            assert account.total + change == total_at(ledger, counts, other)


def test_what_lies_in_a_block_goes_with_it() -> None:
    items = [
        Item((4,), ("blocks.1.up", "blocks.1.down"), counted(4, (4,))),
        Item((8,), ("blocks.1.up", "head"), counted(8, (8,))),  # tied to what stays
        Item((16,), ("blocks.10.up",), counted(16, (16,))),
    ]
    account = Ledger(items, []).of([], [])
    account.open([], ())
    assert account.total == 28
    account.open([], {"blocks.1"})
    assert account.total == 24


@pytest.mark.parametrize("budget", [0, 100])
def test_nothing_goes_for_a_budget_that_is_met(budget: int) -> None:
    account = account_of(apart([4], [3]), [4])
    assert spent(account, [torch.arange(4).double()], budget) == (budget == 100)
    assert account.now == ([0] if budget else [3])
