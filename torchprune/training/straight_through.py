"""Masks under which weights go on learning, for patterns that are learnt from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchprune.errors import SpecError
from torchprune.masking.packing import pack_bits
from torchprune.masking.parametrization import Mask, Record
from torchprune.masking.passing import passing
from torchprune.masking.shards import local_of, part_of, whole_of
from torchprune.specs.options import Checked


@dataclass(frozen=True)
class StraightThrough(Checked):
    """Learn all weights while only the best of them act (Zhou et al., SR-STE, arXiv 2102.04010).

    Gradients pass the mask, so that pruned weights go on learning and may come back; each is also
    drawn to zero, which keeps masks from flickering. Masks are chosen anew from all weights at each
    change of the schedule: `Constant(0.5)` with "2:4" does so after every step, as the paper.

    Args:
        decay: what is added to the gradient of each pruned weight, times the weight, right before
            an optimizer's step: once, however many batches it stands for and whatever scaled them.
            A compiled `optimizer.step` goes without.
    """

    decay: float = 2e-4

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float):
            raise SpecError(f"StraightThrough: decay must be a number, got {self.decay!r}")
        if not 0 <= self.decay < float("inf"):
            raise SpecError(f"StraightThrough: decay must be at least 0, got {self.decay!r}")


class LearningMask(Mask):
    """A mask that leaves the weights under it as they are, and lets gradients pass.

    The weight behind it is dense; what a module computes with, saves as a plain model and folds to
    is the product.
    """

    learns: ClassVar[bool] = True

    def forward(self, weight: Tensor) -> Tensor:
        exporting = torch.compiler.is_exporting()
        if torch.is_grad_enabled() and not (self._transparent or exporting):
            return passing(weight, self.whole(weight))
        return super().forward(weight)

    @property
    def reversible(self) -> bool:
        return True

    def makes_ready(self, weight: Tensor) -> bool:
        return self._transparent

    def put_on(self, weight: Tensor) -> None:
        """Nothing keeps zeros in the weight: it has none."""

    def clean_part(self, shard: Tensor) -> bool:
        return self._transparent

    def restored(self, weight: Tensor) -> Tensor:
        return whole_of(weight).detach().clone()

    def decay(self, weight: Tensor, share: float) -> None:
        """Add a share of each pruned weight to its gradient."""
        if weight.grad is None:
            return
        gradient, values = local_of(weight.grad), local_of(weight)
        keep = part_of(self.mask, weight)
        gradient.add_(values.masked_fill(keep, 0).to(gradient.dtype), alpha=share)

    def change(self, weight: Tensor, mask: Tensor, record: Record, *, reversible: bool) -> None:
        self.bits.copy_(pack_bits(mask))
        self.record = record
