"""The rows of a model's outputs that count: logits of tokens that are no padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchprune.calibration.batches import Batch


def logits_of(out: Any) -> Tensor | None:
    """The logits in a model's output, (..., classes), if it names some."""
    found = getattr(out, "logits", None)
    return found if isinstance(found, Tensor) and found.dim() > 1 else None


def rows_of(logits: Tensor, batch: Batch) -> Tensor:
    """(rows, classes) float32; without those of padding, where the batch has a mask of it."""
    keep = batch.tokens
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = batch.kwargs.get(name)
        if keep is None and isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
            keep = mask != 0
    if keep is not None and keep.shape == logits.shape[:-1] and bool(keep.any()):
        return logits[keep].float()
    return logits.reshape(-1, logits.shape[-1]).float()
