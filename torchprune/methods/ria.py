"""RIA: relative importance and activations (Zhang et al., "Plug-and-Play", ICLR 2024)."""

from __future__ import annotations

import torch
from torch import Tensor


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
