"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from torch import Tensor


def magnitude_score(weight: Tensor) -> Tensor:
    """|W|, float32, of the weight's shape."""
    return weight.detach().float().abs()
