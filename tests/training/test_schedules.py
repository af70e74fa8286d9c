"""Schedules: staircases from one sparsity to another, written out by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprune.errors import SpecError
from torchprune.training import Constant, Cosine, Cubic, Iterative, Linear, OneShot
from torchprune.training.schedules import Schedule

BY_HAND: dict[type[Schedule], Callable[[float, float, float], float]] = {
    Linear: lambda a, b, p: a + (b - a) * p,
    Cubic: lambda a, b, p: b + (a - b) * (1 - p) * (1 - p) * (1 - p),
    Cosine: lambda a, b, p: b + (a - b) * (0.5 + math.cos(math.pi * p) / 2),
}
SHARES = st.floats(0, 0.99)


@given(
    st.sampled_from(list(BY_HAND)),
    st.tuples(SHARES, SHARES).map(sorted),
    st.integers(0, 50),
    st.integers(1, 200),
    st.integers(1, 60),
)
def test_rising_schedules_are_the_formula_on_a_staircase(
    kind: type, levels: list[float], start: int, length: int, every: int
) -> None:
    low, high = levels
    end = start + length
    schedule = kind(low, high, start=start, end=end, every=every)
    before = 0.0
    for step in range(end + 5):
        now = schedule(step)
        if step < start:
            assert now == 0
            assert not schedule.changes_at(step)
        elif step >= end:
            assert now == high
        else:
            stair = max(s for s in range(start, end, every) if s <= step)
            wanted = BY_HAND[kind](low, high, (stair - start) / length)
            assert now == pytest.approx(wanted, abs=1e-12)
        assert before <= now + 1e-12
        if now != before and step > start:
            assert schedule.changes_at(step)
        before = now
    changes = [s for s in range(end + 5) if schedule.changes_at(s)]
    assert changes[: changes.index(end) + 1] == sorted({*range(start, end, every), end})


@given(
    st.tuples(SHARES, SHARES).map(sorted),
    st.integers(1, 12),
    st.integers(0, 9),
    st.integers(1, 9),
)
def test_rounds_prune_the_same_share_of_what_is_left(
    levels: list[float], rounds: int, start: int, every: int
) -> None:
    low, high = levels
    schedule = Iterative(low, high, rounds, start=start, every=every)
    kept = [1 - low, *(1 - level for level in schedule.levels)]
    ratio = ((1 - high) / (1 - low)) ** (1 / rounds)
    for before, after in itertools.pairwise(kept):
        assert after == pytest.approx(before * ratio, rel=1e-9, abs=1e-11)
    assert schedule.levels[-1] == high
    for k, level in enumerate(schedule.levels):
        for step in range(start + k * every, start + (k + 1) * every):
            assert schedule(step) == level
    assert schedule.end == start + (rounds - 1) * every


def test_levels_are_the_decimals_that_are_meant() -> None:
    assert Iterative(0.0, 0.488, 3).levels == (0.2, 0.36, 0.488)


def test_constant_and_one_shot_jump() -> None:
    shot = OneShot(0.7, at=5)
    assert [shot(s) for s in (0, 4, 5, 6, 99)] == [0, 0, 0.7, 0.7, 0.7]
    assert [s for s in range(99) if shot.changes_at(s)] == [5]
    constant = Constant(0.7, start=2, end=9, every=3)
    assert [constant(s) for s in (0, 1, 2, 8, 99)] == [0, 0, 0.7, 0.7, 0.7]
    assert [s for s in range(99) if constant.changes_at(s)] == [2, 5, 8, 9]
    assert [s for s in range(7) if Constant(0.7, every=3).changes_at(s)] == [0, 3, 6]


def test_schedules_are_frozen_values() -> None:
    schedule = Cubic(0.0, 0.8, start=1, end=9)
    assert schedule == Cubic(0.0, 0.8, start=1, end=9)
    assert hash(schedule) == hash(Cubic(0.0, 0.8, start=1, end=9))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.final = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cubic(0.0, 1.0, start=0, end=5), r"Cubic: sparsities are shares .* got 1.0"),
        (lambda: Linear(-0.1, 0.5, start=0, end=5), r"got -0.1"),
        (lambda: Linear(0.6, 0.5, start=0, end=5), r"rises from initial to final"),
        (lambda: Cosine(0.1, 0.5, start=5, end=4), r"start=5 comes after end=4"),
        (lambda: Cosine(0.1, 0.5, start=5, end=5), r"use OneShot\(0.5, at=5\)"),
        (lambda: Cubic(0.1, 0.5, start=0, end=5, every=0), r"every must be a whole number above 0"),
        (lambda: Cubic(0.1, 0.5, start=0.5, end=5), r"start is an optimizer step"),
        (lambda: OneShot(0.5, at=-1), r"OneShot: at is an optimizer step, from 0 on, got -1"),
        (lambda: OneShot("2:4"), r"OneShot: sparsities are shares"),
        (lambda: Iterative(0.1, 0.5, rounds=0), r"rounds must be a whole number"),
        (lambda: Constant(True), r"got True"),
        (lambda: Constant(0.5, until=9), r"no option 'until'"),
    ],
)
def test_what_makes_no_schedule_is_refused(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()
