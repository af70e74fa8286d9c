"""What the user asks for: the fields that all methods share, checked when they are made.

A spec says which method, how sparse, in which pattern, and where. It knows no model; a plan meets
it with one (`masking/targets.py`). Each method's own spec stands beside its arithmetic, in
`methods/NAME.py`, and says itself what it needs, scores and solves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from torchprune.errors import SpecError
from torchprune.specs.allocation import Uneven, read_allocation
from torchprune.specs.goals import Goal, Override, goal_of, read_override
from torchprune.specs.method import GroupMoments, Needs, Solution, Task
from torchprune.specs.options import (
    PCG,
    Checked,
    Reconstruct,
    Swaps,
    as_reconstruct,
    check_above_zero,
    check_share,
)
from torchprune.specs.patterns import NM, Block, Pattern, Unstructured, parse_pattern

Selector = str | type[nn.Module] | Callable[[nn.Module, str], bool]
Selectors = Selector | Iterable[Selector]
Sequential = Literal["layer", "block", "none"]


@dataclass(frozen=True)
class Spec(Checked):
    """The fields all methods share. Use `WandaSpec`, `BestSpec` or another method's own.

    Args:
        sparsity: share of weights to prune, 0 <= sparsity < 1. Default 0.5, or what an n:m pattern
            implies.
        pattern: "unstructured", "n:m" (keeps n of every m along the input axis), "block:RxC", or
            the values `Unstructured()`, `NM(2, 4)`, `Block(4, 4)`.
        scope: where the count is exact: "row" (each output row), "layer", or "global" (one budget
            over all layers); the default is the method's own.
        targets: which layers, as exact names, glob patterns, "re:" patterns, module types or
            callables `(module, name) -> bool`, one or several. A name also selects everything
            inside it. Default: what multiplies in the model's repeated blocks. Routers and gates,
            depthwise kernels, vectors, adapters and what holds less than a thousandth of its block
            stay dense in any pattern (`masking/defaults.py`), unless a name is one of theirs, or a
            selector picks nothing else. What cannot take the pattern stays dense, too; it is an
            error only for a layer named in full, here or in `overrides`.
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
            `LeastError(...)` by the layers' errors, "search" or `Search(...)` by the model's loss,
            "sensitivity" or `Sensitivity(...)` by what each layer does to the model's outputs. The
            statistics come from one more pass through the dense model. Not for n:m patterns and
            scope "global".
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
    """The method's name, in reports and in saved files."""

    scopes: ClassVar[tuple[str, ...]]
    """Where counts can be exact; the first is the default."""

    chooses_weights: ClassVar[bool] = False
    """Whether `solution` decides, from the second moment; otherwise `scores` do."""

    def __post_init__(self) -> None:
        goal = goal_of(type(self).__name__, parse_pattern(self.pattern), self.sparsity)
        set_values(self, pattern=goal.pattern, sparsity=goal.sparsity)
        if self.scope is None:
            set_values(self, scope=self.scopes[0])
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
        set_values(self, overrides=dict(self.overrides))
        for key in self.overrides:
            self.override_goal(key)
        if self.token_cap is not None:
            check_above_zero(type(self).__name__, "token_cap", self.token_cap)
        _resolve_changes(self)
        _resolve_sequential(self)
        _resolve_allocation(self)
        _check_permute(self)

    # -- what a method says of itself --------------------------------------------------------------

    @property
    def needs(self) -> Needs:
        """What `scores` takes of a layer's inputs."""
        return "square"

    @property
    def needs_mean(self) -> bool:
        """Whether it also takes their mean."""
        return False

    def scores(self, weight: Tensor, moments: GroupMoments) -> Tensor:
        """What each weight is worth: of those that a pattern lets go, the least go.

        Of methods that choose weights: what stands for them where masks are wanted before they run
        (allocation, permutation).

        Args:
            weight: (rows, cols), any floating dtype, zero where an earlier mask pruned.
            moments: of its inputs, holding what the method needs.

        Returns:
            (rows, cols) float32, at least 0.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scores")

    def solution(self, task: Task) -> list[Solution]:
        """New weights and masks, of methods that choose weights: one of each of a task's."""
        raise NotImplementedError(f"{type(self).__name__} changes no weights")

    def misfit(self, cols: int) -> str | None:
        """Why the method can do nothing with rows of so many weights, or None."""
        return None

    def unseen(self, weight: Tensor, keep: Tensor) -> tuple[Tensor, str] | None:
        """New weights (rows, cols) float32 of a matrix whose inputs no token showed, and what the
        report says of it; of methods that change such weights too. None leaves them as they are.

        Args:
            weight: (rows, cols), in its own dtype.
            keep: (rows, cols) bool, the mask that magnitude chose.
        """
        return None

    def usual_sequence(self) -> Sequential:
        """How fine calibration is unless asked otherwise."""
        return "none" if self.scope == "global" and not self.chooses_masks_ahead else "layer"

    @property
    def windows(self) -> int:
        """Up to how many windows a language model's own text is added to what calibrates."""
        return 0

    @property
    def label(self) -> str:
        """What reports call the method."""
        return self.method

    # -- what follows from it ----------------------------------------------------------------------

    @property
    def chooses_masks_ahead(self) -> bool:
        """Whether masks are known before any data is."""
        return self.needs == "nothing" and not self.chooses_weights

    @property
    def needs_data(self) -> bool:
        """Whether there is anything to calibrate."""
        options = (self.needs_gram, self.reconstruct, self.uneven is not None, self.permute)
        return not self.chooses_masks_ahead or any(options)

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
        return self.chooses_weights or self.refine is not None or self.needs == "gram"

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


def _resolve_changes(spec: Spec) -> None:
    """Read `refine`, `alpha` and `reconstruct` once, and check them."""
    name = type(spec).__name__
    if spec.refine == "pcg":
        set_values(spec, refine=PCG())
    elif spec.refine == "swaps":
        set_values(spec, refine=Swaps())
    if not isinstance(spec.refine, PCG | Swaps | None):
        raise SpecError(
            f'{name}: refine must be "pcg", a PCG(...), "swaps", a Swaps(...) or None, '
            f"got {spec.refine!r}"
        )
    if isinstance(spec.refine, Swaps):
        _check_swaps(spec)
    set_values(spec, reconstruct=as_reconstruct(name, spec.reconstruct))
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


def set_values(spec: Spec, **values: Any) -> None:
    """Write down what a field that was left open, or given as a string, comes to."""
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
        set_values(spec, sequential=spec.usual_sequence())
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
    set_values(spec, allocation=uneven)
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
