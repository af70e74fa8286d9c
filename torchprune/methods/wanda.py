"""Wanda: pruning by weights and activations (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from torch import Tensor


def wanda_score(weight: Tensor, square: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2, float32.

    Args:
        weight: (rows, cols).
        square: (cols,) float32 sum of squares of each input; any common factor gives the same
            ranking.
    """
    return weight.detach().float().abs() * square.sqrt()
