"""What a method is told and what it answers: plain records; the arithmetic is in `methods/`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

from torch import Tensor

from torchprune.errors import SpecError
from torchprune.specs.goals import Goal

Needs = Literal["nothing", "square", "gram"]
"""What scores take of a layer's inputs: nothing, sums of squares, or the second moment too."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class GroupMoments:
    """What calibration found of the inputs that one matrix of weights multiplies.

    A linear layer is one group. A grouped convolution has a matrix a group, fused experts have one
    an expert, and each sees the inputs of its own. The columns of a convolution are the taps of its
    kernel times the input channels, in the order of the weight matrix.

    Attributes:
        layer: the layer's name.
        rows: how many input rows x (tokens, or positions of a convolution) were counted.
        square: (cols,) float32, sum of x_j^2 over the rows.
        mean: (cols,) float32, mean of x_j.
        gram: (cols, cols) float32, sum of x x^T.
        cross: (cols, cols) float32, sum of x_d x^T, with x_d what the dense model reads there.

    Raises:
        SpecError: on reading what the method did not say that it needs.
    """

    layer: str
    rows: int = 0
    found: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def square(self) -> Tensor:
        return self._get("square")

    @property
    def mean(self) -> Tensor:
        return self._get("mean")

    @property
    def gram(self) -> Tensor:
        return self._get("gram")

    @property
    def cross(self) -> Tensor:
        return self._get("cross")

    def copied(self, names: Collection[str], layer: str) -> GroupMoments:
        """Copies of these alone, for functions that nobody knows; `layer` reads the same inputs."""
        kept = {name: value.clone() for name, value in self.found.items() if name in names}
        return GroupMoments(layer, self.rows, kept)

    def _get(self, name: str) -> Tensor:
        if name not in self.found:
            level = "gram" if name == "gram" else "square"
            raise SpecError(
                f"{self.layer}: moments.{name} was not collected, since the method does not say "
                f"that it needs it: ScoreSpec(..., needs={level!r})"
            )
        return self.found[name]


@dataclass(frozen=True, eq=False)
class Task:
    """Matrices that read one group of inputs, and what is asked of all of them.

    Attributes:
        weights: (rows, cols) each, any floating dtype; zero where an earlier mask pruned.
        names: their layers'.
        barred: for each (rows, cols) bool, weights that an earlier mask pruned and that must stay
            so, or None.
        goal: the pattern and the share of zeros.
        moments: of their inputs, with the second moment.
        shared: what was made once for all tasks with these inputs, see `once`.
        notes: what the report should say of the layers; filled as they are solved.
    """

    weights: Sequence[Tensor]
    names: Sequence[str]
    barred: Sequence[Tensor | None]
    goal: Goal
    moments: GroupMoments
    shared: dict[Hashable, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made for the first of all tasks with these inputs alone."""
        if key not in self.shared:
            self.shared[key] = make()
        return cast(T, self.shared[key])


@dataclass(frozen=True, eq=False)
class Solution:
    """One pruned matrix.

    Attributes:
        weight: (rows, cols) float32 new weights W', zero off the mask.
        keep: (rows, cols) bool mask, True = kept.
        squared: tr(D G D^T), D = W - W', with G the second moment; None where the method does not
            know it for nothing.
    """

    weight: Tensor
    keep: Tensor
    squared: float | None = None
