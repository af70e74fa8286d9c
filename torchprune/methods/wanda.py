"""Wanda: pruning by weights and activations (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from torchprune.specs.method import GroupMoments
from torchprune.specs.spec import Spec


def wanda_score(weight: Tensor, square: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2, float32.

    Args:
        weight: (rows, cols).
        square: (cols,) float32 sum of squares of each input; any common factor gives the same
            ranking.
    """
    return weight.detach().float().abs() * square.sqrt()


@dataclass(frozen=True)
class WandaSpec(Spec):
    """Prune by |W_ij| * ||X_j||, weights unchanged (Sun et al., arXiv 2306.11695).

    Scope "row" (default, as the paper), "layer" or "global" (implies sequential="none").
    """

    method: ClassVar[str] = "wanda"
    scopes: ClassVar[tuple[str, ...]] = ("row", "layer", "global")

    def scores(self, weight: Tensor, moments: GroupMoments) -> Tensor:
        return wanda_score(weight, moments.square)
