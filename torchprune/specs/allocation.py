"""How one budget of zeros may be shared among layers: the values that `allocation=` takes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torchprune.errors import SpecError
from torchprune.specs.options import Checked, check_above_zero, check_share, check_whole

Loss = Callable[[nn.Module, Any], Tensor]

_MOST_LEVELS = 50
"""So that the masks of all levels are counted in eight bits: rungs may be half as wide."""


@dataclass(frozen=True)
class OWL(Checked):
    """Prune blocks with many outliers less (Yin et al., OWL, arXiv 2310.05175).

    A weight is an outlier where |W_ij| * ||X_j|| is above `outlier` times its mean over the block.
    The block with the largest share of outliers is pruned least, the one with the smallest most,
    the others linearly between. All layers of a block get the same sparsity.

    Args:
        outlier: how many times the mean.
        spread: each sparsity is within so much of the target's.
    """

    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        check_above_zero("OWL", "outlier", self.outlier)
        check_share("OWL", "spread", self.spread)


@dataclass(frozen=True)
class LeastError(Checked):
    """Choose each layer's sparsity so that the relative errors of all layers sum to the least.

    Errors are measured on inputs of the dense model, at several sparsities, with masks of the
    method's own scores (Wanda's for methods that change weights), and their lower convex hulls
    are descended together.

    Args:
        levels: sparsities at which each layer is measured.
        spread: each sparsity is within so much of the target's.
    """

    levels: int = 9
    spread: float = 0.1

    def __post_init__(self) -> None:
        check_whole("LeastError", "levels", self.levels)
        check_share("LeastError", "spread", self.spread)
        if self.levels < 2:
            raise SpecError(f"LeastError: levels must be at least 2, got {self.levels}")


@dataclass(frozen=True)
class Search(Checked):
    """Search each layer's sparsity by the model's loss on calibration batches.

    Evolution as in EvoPress (Sieberling et al., arXiv 2410.14649): every generation, copies of the
    best allocation so far move sparsity from some layers to others, and the one of least loss takes
    its place if it is better. Masks are made once, of the method's own scores on the dense model's
    inputs (Wanda's for methods that change weights). The result is never worse than uniform
    allocation by the loss that is searched. It needs room for the weights once more, and a byte a
    weight.

    Args:
        generations: how many. Each costs `offspring` runs of the model over `batches`.
        offspring: allocations tried in each.
        levels: about how many steps of sparsity each layer has on either side of the target.
        spread: each sparsity is within so much of the target's.
        batches: calibration batches, the first ones, that judge.
        seed: of the moves. The same seed gives the same allocation.
        path: a JSON file that holds the best allocation so far, written whole after every
            generation. If it is there already, the search goes on from it, if it is of the same
            model, spec, data and seed; another is refused with a CheckpointError.
        loss: (model, batch) -> scalar. Default: a transformers language model's own.
    """

    generations: int = 50
    offspring: int = 8
    levels: int = 4
    spread: float = 0.1
    batches: int = 4
    seed: int = 0
    path: str | os.PathLike[str] | None = field(default=None, metadata={"saved": False})
    loss: Loss | None = field(default=None, metadata={"saved": False})

    def __post_init__(self) -> None:
        for name in ("generations", "offspring", "levels", "batches"):
            check_whole("Search", name, getattr(self, name))
        if self.levels > _MOST_LEVELS:
            raise SpecError(f"Search: levels must be at most {_MOST_LEVELS}, got {self.levels}")
        check_share("Search", "spread", self.spread)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise SpecError(f"Search: seed must be a whole number, got {self.seed!r}")
        if not isinstance(self.path, str | os.PathLike | None):
            raise SpecError(f"Search: path must be a file's path, got {self.path!r}")
        if self.loss is not None and not callable(self.loss):
            raise SpecError("Search: loss must be a callable (model, batch) -> scalar")


@dataclass(frozen=True)
class MeasuredCosts:
    """What layers were found to cost: name and (sparsity, cost) at each level. Its `repr` is short,
    and tells costs apart."""

    layers: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]

    def __repr__(self) -> str:
        digest = hashlib.sha256(repr(self.layers).encode()).hexdigest()
        return f"MeasuredCosts({len(self.layers)} layers, {digest[:12]})"


@dataclass(frozen=True)
class Sensitivity(Checked):
    """Choose each layer's sparsity so that what all layers cost the model sums to the least.

    A layer's cost is what pruning it alone, by masks of the method's own scores (Wanda's for
    methods that change weights), does to the model's outputs. It is predicted from a few backward
    passes through the dense model, or was measured by `torchprune.sensitivity`.

    Args:
        cost: "outputs", the predicted KL from the dense model (of outputs that are no logits their
            squared change); "error", the layer's relative squared error; "squared", the same
            without division.
        levels: sparsities at which each layer is looked at.
        spread: each sparsity is within so much of the target's.
        probes: backward passes, for "outputs".
        seed: of their random directions. The same seed gives the same allocation.
        result: measured costs, instead of `cost`: what `torchprune.sensitivity` returned, a file
            that it wrote, or layer name -> [(sparsity, cost), ...]. Layers that it leaves out keep
            the uniform sparsity.
        metric: which of the result's measures; default: the one that it ranks by.
    """

    cost: str = "outputs"
    levels: int = 9
    spread: float = 0.1
    probes: int = 8
    seed: int = 0
    result: Any = field(default=None, metadata={"saved": False})
    metric: str | None = None

    def __post_init__(self) -> None:
        if self.cost not in _COSTS:
            raise SpecError(
                f"Sensitivity: cost {self.cost!r} is not understood; accepted: "
                f"{', '.join(map(repr, _COSTS))}"
            )
        for name in ("levels", "probes"):
            check_whole("Sensitivity", name, getattr(self, name))
        if self.levels < 2:
            raise SpecError(f"Sensitivity: levels must be at least 2, got {self.levels}")
        check_share("Sensitivity", "spread", self.spread)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise SpecError(f"Sensitivity: seed must be a whole number, got {self.seed!r}")
        if self.metric is not None and not isinstance(self.metric, str):
            raise SpecError(f"Sensitivity: metric must be a measure's name, got {self.metric!r}")
        object.__setattr__(self, "result", _measured(self.result, self.metric))


def _measured(result: Any, metric: str | None) -> str | os.PathLike[str] | MeasuredCosts | None:
    """What `result=` holds, as a value that specs can be compared by."""
    if result is None or isinstance(result, str | os.PathLike | MeasuredCosts):
        return result
    found = result.costs(metric) if callable(getattr(result, "costs", None)) else result
    try:
        return MeasuredCosts(
            tuple((str(n), tuple((float(s), float(c)) for s, c in p)) for n, p in found.items())
        )
    except (AttributeError, TypeError, ValueError):
        raise SpecError(
            "Sensitivity: result must be what torchprune.sensitivity returned, a file that it "
            "wrote, or layer name -> [(sparsity, cost), ...], got "
            f"{type(result).__name__}"
        ) from None


_COSTS = ("outputs", "error", "squared")

Uneven = OWL | LeastError | Search | Sensitivity


def read_allocation(where: str, value: object) -> Uneven | None:
    """What `allocation=` asks for; None is uniform.

    Raises:
        SpecError: for anything else, showing the accepted forms.
    """
    if isinstance(value, Uneven):
        return value
    named = {
        "uniform": None,
        "owl": OWL(),
        "error": LeastError(),
        "search": Search(),
        "sensitivity": Sensitivity(),
    }
    if isinstance(value, str) and value in named:
        return named[value]
    raise SpecError(
        f"{where}: allocation {value!r} is not understood; accepted: "
        f"{', '.join(map(repr, named))}, OWL(...), LeastError(...), Search(...), "
        "Sensitivity(...)"
    )
