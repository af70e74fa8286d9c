"""Methods of the user's own: a score or a solver as a function, checked where it is called.

The functions get copies, so that they may do with them what they like, and what they give is looked
at before it touches a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from torchprune.errors import SpecError, did_you_mean
from torchprune.masking.packing import masked
from torchprune.masking.projection import BARRED, project, spread_tiles
from torchprune.methods.posed import retargeted
from torchprune.methods.wanda import wanda_score
from torchprune.specs.functions import check_function, function_name
from torchprune.specs.goals import Goal
from torchprune.specs.method import GroupMoments, Needs, Solution, Task
from torchprune.specs.patterns import NM, Block, Pattern
from torchprune.specs.spec import Spec

ScoreFunction = Callable[[Tensor, GroupMoments], Tensor]
SolveFunction = Callable[[Tensor, GroupMoments, Pattern, float], tuple[Tensor, Tensor]]

_TOLD: dict[Needs, tuple[str, ...]] = {
    "nothing": (),
    "square": ("square", "mean"),
    "gram": ("square", "mean", "gram"),
}

_RIDGE = 0.01
"""Of the outputs that a solver is to reach with an alpha; as SparseGPT's damping."""


@dataclass(frozen=True)
class ScoreSpec(Spec):
    """Prune by a score of your own, weights unchanged: `ScoreSpec(score=f)`.

    `f(weight, moments)` scores the weights of one matrix; of those that a pattern lets go, the ones
    of least score go, of equal ones the first. It is called once for each group of a layer:

    - weight: (rows, cols) float32, outputs by inputs. A convolution's columns are the taps of its
      kernel times the input channels, n:m groups along channels. A copy; weights that an earlier
      mask pruned are 0, and stay pruned whatever their score.
    - moments: of the inputs, float32, copies: `moments.rows` how many input rows x were counted,
      `moments.square` (cols,) the sums of x_j^2, `moments.mean` (cols,), with needs="gram" also
      `moments.gram` (cols, cols) the sum of x x^T; `moments.layer` the layer's name.

    It returns (rows, cols) scores of a floating dtype, at least 0 and no NaN, on the weight's
    device. A squared score should be what the weight's removal costs: a block pattern adds these
    up. Where no token reaches a group, magnitude decides, unless f needs nothing.

    Scope "row" (default), "layer" or "global" (implies sequential="none", if f needs inputs).

    Args:
        score: the function f. Saved models keep its name.
        needs: what it reads of the inputs: "nothing" (then no data is needed), "square" or "gram".
    """

    score: ScoreFunction = field(kw_only=True)
    needs: Needs = field(default="square", kw_only=True)

    method: ClassVar[str] = "score"
    scopes: ClassVar[tuple[str, ...]] = ("row", "layer", "global")

    def __post_init__(self) -> None:
        check_function("ScoreSpec", "score", self.score, "(weight, moments) -> scores")
        if not isinstance(self.needs, str) or self.needs not in _TOLD:
            raise SpecError(
                f"ScoreSpec: needs {self.needs!r} is not understood"
                f"{did_you_mean(str(self.needs), _TOLD)}; accepted: "
                f"{', '.join(map(repr, get_args(Needs)))}"
            )
        super().__post_init__()

    @property
    def needs_mean(self) -> bool:
        return self.needs != "nothing"

    @property
    def label(self) -> str:
        return function_name(self.score)

    def scores(self, weight: Tensor, moments: GroupMoments) -> Tensor:
        told = moments.copied(_TOLD[self.needs], moments.layer)
        found = _called(self.score, moments.layer, _copy(weight), told)
        where = f"{moments.layer}: the scores that {self.label} gives"
        _check_tensor(where, found, weight)
        scores: Tensor = found.detach().float()
        if bool(scores.isnan().any()):
            raise SpecError(f"{where} hold NaN at {int(scores.isnan().sum())} places")
        if bool((scores < 0).any()):
            raise SpecError(
                f"{where} hold negative numbers, down to {float(scores.min()):.4g}; scores are at "
                "least 0, and the least go first: take their size, or add an offset"
            )
        return scores


@dataclass(frozen=True)
class SolverSpec(Spec):
    """Prune by a solver of your own, which may change the weights that stay: `SolverSpec(solve=f)`.

    `f(weight, moments, pattern, sparsity)` solves one matrix. It is called once for each group of a
    layer:

    - weight, moments: as for `ScoreSpec` with needs="gram". Weights that an earlier mask pruned are
      0 and must be pruned again. With an `alpha` above 0, weight is moved to what would best give
      the outputs to be reached from the inputs that the layer now gets, so f needs no change.
    - pattern: `Unstructured()`, `NM(n, m)` or `Block(rows, cols)`.
    - sparsity: float, the layer's own; `prune_count` makes counts of it.

    It returns a pair (new weight, mask): (rows, cols) of a floating dtype, and (rows, cols) bool,
    True = kept, both on the weight's device. What the weight is where it is not kept does not
    matter. The mask must have exactly the zeros that pattern, sparsity and scope ask for, as
    `torchprune.masking.projection.project` makes it of scores. Where no token reaches a group,
    magnitude decides. For allocation and permute, Wanda's scores stand for it.

    Scope "row" (default) or "layer": where f keeps counts exact.

    Args:
        solve: the function f. Saved models keep its name.
    """

    solve: SolveFunction = field(kw_only=True)

    method: ClassVar[str] = "solver"
    scopes: ClassVar[tuple[str, ...]] = ("row", "layer")
    chooses_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        form = "(weight, moments, pattern, sparsity) -> (weight, mask)"
        check_function("SolverSpec", "solve", self.solve, form)
        super().__post_init__()

    @property
    def needs_mean(self) -> bool:
        return True

    @property
    def label(self) -> str:
        return function_name(self.solve)

    def scores(self, weight: Tensor, moments: GroupMoments) -> Tensor:
        return wanda_score(weight, moments.square)

    def solution(self, task: Task) -> list[Solution]:
        weights = retargeted(task, _RIDGE, self.alpha) if self.alpha else task.weights
        return [
            self._solved(task, name, weight if bar is None else masked(weight, ~bar), bar)
            for name, weight, bar in zip(task.names, weights, task.barred, strict=True)
        ]

    def _solved(self, task: Task, layer: str, weight: Tensor, bar: Tensor | None) -> Solution:
        goal, told = task.goal, task.moments.copied(_TOLD["gram"], layer)
        share = plain_share(goal.sparsity)
        found = _called(self.solve, layer, _copy(weight), told, goal.pattern, share)
        if not (isinstance(found, tuple | list) and len(found) == 2):
            raise SpecError(
                f"{layer}: {self.label} must return a pair (weight, mask), got "
                f"{type(found).__name__}"
            )
        new, keep = found
        _check_tensor(f"{layer}: the weight that {self.label} gives", new, weight)
        where = f"{layer}: the mask that {self.label} gives"
        _check_tensor(where, keep, weight, torch.bool)
        _check_counts(where, keep, bar, goal, self.scope or "row")
        kept = masked(new.detach().float(), keep)
        if not bool(kept.isfinite().all()):
            raise SpecError(f"{layer}: {self.label} keeps weights that are inf or NaN")
        return Solution(kept, keep.clone())


def plain_share(share: float | Fraction) -> float:
    """A float that `prune_count` takes for the same share: the least whose decimal is not below."""
    near = float(share)
    while isinstance(share, Fraction) and Fraction(repr(near)) < share:
        near = math.nextafter(near, 1.0)
    return near


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _called(function: Callable[..., Any], layer: str, *args: object) -> Any:
    try:
        return function(*args)
    except Exception as error:
        error.add_note(f"raised by {function_name(function)} on {layer}")
        raise


def _check_tensor(where: str, found: Any, weight: Tensor, dtype: torch.dtype | None = None) -> None:
    """What a function gives must be as large as the weight and lie beside it."""
    if not isinstance(found, Tensor):
        raise SpecError(f"{where} must be a tensor, got {type(found).__name__}")
    if found.shape != weight.shape:
        raise SpecError(
            f"{where} must have the weight's shape {tuple(weight.shape)}, got {tuple(found.shape)}"
        )
    if found.dtype != dtype if dtype else not found.dtype.is_floating_point:
        wanted = dtype or "a floating dtype"
        raise SpecError(f"{where} must be of {wanted}, got {found.dtype}")
    if found.device != weight.device:
        raise SpecError(f"{where} must be on {weight.device}, got {found.device}")


def _check_counts(where: str, keep: Tensor, bar: Tensor | None, goal: Goal, scope: str) -> None:
    """Refuse a mask that has other counts than a mask of scores has, or revives a weight."""
    if bar is not None and bool((keep & bar).any()):
        raise SpecError(
            f"{where} keeps {int((keep & bar).sum())} weights that an earlier mask pruned; they "
            "are 0 in the weight it gets and must be pruned again: let zeros go first"
        )
    free = torch.ones_like(keep) if bar is None else ~bar
    even = torch.where(free, 1.0, BARRED)
    wanted = project(even, goal.pattern, goal.sparsity, scope) & free
    pattern, unit = goal.pattern, "weights"
    if isinstance(pattern, Block):
        tiles = _tiles(keep, pattern)
        if not torch.equal(spread_tiles(tiles, pattern) & free, keep):
            raise SpecError(f"{where} keeps parts of tiles, and {pattern} keeps whole ones or none")
        keep, wanted, unit = tiles, _tiles(wanted, pattern), "tiles"
    if isinstance(pattern, NM):
        got, want = (t.unflatten(1, (-1, pattern.m)).sum(2) for t in (keep, wanted))
    elif scope == "row":
        got, want = keep.sum(1), wanted.sum(1)
    else:
        got, want = keep.sum(), wanted.sum()
    wrong = got != want
    if bool(wrong.any()):
        place = zip((f"{unit} in row", "group"), wrong.nonzero()[0].tolist(), strict=False)
        which = ", ".join(f"{what} {number}" for what, number in place) or f"{unit} in all"
        raise SpecError(
            f"{where} keeps {int(got[wrong][0])} {which}, expected {int(want[wrong][0])} ({goal}, "
            f"scope {scope!r}); wrong at {int(wrong.sum())} of {wrong.numel()} places"
        )


def _tiles(mask: Tensor, block: Block) -> Tensor:
    """(rows/R, cols/C) bool: tiles of which something is kept."""
    tiles = mask.unflatten(1, (-1, block.cols)).unflatten(0, (-1, block.rows))
    some: Tensor = tiles.any(3).any(1)
    return some
