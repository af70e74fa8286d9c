"""The factors of a low-rank change, as a parametrization: the step after a mask."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from torchprune.masking.mask import Mask
from torchprune.masking.matrices import View
from torchprune.training.masked_sum import Sum, masked_sum, wide


class LowRank(nn.Module):
    """The parametrization `W + scale * M (.) (B A)`.

    Parameters:
        A: (groups, rank, cols), float32 at least, drawn as a linear layer's weight.
        B: (groups, rows, rank), zero.
    """

    ends_by = (
        "torchprune.training.merge_mask_lora(model) merges it, remove_mask_lora(model) takes it off"
    )

    def __init__(
        self,
        weight: nn.Parameter,
        view: View,
        mask: Mask | None,
        rank: int,
        alpha: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        rank = min(rank, view.rows, view.cols)
        self.scale = alpha / rank
        dtype, device = wide(weight.dtype), weight.device
        down = torch.rand(view.groups, rank, view.cols, generator=generator, dtype=dtype)
        self.A = nn.Parameter(((2 * down - 1) / math.sqrt(view.cols)).to(device))
        self.B = nn.Parameter(torch.zeros(view.groups, view.rows, rank, dtype=dtype, device=device))
        self.trained = weight.requires_grad
        self.__dict__["to"] = Sum(view, mask)  # the mask stands before it: not another child

    def forward(self, weight: Tensor) -> Tensor:
        return masked_sum(weight, self.B, self.A, self.scale, cast(Sum, self.to))

    def right_inverse(self, weight: Tensor) -> Tensor:
        # What is assigned is the weight under the factors, as for a mask alone.
        return weight

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[1]}, scale={self.scale}"
