"""RIA: relative importance and activations (Zhang et al., "Plug-and-Play", ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchprune.specs.method import GroupMoments
from torchprune.specs.options import check_above_zero
from torchprune.specs.spec import Spec


def ria_score(weight: Tensor, square: Tensor, power: float = 0.5) -> Tensor:
    """(|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||X_j||_2^power, float32.

    Args:
        weight: (rows, cols).
        square: (cols,) float32 sum of squares of each input; any common factor gives the same
            ranking.
    """
    size = weight.detach().float().abs()
    along, across = size.sum(1, keepdim=True), size.sum(0, keepdim=True)
    share = torch.where(along > 0, size / along, 0) + torch.where(across > 0, size / across, 0)
    return share * square.pow(power / 2)


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

    def scores(self, weight: Tensor, moments: GroupMoments) -> Tensor:
        return ria_score(weight, moments.square, self.power)
