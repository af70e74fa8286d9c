"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from torchprune.specs.method import GroupMoments, Needs
from torchprune.specs.spec import Spec


def magnitude_score(weight: Tensor) -> Tensor:
    """|W|, float32, of the weight's shape."""
    return weight.detach().float().abs()


@dataclass(frozen=True)
class MagnitudeSpec(Spec):
    """Prune the weights of smallest absolute value. Needs no data.

    Scope "layer" (default: the whole matrix, as the references), "row" or "global".
    """

    method: ClassVar[str] = "magnitude"
    scopes: ClassVar[tuple[str, ...]] = ("layer", "row", "global")

    @property
    def needs(self) -> Needs:
        return "nothing"

    def scores(self, weight: Tensor, moments: GroupMoments) -> Tensor:
        return magnitude_score(weight)
