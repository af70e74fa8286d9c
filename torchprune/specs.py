"""What the user asks for: frozen specs, checked when they are made.

A spec says which method, how sparse, in which pattern, and where. It knows no model; `plan.py`
meets it with one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, Self

from torch import nn

from torchprune.errors import SpecError, did_you_mean
from torchprune.patterns import ACCEPTED, NM, Block, Pattern, Unstructured, parse_pattern

Selector = str | type[nn.Module] | Callable[[nn.Module, str], bool]
Selectors = Selector | Iterable[Selector]
Override = float | str | Pattern | tuple[str | Pattern, float]
Sequential = Literal["layer", "block", "none"]

DENSE = "dense"
"""The override that leaves a layer alone."""


@dataclass(frozen=True)
class Goal:
    """What one layer is to become: a pattern and the exact share of zeros."""

    pattern: Pattern
    sparsity: float

    def __str__(self) -> str:
        if isinstance(self.pattern, NM):
            return str(self.pattern)
        return f"{self.pattern} {self.sparsity:.4g}"


class Checked:
    """A spec whose misspelt options are named."""

    def __new__(cls, *args: object, **options: object) -> Self:
        known: list[str] = [f.name for f in fields(cls)] if is_dataclass(cls) else []
        for option in options:
            if option not in known:
                raise SpecError(
                    f"{cls.__name__} has no option {option!r}{did_you_mean(option, known)}; "
                    f"it accepts {', '.join(known)}"
                )
        return super().__new__(cls)


@dataclass(frozen=True)
class Spec(Checked):
    """The fields all methods share. Use `MagnitudeSpec`, `WandaSpec` or `SparseGPTSpec`.

    Args:
        sparsity: share of weights to prune, 0 <= sparsity < 1. Default 0.5, or what an n:m pattern
            implies.
        pattern: "unstructured", "n:m" (keeps n of every m along the input axis), "block:RxC", or
            the values `Unstructured()`, `NM(2, 4)`, `Block(4, 4)`.
        scope: where the count is exact: "row" (each output row), "layer", or "global" (one budget
            over all layers); the default is the method's own.
        targets: which layers, as exact names, glob patterns, "re:" patterns, module types or
            callables `(module, name) -> bool`, one or several. A name also selects everything
            inside it. Default: the linear and convolution layers of the model's repeated blocks.
        ignore: layers left dense, selected likewise.
        overrides: selector string -> a sparsity, a pattern, a pair (pattern, sparsity), or
            "dense". The first key that matches a layer decides.

    Raises:
        SpecError: for contradictions, values out of range and misspelt options.
    """

    sparsity: float | None = None
    pattern: str | Pattern = "unstructured"
    scope: str | None = None
    targets: Selectors | None = None
    ignore: Selectors = ()
    overrides: Mapping[str, Override] = field(default_factory=dict, hash=False)

    method: ClassVar[str]
    scopes: ClassVar[tuple[str, ...]]
    needs_data: ClassVar[bool]

    def __post_init__(self) -> None:
        goal = _goal(type(self).__name__, parse_pattern(self.pattern), self.sparsity)
        _set(self, pattern=goal.pattern, sparsity=goal.sparsity)
        if self.scope is None:
            _set(self, scope=self.scopes[0])
        if self.scope not in self.scopes:
            raise SpecError(
                f"{type(self).__name__}: scope {self.scope!r} is not offered; "
                f"accepted: {', '.join(repr(s) for s in self.scopes)}"
            )
        if not isinstance(self.overrides, Mapping):
            raise SpecError(
                f"{type(self).__name__}: overrides must map selector strings to values, "
                f"got {type(self.overrides).__name__}"
            )
        _set(self, overrides=dict(self.overrides))
        for key in self.overrides:
            self.override_goal(key)

    @property
    def goal(self) -> Goal:
        """The goal of every layer without an override."""
        assert isinstance(self.pattern, Unstructured | NM | Block)
        assert self.sparsity is not None
        return Goal(self.pattern, self.sparsity)

    def override_goal(self, key: str) -> Goal | None:
        """The goal that `overrides[key]` asks for; None is dense."""
        where, value = f"overrides[{key!r}]", self.overrides[key]
        if isinstance(value, str) and value.strip().lower() == DENSE:
            return None
        if isinstance(value, bool):
            raise SpecError(f"{where}: {value!r} is neither a sparsity nor a pattern")
        if isinstance(value, int | float):
            return _goal(where, self.goal.pattern, float(value))
        if isinstance(value, str | Unstructured | NM | Block):
            pattern = parse_pattern(value)
            keeps_share = not isinstance(pattern, NM) and not isinstance(self.goal.pattern, NM)
            return _goal(where, pattern, self.goal.sparsity if keeps_share else None)
        if isinstance(value, tuple) and len(value) == 2:
            return _goal(where, parse_pattern(value[0]), value[1])
        raise SpecError(
            f"{where}: {value!r} is not understood; accepted: a sparsity, a pattern ({ACCEPTED}), "
            'a pair (pattern, sparsity), or "dense"'
        )


@dataclass(frozen=True)
class MagnitudeSpec(Spec):
    """Prune the weights of smallest absolute value. Needs no data.

    Scope "layer" (default: the whole matrix, as the references), "row" or "global".
    """

    method: ClassVar[str] = "magnitude"
    scopes: ClassVar[tuple[str, ...]] = ("layer", "row", "global")
    needs_data: ClassVar[bool] = False


@dataclass(frozen=True)
class WandaSpec(Spec):
    """Prune by |W_ij| * ||X_j||, weights unchanged (Sun et al., arXiv 2306.11695).

    Scope "row" (default, as the paper), "layer" or "global" (implies sequential="none").

    Args:
        sequential: how fine the calibration is: "layer" prunes each layer on inputs that passed
            every earlier pruned layer; "block" takes a block's statistics from its still dense
            weights, then runs it again pruned (as the references do); "none" takes all statistics
            from the dense model. Default "layer" ("none" for scope "global").
    """

    sequential: Sequential | None = None

    method: ClassVar[str] = "wanda"
    scopes: ClassVar[tuple[str, ...]] = ("row", "layer", "global")
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _resolve_sequential(self, "none" if self.scope == "global" else "layer")
        if self.scope == "global" and self.sequential != "none":
            raise SpecError(
                f'WandaSpec: scope "global" compares all layers at once, so it needs '
                f'sequential="none", got {self.sequential!r}'
            )


@dataclass(frozen=True)
class SparseGPTSpec(Spec):
    """Prune and update the surviving weights by OBS (Frantar & Alistarh, arXiv 2301.00774).

    Scope "layer" (default: scores pooled over all rows within each block of columns, as the
    reference) or "row" (the same count in every row).

    Args:
        damping: added to the Hessian's diagonal, as a share of its mean. Raised tenfold, and
            reported, if the factorisation fails.
        block_size: input columns whose mask is chosen together; rounded up to whole groups of an
            n:m or block pattern.
        sequential: as for `WandaSpec`; by default "block" for n:m patterns, else "layer".
    """

    damping: float = 0.01
    block_size: int = 128
    sequential: Sequential | None = None

    method: ClassVar[str] = "sparsegpt"
    scopes: ClassVar[tuple[str, ...]] = ("layer", "row")
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        # As measured by benchmarks/sequence.py: by block is some 2 % better at 2:4 and no better
        # unstructured, for 1.4 times the time.
        _resolve_sequential(self, "block" if isinstance(self.pattern, NM) else "layer")
        if not (isinstance(self.damping, int | float) and 0 < self.damping < math.inf):
            raise SpecError(f"SparseGPTSpec: damping must be above 0, got {self.damping!r}")
        if not (isinstance(self.block_size, int) and self.block_size > 0):
            raise SpecError(
                f"SparseGPTSpec: block_size must be a whole number above 0, got {self.block_size!r}"
            )


def _set(spec: Spec, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(spec, name, value)


def _resolve_sequential(spec: WandaSpec | SparseGPTSpec, default: Sequential) -> None:
    if spec.sequential is None:
        _set(spec, sequential=default)
    if spec.sequential not in ("layer", "block", "none"):
        raise SpecError(
            f"{type(spec).__name__}: sequential {spec.sequential!r} is not understood; "
            'accepted: "layer", "block", "none"'
        )


def _goal(where: str, pattern: Pattern, sparsity: float | None) -> Goal:
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
