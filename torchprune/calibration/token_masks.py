"""What a user says of which tokens count, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchprune.errors import CalibrationError

TokenMask = str | Callable[[Any], Tensor | None] | Sequence[Tensor | None] | None
"""A column's name, a function of a batch as it was given, or a mask a batch."""


def token_mask_of(given: TokenMask, item: Any, index: int) -> Tensor | None:
    """(items, length) bool, True where a token counts; None where that is to be found out.

    Raises:
        CalibrationError: there is none for this batch, or it is no mask.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if not isinstance(item, Mapping) or given not in item:
            has = ", ".join(map(repr, item)) if isinstance(item, Mapping) else "no columns"
            raise CalibrationError(
                f"token_mask: batch {index} has no column {given!r}; it has {has}"
            )
        mask = item[given]
    elif callable(given):
        mask = given(item)
    elif index < len(given):
        mask = given[index]
    else:
        raise CalibrationError(
            f"token_mask has {len(given)} masks, but there is a batch {index}: give one a batch"
        )
    if mask is None:
        return None
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(
            f"token_mask: that of batch {index} is a {type(mask).__name__}, not a tensor"
        ) from None
    if mask.dim() == 1:
        mask = mask.unsqueeze(0)
    zero_or_one = mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())
    if mask.dim() != 2 or not zero_or_one:
        raise CalibrationError(
            f"token_mask: that of batch {index} has the shape {tuple(mask.shape)} and "
            f"{mask.dtype}; expected (batch, length), True or 1 where a token counts"
        )
    return mask.bool()
