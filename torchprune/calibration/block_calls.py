"""Units: modules at whose end batches wait once more, when all layers inside are pruned.

A unit's forward runs as often as needed: with its dense weights for the outputs it should give,
layer by layer while it is pruned, and at last with its final weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torchprune.calibration.replay import Start
from torchprune.masking.targets import Target


@dataclass(eq=False)
class Call:
    """One batch's call of a unit, the outputs its pruned weights should give, which of their tokens
    count (None: all), and what the call starts from where it changes that."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wanted: list[Tensor]
    counts: list[Tensor | None]
    batch: int
    start: Start | None = None


@dataclass(eq=False)
class Unit:
    """A module whose layers were pruned, together with all calls of it.

    Attributes:
        dense: by batch, what the dense model gives here, until that batch's own call.
    """

    name: str
    module: nn.Module
    targets: list[Target]
    calls: list[Call] = field(default_factory=list)
    dense: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Ends:
    """Where batches stop a second time: at the end of each unit, once its layers are pruned.

    Attributes:
        units: modules by name, none inside another.
        act: called with each; it may change the unit's weights.
        alpha: how far the outputs wanted are the dense model's (1) and not those of the unit's
            dense weights on what it now reads (0).
    """

    units: Mapping[str, nn.Module]
    act: Callable[[Unit], None]
    alpha: float


def floats_of(value: Any) -> list[Tensor]:
    """The floating tensors in a module's output, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in floats_of(v)]
    if isinstance(value, tuple | list):
        return [t for v in value for t in floats_of(v)]
    return []


def put_on(
    stack: ExitStack, module: nn.Module
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have a function stand for a module's forward while the stack is open."""

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        own = vars(module).get("forward")
        module.forward = function
        if own is None:
            stack.callback(lambda: vars(module).pop("forward"))
        else:
            stack.callback(lambda: setattr(module, "forward", own))
        return function

    return put
