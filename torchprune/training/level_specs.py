"""Levels of sparsity as users write them, each one met with the spec that reaches it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from torchprune.errors import SpecError
from torchprune.specs.goals import read_override
from torchprune.specs.patterns import NM, Block, Unstructured
from torchprune.specs.spec import Spec
from torchprune.structure.specs import LayerSpec, StructuredSpec

AnySpec = Spec | StructuredSpec | LayerSpec
Level = Any
"""A sparsity, a pattern, a pair (pattern, sparsity), or a whole spec."""


@dataclass(frozen=True)
class Step:
    """One level.

    Attributes:
        asked: what reports call it.
        spec: what prunes to it.
    """

    asked: str
    spec: AnySpec

    @property
    def amount(self) -> float:
        """The share it prunes; of whole blocks, how many."""
        return float(amount_of(self.spec))


def read_levels(spec: AnySpec, levels: Iterable[Level]) -> list[Step]:
    """Every level with its spec.

    Args:
        spec: what prunes; a level replaces its sparsity or pattern, for `LayerSpec` the number of
            blocks, unless it is a whole spec itself.
        levels: in ascending order; or an object whose `levels` they are.

    Raises:
        SpecError: a level is none, or does not fit the spec, or they do not ascend.
    """
    check_spec("spec", spec)
    levels = getattr(levels, "levels", levels)
    if isinstance(levels, str) or not isinstance(levels, Iterable):
        raise SpecError(f"levels must be a sequence such as [0.5, 0.75, 0.9], got {levels!r}")
    steps = [_step(f"levels[{i}]", spec, level) for i, level in enumerate(levels)]
    if not steps:
        raise SpecError("levels are none; give at least one, such as [0.5]")
    for i, (before, after) in enumerate(pairwise(steps)):
        if type(before.spec) is not type(after.spec):
            continue
        if after.amount < before.amount or after.spec == before.spec:
            raise SpecError(
                f"levels must ascend, since masks only grow: levels[{i}] is {before.asked}, "
                f"levels[{i + 1}] is {after.asked}"
            )
    return steps


def check_spec(where: str, spec: object) -> None:
    """Raise SpecError unless it is a spec that can prune."""
    if not isinstance(spec, AnySpec) or type(spec) in (Spec, StructuredSpec):
        raise SpecError(f"{where} must be a spec such as MagnitudeSpec(0.9), got {spec!r}")


def amount_of(spec: AnySpec) -> float:
    """The share a spec prunes; of whole blocks, how many."""
    if isinstance(spec, LayerSpec):
        return spec.drop
    return float(spec.goal.sparsity) if isinstance(spec, Spec) else float(spec.sparsity)


def _step(where: str, spec: AnySpec, level: object) -> Step:
    if isinstance(level, AnySpec):
        check_spec(where, level)
        return Step(f"{level.method} {_goal(level)}", level)
    if type(level) is not bool:
        level = _plain_number(level)
    made = (
        _of_weights(where, spec, level) if isinstance(spec, Spec) else _of_units(spec, level, where)
    )
    return Step(_goal(made), made)


def _plain_number(level: object) -> object:
    """NumPy's numbers as Python's; anything else as it is.

    With twelve decimals, so that counts are those of the decimals one would write: two rounds of a
    fifth each come to 0.36, not to the 0.3599999999999999 that is computed.
    """
    if isinstance(level, Integral):
        return int(level)
    return round(float(level), 12) if isinstance(level, Real) else level


def _of_weights(where: str, spec: Spec, level: Any) -> Spec:
    goal = read_override(where, level, spec.goal)
    if goal is None:
        raise SpecError(f'{where}: "dense" is no level; a first level of 0 trains before pruning')
    sparsity = None if isinstance(goal.pattern, NM) else float(goal.sparsity)
    return replace(spec, pattern=goal.pattern, sparsity=sparsity)


def _of_units(spec: StructuredSpec | LayerSpec, level: Any, where: str) -> AnySpec:
    if isinstance(level, str | tuple | Unstructured | NM | Block):
        raise SpecError(
            f"{where}: {type(spec).__name__} prunes whole {spec.method}, which have no pattern; "
            f"got {level!r}"
        )
    if isinstance(spec, LayerSpec):
        return replace(spec, drop=level)
    return replace(spec, sparsity=level)


def _goal(spec: AnySpec) -> str:
    if isinstance(spec, LayerSpec):
        return f"{spec.drop} layers"
    if isinstance(spec, StructuredSpec):
        return f"{spec.sparsity:.4g}"
    plain = isinstance(spec.pattern, Unstructured)
    return f"{spec.sparsity:.4g}" if plain else str(spec.goal)


def described_levels(steps: Sequence[Step]) -> list[str]:
    """What the levels are, for a file that is to tell them apart."""
    from torchprune.specs.functions import described

    return [described(step.spec) for step in steps]
