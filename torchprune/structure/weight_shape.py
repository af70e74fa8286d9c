"""The shape of a weight as it is used, whatever makes it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from torchprune.masking.mask import original_of
from torchprune.modes import eval_mode


def weight_shape(module: nn.Module, name: str = "weight") -> torch.Size:
    """Of a weight as it is used, whatever parametrizations make it."""
    weight: Tensor | None = original_of(module, name)
    if weight is not None:
        return weight.shape
    with torch.no_grad(), eval_mode(module):
        return cast(Tensor, getattr(module, name)).shape
