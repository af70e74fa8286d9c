"""What zeros look like where nobody wrote down how they came about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchprune.masking.matrices import View, view_of
from torchprune.masking.selection import layers_of

_GROUPS = ((1, 4), (2, 4), (4, 8), (2, 8))
FEW = 0.01
"""Share of zeros below which a layer counts as dense."""


@dataclass(frozen=True)
class Detected:
    """Layers with zeros, and what pattern they follow."""

    said: str
    layers: int
    weights: int


def detected(model: nn.Module) -> Detected:
    """The exact zeros of a model without records, and the tightest n:m pattern that they follow."""
    kinds: dict[str, int] = {}
    weights = zeros = 0
    for layer in layers_of(model):
        value = getattr(layer.module, layer.tensor).detach()
        zero = value == 0
        count = int(torch.count_nonzero(zero))
        if count < FEW * value.numel():
            continue
        kind = pattern_in(view_of(layer.module, value.shape), zero)
        kinds[kind] = kinds.get(kind, 0) + 1
        weights += value.numel()
        zeros += count
    if not kinds:
        return Detected("nothing records a pruning, and no layer holds more than a few zeros", 0, 0)
    told = ", ".join(f"{count:,} layers {kind}" for kind, count in sorted(kinds.items()))
    said = (
        f"nothing records what was asked; found {zeros:,} zeros among {weights:,} weights: {told}"
    )
    return Detected(said, sum(kinds.values()), weights)


def pattern_in(view: View, zero: Tensor) -> str:
    """The tightest n:m pattern that zeros follow, or "unstructured"."""
    matrix = view.to_matrix(~zero)
    for n, m in _GROUPS:
        if view.axis % m == 0 and int(matrix.reshape(-1, m).sum(1).max()) <= n:
            return f"{n}:{m}"
    return "unstructured"
