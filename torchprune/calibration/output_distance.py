"""How far a changed model's outputs are from the dense one's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS = 256
"""Rows of logits that are compared at once."""


def divergence(logs: Tensor, logits: Tensor) -> float:
    """KL(dense || changed) in nats, mean over rows.

    With d = log q - log p it is the sum of p (e^d - 1 - d), no term of which is negative: what
    rounding does to the sums of p and q does not drown a small divergence.
    """
    total = 0.0
    for ours, theirs in zip(logs.split(_ROWS), logits.split(_ROWS), strict=True):
        other = torch.log_softmax(theirs, -1)
        apart = (other - ours).nan_to_num_(0.0, math.inf, -math.inf)  # classes ruled out by both
        p = ours.exp()
        near = p * (torch.expm1(apart.clamp(-1, 1)) - apart)
        far = other.exp() - p - p * apart
        total += float(torch.where(apart.abs() < 1, near, far).nan_to_num(0.0).double().sum())
    return total / max(1, len(logs))


def output_change(dense: Sequence[Tensor], changed: Sequence[Tensor]) -> float:
    """||y - y'||^2 / ||y||^2 over all outputs."""
    lost = sum(
        float((a.float() - b.float()).square().sum()) for a, b in zip(dense, changed, strict=True)
    )
    total = sum(float(a.float().square().sum()) for a in dense)
    return lost / total if total > 0 else (0.0 if lost == 0 else math.inf)
