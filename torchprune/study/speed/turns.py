"""Contenders measured in turns, so that a busy machine hurts them alike."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from torchprune.calibration.documents import first_line

Run = Callable[[], object]


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        seconds: for each contender, all its rounds together.
        least, most: rounds, whatever the time.
        warm_up: calls of each that nobody counts.
        short: seconds; a turn of shorter calls is as many of them as take so long, of which the
            median counts, after one that is not timed, for it finds the caches as the contender
            before left them.
    """

    seconds: float = 1.0
    least: int = 5
    most: int = 200
    warm_up: int = 2
    short: float = 0.01


@dataclass
class Turns:
    """Seconds a call by contender, one for each round; and why some dropped out.

    Attributes:
        repeats: calls in a turn.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def take_turns(
    contenders: Mapping[str, Run],
    pace: Pace,
    *,
    clock: Callable[[], float],
    settle: Run = lambda: None,
    seed: int = 0,
    resting: Callable[[str], None] = lambda _: None,
) -> Turns:
    """Measure every contender once a round, in an order that changes from round to round.

    Each block of as many rounds as there are contenders gives each of them every place once. Who
    raises drops out, and is no more in any round.

    Args:
        clock: seconds, as `time.perf_counter`.
        settle: waits until the device has done what it was told; called around each turn.
        seed: of the orders.
        resting: is told a contender's name before each of its warm-ups, for a progress bar.
    """
    found, left = Turns(), dict[str, Run]()
    for name, run in contenders.items():
        resting(name)
        try:
            found.repeats[name] = _warm(run, pace, clock, settle)
        except Exception as error:
            found.failed[name] = reason_of(error)
            continue
        left[name], found.seconds[name] = run, []
    start, rounds = clock(), 0
    orders = orders_of(list(left), seed)
    with _without_collection():
        while left and rounds < pace.most:
            if rounds >= pace.least and clock() - start >= pace.seconds * len(left):
                break
            for name in next(orders):
                if name in left:
                    try:
                        took = _turn(left[name], found.repeats[name], pace, clock, settle)
                    except Exception as error:
                        found.failed[name] = reason_of(error)
                        del left[name], found.seconds[name]
                    else:
                        found.seconds[name].append(took)
            rounds += 1
    return found


def orders_of(names: Sequence[str], seed: int = 0) -> Iterator[list[str]]:
    """Endless orders: of each block of `len(names)`, every name has every place once."""
    rng = random.Random(seed)
    while True:
        some = rng.sample(names, len(names))
        for k in range(max(1, len(some))):
            yield [*some[k:], *some[:k]]


def reason_of(error: BaseException) -> str:
    """An error as a line."""
    return f"{type(error).__name__}: {first_line(error)}"


def _warm(run: Run, pace: Pace, clock: Callable[[], float], settle: Run) -> int:
    """Run it until it is warm; how many calls make a turn."""
    for _ in range(max(1, pace.warm_up)):
        run()
    settle()
    took = min(_seconds(run, clock, settle) for _ in range(3))  # others may have had the processor
    if took >= pace.short:
        return 1
    return min(1000, math.ceil(pace.short / max(took, 1e-7)))


def _turn(run: Run, repeats: int, pace: Pace, clock: Callable[[], float], settle: Run) -> float:
    if repeats > 1:
        run()
    settle()
    return median(_seconds(run, clock, settle) for _ in range(repeats))


def _seconds(run: Run, clock: Callable[[], float], settle: Run) -> float:
    start = clock()
    run()
    settle()
    return max(clock() - start, 1e-12)  # a time to divide by, on any clock


@contextmanager
def _without_collection() -> Iterator[None]:
    """No pause of the garbage collector within what is measured."""
    gc.collect()
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
