"""What the user asks for: frozen specs, checked when they are made.

A spec says which method, how sparse, in which pattern, and where. It knows no model; `plan.py`
meets it with one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from torchprune.errors import SpecError
from torchprune.specs.allocation import Uneven, read_allocation
from torchprune.specs.goals import Goal, Override, goal_of, read_override
from torchprune.specs.options import (
    PCG,
    Checked,
    Reconstruct,
    Swaps,
    as_reconstruct,
    check_above_zero,
    check_share,
    check_whole,
)
from torchprune.specs.patterns import NM, Block, Pattern, Unstructured, parse_pattern

Selector = str | type[nn.Module] | Callable[[nn.Module, str], bool]
Selectors = Selector | Iterable[Selector]
Sequential = Literal["layer", "block", "none"]


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
        refine: "pcg" or `PCG(...)`: refit the weights that a mask keeps to the layer's outputs by
            least squares. "swaps" or `Swaps(...)`, for methods that leave weights unchanged and no
            block pattern: exchange pruned for kept weights of the same row while the layer's error
            falls. Each row keeps the count that the method gave it, whatever the scope.
        alpha: for methods that change weights, how far the outputs to reach are the dense model's
            (1) and not only the layer's own on the inputs it now gets (0). Above 0 every batch also
            runs through the dense model.
        reconstruct: True or `Reconstruct(...)`: train the kept weights of each pruned block to the
            outputs it had.
        sequential: how fine the calibration is: "layer" prunes each layer on inputs that passed
            every earlier pruned layer; "block" takes a block's statistics from its still dense
            weights, then runs it again pruned (as the references do); "none" takes all statistics
            from the dense model. Default "layer"; "none" for scope "global"; "block" for SparseGPT
            with an n:m pattern.
        allocation: how the zeros are shared among the layers without an override: "uniform", or,
            with the same total to the weight, "owl" or `OWL(...)` by outliers, "error" or
            `LeastError(...)` by the layers' errors, "search" or `Search(...)` by the model's loss.
            The statistics come from one more pass through the dense model. Not for n:m patterns
            and scope "global".
        permute: for n:m patterns, first put inputs into an order in which more survives, where
            that leaves the model's function as it is: the neurons of an MLP, and the values within
            a head of attention.
        token_cap: let no token's input to a layer count for more than one of so many times the
            median length in its batch: longer ones are scaled down in the statistics. For models
            whose first tokens are far larger than all others.

    Raises:
        SpecError: for contradictions, values out of range and misspelt options.
    """

    sparsity: float | None = None
    pattern: str | Pattern = "unstructured"
    scope: str | None = None
    targets: Selectors | None = None
    ignore: Selectors = ()
    overrides: Mapping[str, Override] = field(default_factory=dict, hash=False)
    refine: str | PCG | Swaps | None = None
    alpha: float = 0.0
    reconstruct: bool | Reconstruct = False
    sequential: Sequential | None = None
    allocation: str | Uneven = "uniform"
    permute: bool = False
    token_cap: float | None = None

    method: ClassVar[str]
    scopes: ClassVar[tuple[str, ...]]
    chooses_weights: ClassVar[bool] = False
    chooses_masks_ahead: ClassVar[bool] = False

    def __post_init__(self) -> None:
        goal = goal_of(type(self).__name__, parse_pattern(self.pattern), self.sparsity)
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
        if self.token_cap is not None:
            check_above_zero(type(self).__name__, "token_cap", self.token_cap)
        _resolve_changes(self)
        _resolve_sequential(self)
        _resolve_allocation(self)
        _check_permute(self)

    def usual_sequence(self) -> Sequential:
        """How fine calibration is unless asked otherwise."""
        return "none" if self.scope == "global" and not self.chooses_masks_ahead else "layer"

    @property
    def needs_data(self) -> bool:
        """Whether there is anything to calibrate."""
        return True

    @property
    def fits_weights(self) -> bool:
        """Whether a layer's decision changes kept weights."""
        return self.chooses_weights or isinstance(self.refine, PCG)

    @property
    def changes_weights(self) -> bool:
        """Whether kept weights change, then or in a block's reconstruction."""
        return self.fits_weights or bool(self.reconstruct)

    @property
    def needs_gram(self) -> bool:
        """Whether a layer's decision takes its inputs' second moment."""
        return self.chooses_weights or self.refine is not None

    @property
    def windows(self) -> int:
        """Up to how many windows a language model's own text is added to what calibrates."""
        return 0

    @property
    def uneven(self) -> Uneven | None:
        """How layers get sparsities of their own, None if all get the same."""
        return None if isinstance(self.allocation, str) else self.allocation

    @property
    def goal(self) -> Goal:
        """The goal of every layer without an override."""
        assert isinstance(self.pattern, Unstructured | NM | Block)
        assert self.sparsity is not None
        return Goal(self.pattern, self.sparsity)

    def override_goal(self, key: str) -> Goal | None:
        """The goal that `overrides[key]` asks for; None is dense."""
        return read_override(f"overrides[{key!r}]", self.overrides[key], self.goal)


@dataclass(frozen=True)
class MagnitudeSpec(Spec):
    """Prune the weights of smallest absolute value. Needs no data.

    Scope "layer" (default: the whole matrix, as the references), "row" or "global".
    """

    method: ClassVar[str] = "magnitude"
    scopes: ClassVar[tuple[str, ...]] = ("layer", "row", "global")
    chooses_masks_ahead: ClassVar[bool] = True

    @property
    def needs_data(self) -> bool:
        options = (self.needs_gram, self.reconstruct, self.uneven is not None, self.permute)
        return any(options)


@dataclass(frozen=True)
class WandaSpec(Spec):
    """Prune by |W_ij| * ||X_j||, weights unchanged (Sun et al., arXiv 2306.11695).

    Scope "row" (default, as the paper), "layer" or "global" (implies sequential="none").
    """

    method: ClassVar[str] = "wanda"
    scopes: ClassVar[tuple[str, ...]] = ("row", "layer", "global")


@dataclass(frozen=True)
class RIASpec(Spec):
    """Prune by relative importance and activations, weights unchanged (Zhang et al., RIA, ICLR
    2024, "Plug-and-Play").

    The score (|W_ij| / sum over row i + |W_ij| / sum over column j) * ||X_j||^power. Scope "row"
    (default) or "layer".

    Args:
        power: of the input's norm; the paper's is 0.5.
    """

    power: float = 0.5

    method: ClassVar[str] = "ria"
    scopes: ClassVar[tuple[str, ...]] = ("row", "layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("RIASpec", "power", self.power)


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
    """

    damping: float = 0.01
    block_size: int = 128

    method: ClassVar[str] = "sparsegpt"
    scopes: ClassVar[tuple[str, ...]] = ("layer", "row")
    chooses_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("SparseGPTSpec", "damping", self.damping)
        check_whole("SparseGPTSpec", "block_size", self.block_size)

    def usual_sequence(self) -> Sequential:
        # As measured by benchmarks/calibration/sequence.py: by block is some 2 % better at 2:4 and
        # no better unstructured, for 1.4 times the time.
        together = isinstance(self.pattern, NM) and not self.alpha and not self.reconstruct
        return "block" if together else "layer"


_LONG = PCG(15)


@dataclass(frozen=True)
class ADMMSpec(Spec):
    """Prune and update by ADMM, then refit (Boza, arXiv 2401.02938; ALPS, arXiv 2406.07831).

    Better than SparseGPT at the same sparsity, for about twice its time. Works for every pattern.
    Scope "row" (default) or "layer".

    Args:
        refine: by default "pcg" with 15 steps; None leaves the weights ADMM ends with.
        steps: rounds.
        ramp: rounds in which the sparsity grows, with the cube of the round.
        ridge: as for `PCG`.
    """

    refine: str | PCG | None = _LONG
    steps: int = 20
    ramp: int = 15
    ridge: float = 0.1

    method: ClassVar[str] = "admm"
    scopes: ClassVar[tuple[str, ...]] = ("row", "layer")
    chooses_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("ADMMSpec", "steps", self.steps)
        check_whole("ADMMSpec", "ramp", self.ramp)
        check_above_zero("ADMMSpec", "ridge", self.ridge)
        if self.ramp > self.steps:
            raise SpecError(f"ADMMSpec: ramp {self.ramp} is longer than its {self.steps} steps")


@dataclass(frozen=True)
class BestSpec(ADMMSpec):
    """The recommended combination, for those who do not want to choose.

    ADMM toward what the dense model gives: each layer a little, or each block, whose kept weights
    are trained for it, or both. What a level reaches and costs is measured in the README. For other
    combinations use `ADMMSpec`.

    Args:
        effort: "fast": `ADMMSpec(alpha=0.25)`, about three times as long as SparseGPT on a CPU.
            "balanced": `ADMMSpec(reconstruct=Reconstruct())`, about eight times. "max": both, on
            more text, for 32 windows some forty times. A decoder-only transformers language model
            brings the calibration windows up to 128 by continuations of them that it samples; what
            trained weights are judged by stays the given ones. Other models, and 128 windows and
            more, make do with what is given.
    """

    effort: Literal["fast", "balanced", "max"] = "balanced"

    method: ClassVar[str] = "best"

    def __post_init__(self) -> None:
        if self.effort not in ("fast", "balanced", "max"):
            raise SpecError(
                f"BestSpec: effort {self.effort!r} is not understood; "
                'accepted: "fast", "balanced", "max"'
            )
        if not self.alpha and self.effort != "balanced":
            _set(self, alpha=0.25)
        if self.effort != "fast" and isinstance(self.reconstruct, bool):
            _set(self, reconstruct=Reconstruct())
        super().__post_init__()

    @property
    def windows(self) -> int:
        return 128 if self.effort == "max" else 0


def _resolve_changes(spec: Spec) -> None:
    """Read `refine`, `alpha` and `reconstruct` once, and check them."""
    name = type(spec).__name__
    if spec.refine == "pcg":
        _set(spec, refine=PCG())
    elif spec.refine == "swaps":
        _set(spec, refine=Swaps())
    if not isinstance(spec.refine, PCG | Swaps | None):
        raise SpecError(
            f'{name}: refine must be "pcg", a PCG(...), "swaps", a Swaps(...) or None, '
            f"got {spec.refine!r}"
        )
    if isinstance(spec.refine, Swaps):
        _check_swaps(spec)
    _set(spec, reconstruct=as_reconstruct(name, spec.reconstruct))
    check_share(name, "alpha", spec.alpha)
    if spec.alpha and not spec.fits_weights:
        raise SpecError(
            f"{name}: alpha says what changed weights should reach, and {spec.method} changes "
            'none; use refine="pcg"'
        )


def _check_swaps(spec: Spec) -> None:
    name = type(spec).__name__
    if spec.chooses_weights:
        raise SpecError(
            f"{name}: Swaps betters the mask of weights that stay as they are, and {spec.method} "
            'changes them; use refine="pcg", or WandaSpec'
        )
    for goal in (spec.goal, *map(spec.override_goal, spec.overrides)):
        if goal is not None and isinstance(goal.pattern, Block):
            raise SpecError(
                f"{name}: Swaps exchanges single weights, and {goal.pattern} keeps or prunes "
                'whole tiles; use an unstructured or n:m pattern, or refine="pcg"'
            )


def _set(spec: Spec, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(spec, name, value)


def _resolve_sequential(spec: Spec) -> None:
    name = type(spec).__name__
    if not spec.needs_data:
        for option in ("sequential", "token_cap"):
            if (value := getattr(spec, option)) is not None:
                raise SpecError(
                    f"{name}: {option}={value!r} says how calibration goes, and "
                    "this spec needs none; leave it out"
                )
        return
    if spec.sequential is None:
        _set(spec, sequential=spec.usual_sequence())
    if spec.sequential not in ("layer", "block", "none"):
        raise SpecError(
            f"{name}: sequential {spec.sequential!r} is not understood; "
            'accepted: "layer", "block", "none"'
        )
    if spec.usual_sequence() == "none" and spec.sequential != "none":
        raise SpecError(
            f'{name}: scope "global" compares all layers at once, so it needs '
            f'sequential="none", got {spec.sequential!r}'
        )
    if spec.sequential != "layer" and (spec.alpha or spec.reconstruct):
        what = "alpha" if spec.alpha else "reconstruct"
        raise SpecError(
            f"{name}: {what} compares each layer or block with the dense one as the batches reach "
            f'it, so it needs sequential="layer", got {spec.sequential!r}'
        )


def _resolve_allocation(spec: Spec) -> None:
    name, uneven = type(spec).__name__, read_allocation(type(spec).__name__, spec.allocation)
    if uneven is None:
        return
    _set(spec, allocation=uneven)
    if isinstance(spec.pattern, NM):
        raise SpecError(
            f"{name}: allocation shares zeros unevenly, but pattern {spec.pattern} fixes the "
            'sparsity of every layer; use pattern "unstructured" or a block'
        )
    if spec.scope == "global":
        raise SpecError(
            f'{name}: scope "global" shares one budget among all layers already; '
            'use allocation with scope "row" or "layer"'
        )


def _check_permute(spec: Spec) -> None:
    name = type(spec).__name__
    if not isinstance(spec.permute, bool):
        raise SpecError(f"{name}: permute must be True or False, got {spec.permute!r}")
    goals = [spec.goal, *map(spec.override_goal, spec.overrides)]
    if spec.permute and not any(g is not None and isinstance(g.pattern, NM) for g in goals):
        raise SpecError(
            f"{name}: permute chooses which inputs share a group of an n:m pattern, and pattern "
            f'"{spec.pattern}" has no groups; use pattern "2:4", or leave permute out'
        )
