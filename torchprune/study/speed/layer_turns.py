"""Seconds of each layer inside calls of the whole model, contenders in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from torchprune.study.speed.layer_work import products_of
from torchprune.study.speed.turns import Pace, Run, orders_of


@dataclass
class Watched:
    """Of one contender: seconds of each layer by name, and of the whole call, a value a round."""

    layers: dict[str, list[float]] = field(default_factory=dict)
    whole: list[float] = field(default_factory=list)

    @property
    def inside(self) -> list[float]:
        """The share of each round's time that was in layers."""
        sums = [sum(times) for times in zip(*self.layers.values(), strict=True)]
        return [part / whole for part, whole in zip(sums, self.whole, strict=True) if whole > 0]


def watch_layers(
    contenders: Mapping[str, tuple[nn.Module, Run]],
    pace: Pace,
    *,
    clock: Callable[[], float],
    settle: Run,
    seed: int = 0,
) -> dict[str, Watched]:
    """Time each linear layer and convolution by hooks, where the model calls it.

    Several calls of one layer in a round add up; layers that a call does not reach are left out.
    On a GPU each layer is waited for, so that the sum is above what the whole takes without hooks.
    """
    found = {name: Watched() for name in contenders}
    orders, start, rounds = orders_of(list(contenders), seed), 0.0, -1
    while rounds < pace.most:
        if rounds == 0:
            start = clock()
        if rounds >= pace.least and clock() - start >= pace.seconds * len(contenders):
            break
        for name in next(orders):
            module, run = contenders[name]
            with _timed(module, clock, settle) as spent:
                settle()
                began = clock()
                run()
                settle()
                whole = clock() - began
            if rounds >= 0:  # the first is to warm up
                found[name].whole.append(whole)
                for layer, seconds in spent.items():
                    found[name].layers.setdefault(layer, []).append(seconds)
        rounds += 1
    for watched in found.values():  # a layer that only some rounds reached has no time of a call
        full = len(watched.whole)
        watched.layers = {k: v for k, v in watched.layers.items() if len(v) == full}
    return found


@contextmanager
def _timed(model: nn.Module, clock: Callable[[], float], settle: Run) -> Iterator[dict[str, float]]:
    """Seconds by layer, filled while the model runs."""
    spent: dict[str, float] = {}
    handles = []
    for name, module in products_of(model).items():
        began: list[float] = []

        def before(*_: object, began: list[float] = began) -> None:
            settle()
            began.append(clock())

        def after(*_: object, name: str = name, began: list[float] = began) -> None:
            settle()
            spent[name] = spent.get(name, 0.0) + clock() - began.pop()

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
