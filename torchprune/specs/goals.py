"""What one layer is to become, and how users write it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from torchprune.errors import SpecError
from torchprune.specs.patterns import ACCEPTED, NM, Block, Pattern, Unstructured, parse_pattern

Override = float | str | Pattern | tuple[str | Pattern, float]

DENSE = "dense"
"""The override that leaves a layer alone."""


@dataclass(frozen=True)
class Goal:
    """What one layer is to become: a pattern and the exact share of zeros.

    Attributes:
        share: of what an n:m pattern prunes, how much goes now: 1 but on the way there.
    """

    pattern: Pattern
    sparsity: float | Fraction
    share: float = 1.0

    def __str__(self) -> str:
        if isinstance(self.pattern, NM):
            return (
                str(self.pattern) if self.share == 1 else f"{self.pattern}, {self.share:.4g} of it"
            )
        return f"{self.pattern} {float(self.sparsity):.4g}"

    def on_the_way(self, now: float, final: float) -> Goal:
        """This goal in proportion, where a model whose end is `final` zeros is to have `now`."""
        if now >= final:
            return self
        if isinstance(self.pattern, NM):
            return replace(self, share=now / final)
        level = now if self.sparsity == final else float(self.sparsity) * (now / final)
        return replace(self, sparsity=level)


def goal_of(where: str, pattern: Pattern, sparsity: float | None) -> Goal:
    """A checked pair; without a sparsity, the pattern's own or one half."""
    if isinstance(pattern, NM):
        implied = float(pattern.sparsity)
        if sparsity is not None and not math.isclose(sparsity, implied):
            raise SpecError(
                f"{where}: sparsity {sparsity} contradicts pattern {pattern}, which is "
                f'{implied:g} by itself; leave sparsity out, or use pattern "unstructured"'
            )
        return Goal(pattern, implied)
    if sparsity is None:
        return Goal(pattern, 0.5)
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise SpecError(f"{where}: sparsity must be a number, got {sparsity!r}")
    if not 0 <= sparsity < 1:
        raise SpecError(
            f"{where}: sparsity is the share of zeros, 0 <= sparsity < 1, got {sparsity!r}"
        )
    return Goal(pattern, float(sparsity))


def read_override(where: str, value: object, usual: Goal) -> Goal | None:
    """What an override asks for; None is dense. It takes what it leaves out from the usual goal.

    Raises:
        SpecError: it is no sparsity, pattern, pair of both or "dense".
    """
    if isinstance(value, str) and value.strip().lower() == DENSE:
        return None
    if isinstance(value, bool):
        raise SpecError(f"{where}: {value!r} is neither a sparsity nor a pattern")
    if isinstance(value, int | float):
        return goal_of(where, usual.pattern, float(value))
    if isinstance(value, str | Unstructured | NM | Block):
        pattern = parse_pattern(value)
        keeps_share = not isinstance(pattern, NM) and not isinstance(usual.pattern, NM)
        return goal_of(where, pattern, float(usual.sparsity) if keeps_share else None)
    if isinstance(value, tuple) and len(value) == 2:
        return goal_of(where, parse_pattern(value[0]), value[1])
    raise SpecError(
        f"{where}: {value!r} is not understood; accepted: a sparsity, a pattern ({ACCEPTED}), "
        'a pair (pattern, sparsity), or "dense"'
    )
