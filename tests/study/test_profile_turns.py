"""Turns and spreads, on a clock that the contenders move themselves."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchprune.study.speed.layer_turns import watch_layers
from torchprune.study.speed.spreads import changed_sum, draws, latency_of, ratio_of
from torchprune.study.speed.turns import Pace, orders_of, take_turns


class Time:
    """A clock that stands still but for those who say that they work."""

    def __init__(self) -> None:
        self.now = 0.0
        self.said: list[str] = []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def work() -> None:
            self.said.append(name)
            self.now += seconds()

        return work


@given(st.integers(1, 7), st.integers(0, 99))
def test_every_block_of_orders_gives_each_every_place_once(count, seed):
    names = [f"c{k}" for k in range(count)]
    orders = orders_of(names, seed)
    for _ in range(3):
        block = [next(orders) for _ in range(count)]
        assert all(sorted(order) == names for order in block)
        for place in range(count):
            assert sorted(order[place] for order in block) == names


def test_all_have_as_many_rounds_and_the_true_time():
    time = Time()
    runs = {"slow": time.worker("slow", lambda: 0.3), "quick": time.worker("quick", lambda: 0.02)}
    found = take_turns(runs, Pace(seconds=1.55, warm_up=3), clock=time)
    assert {len(times) for times in found.seconds.values()} == {10}  # 3.1 s for both, 0.32 a round
    assert found.seconds["slow"] == pytest.approx([0.3] * 10)
    assert found.seconds["quick"] == pytest.approx([0.02] * 10)
    warm, turns = time.said[:12], time.said[12:]
    assert Counter(warm) == {"slow": 6, "quick": 6}  # three, and three to see how long they take
    assert turns[0:4] != turns[2:6]  # orders change


def test_short_calls_are_repeated_and_the_first_of_a_turn_is_not_timed():
    time, calls = Time(), [0]

    def cold_then_warm() -> float:
        calls[0] += 1
        return 0.001

    found = take_turns(
        {"short": time.worker("short", cold_then_warm)}, Pace(seconds=1e-9, least=3), clock=time
    )
    assert found.repeats == {"short": 10}
    assert found.seconds["short"] == pytest.approx([0.001] * 3)
    assert calls[0] == 2 + 3 + 3 * (1 + 10)


def test_a_first_cold_call_does_not_count():
    time, last = Time(), [""]

    def cost(name: str) -> Callable[[], float]:
        def seconds() -> float:
            cold = last[0] != name
            last[0] = name
            return 0.005 if cold else 0.001

        return seconds

    runs = {name: time.worker(name, cost(name)) for name in "ab"}
    found = take_turns(runs, Pace(seconds=1e-9, least=4), clock=time)
    assert found.seconds == {n: pytest.approx([0.001] * 4) for n in "ab"}


def test_a_call_from_which_the_processor_was_taken_does_not_count():
    """Neither in a turn, nor when it is found out how many calls make one."""
    time, calls = Time(), count()

    def seconds() -> float:
        return 0.1 if next(calls) % 5 == 2 else 0.002

    found = take_turns({"a": time.worker("a", seconds)}, Pace(seconds=1e-9), clock=time)
    assert found.repeats == {"a": 5}
    assert found.seconds["a"] == pytest.approx([0.002] * 5)


def test_least_and_most_bound_the_rounds():
    time = Time()
    runs = {"a": time.worker("a", lambda: 1.0)}
    assert len(take_turns(runs, Pace(seconds=0.1, least=7), clock=time).seconds["a"]) == 7
    assert len(take_turns(runs, Pace(seconds=99, most=6), clock=time).seconds["a"]) == 6


def test_who_raises_drops_out_and_the_others_go_on():
    time, left = Time(), iter(range(7))

    def breaks() -> float:
        if next(left, None) is None:
            raise RuntimeError("out of luck\nand more")
        return 0.1

    def never() -> float:
        raise ValueError("never ran")

    runs = {
        "good": time.worker("good", lambda: 0.1),
        "breaks": time.worker("breaks", breaks),
        "never": time.worker("never", never),
    }
    found = take_turns(runs, Pace(seconds=0.8), clock=time)
    assert found.failed == {
        "breaks": "RuntimeError: out of luck",
        "never": "ValueError: never ran",
    }
    assert set(found.seconds) == {"good"}
    assert len(found.seconds["good"]) >= 5


def test_the_collector_is_off_in_turns_and_as_before_after():
    time, seen = Time(), list[bool]()

    def look() -> float:
        seen.append(gc.isenabled())
        return 1.0

    assert gc.isenabled()
    take_turns({"a": time.worker("a", look)}, Pace(seconds=1), clock=time)
    assert gc.isenabled()
    assert not any(seen[-3:])


def test_the_device_is_waited_for_around_every_turn():
    time, queued = Time(), [0.0]

    def settle() -> None:
        time.now += queued[0]
        queued[0] = 0.0

    def launch() -> None:  # as a GPU: returns at once
        queued[0] += 0.5

    found = take_turns({"gpu": launch}, Pace(seconds=1), clock=time, settle=settle)
    assert found.seconds["gpu"] == pytest.approx([0.5] * len(found.seconds["gpu"]))


# -- spreads ---------------------------------------------------------------------------------------

times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40)


@given(times)
def test_quantiles_are_in_order_and_within(seconds):
    found = latency_of(seconds)
    assert min(seconds) <= found.low <= found.median <= found.high <= max(seconds)
    assert found.rounds == len(seconds)


def test_the_median_of_known_rounds():
    found = latency_of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.low, found.median, found.high) == pytest.approx((1.4, 3.0, 4.6))


@given(times, st.floats(0.01, 100))
def test_a_ratio_of_paired_rounds_is_exact_where_one_is_a_multiple(seconds, factor):
    """However noisy the rounds are, since both are resampled together."""
    found = ratio_of([factor * s for s in seconds], seconds)
    assert (found.low, found.value, found.high) == pytest.approx((factor,) * 3)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng, inside = random.Random(0), 0
    for _ in range(60):
        noise = [rng.lognormvariate(0, 0.1) for _ in range(40)]
        mine = [1.2 * n * rng.lognormvariate(0, 0.05) for n in noise]
        found = ratio_of(mine, noise)
        inside += found.low <= 1.2 <= found.high
        assert found.low <= found.value <= found.high
    assert 48 <= inside <= 60


def test_rounds_that_are_not_paired_are_refused():
    with pytest.raises(ValueError, match="paired, got 2 and 1"):
        ratio_of([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="paired, got 0 and 0"):
        ratio_of([], [])


@given(st.integers(1, 60))
def test_draws_are_runs_of_neighbours(rounds):
    drawn, length = draws(rounds), max(1, round(rounds ** (1 / 3)))
    assert drawn.shape == (1000, rounds)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < rounds
    first = drawn[:, :length]
    assert ((first[:, 1:] - first[:, :-1]) % rounds == 1 % rounds).all()


def test_a_sum_with_parts_exchanged():
    whole, old, new = [10.0] * 9, [1.0] * 7, [0.25] * 7
    found = changed_sum(whole, {"a": (4, new, old), "b": (2, [3.0] * 5, [2.0] * 5)})
    assert (found.low, found.value, found.high) == pytest.approx(((10 - 3 + 2) / 10,) * 3)
    assert changed_sum(whole, {}).value == 1.0
    assert changed_sum(whole, {"a": (99, new, old)}).value == 0.0


# -- layers ----------------------------------------------------------------------------------------


class Costly(nn.Linear):
    """A layer that takes the time it is told to."""

    def __init__(self, time: Time, seconds: float) -> None:
        super().__init__(2, 2)
        self.time, self.cost = time, seconds

    def forward(self, x):
        self.time.now += self.cost
        return super().forward(x)


class Net(nn.Module):
    def __init__(self, time: Time) -> None:
        super().__init__()
        self.once, self.twice, self.never = (Costly(time, s) for s in (0.1, 0.2, 0.4))
        self.time = time

    def forward(self, x):
        self.time.now += 0.5
        return self.twice(self.once(self.twice(x)))


def test_layers_have_their_own_time_and_those_used_twice_both():
    import torch

    time = Time()
    net, x = Net(time), torch.ones(1, 2)
    found = watch_layers(
        {"net": (net, lambda: net(x))}, Pace(seconds=1), clock=time, settle=lambda: None
    )["net"]
    rounds = len(found.whole)
    assert rounds >= 5
    assert found.layers == {
        "once": pytest.approx([0.1] * rounds),
        "twice": pytest.approx([0.4] * rounds),
    }
    assert found.inside == pytest.approx([0.5] * rounds)
    assert not net.once._forward_hooks
    assert not net.once._forward_pre_hooks
