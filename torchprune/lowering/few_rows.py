"""2:4 layers that have a kernel of their own for few rows of input.

torch's semi-structured products fill a tile of the sparse units whatever there is to multiply. For
few rows the bitmask kernels need less; and the values that they read are those that a
semi-structured tensor holds anyway, two of every four, row after row. So a layer has both for one
bit a weight more, and takes what suits the rows of each call.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from torchprune.lowering.bitmask import SLACK, Bitmask
from torchprune.lowering.kernels import launching
from torchprune.lowering.semi_structured import decompress

FEW = launching.MOST - 1
"""Rows of input up to which the bitmask kernels multiply."""

_OF = "_torchprune_few_of"
"""Where a layer keeps the weight that its bits are of."""


class SemiStructuredLinear(nn.Linear):
    """A linear layer with a semi-structured weight, and bits by which others read its values.

    Attributes:
        few_bits, few_values, few_starts: as in `Bitmask`, which has a value for two of every four
            weights even where they are zero. On CUDA devices the values are the weight's own.
    """

    few_bits: Tensor
    few_values: Tensor
    few_starts: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the weight's dtype, summed in float32."""
        mine = self.weight is self.__dict__.get(_OF) and x.dtype == self.few_values.dtype
        if not mine or x.shape[:-1].numel() > FEW:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.torchprune.bitmask_linear(  # type: ignore[no-any-return]
            x, self.few_bits, self.few_values, self.few_starts, None, self.bias, self.in_features
        )


def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels for few rows on a device."""
    return not launching.why_not(device)


def bytes_of(weight: Tensor) -> int:
    """Bytes that a weight takes beside its semi-structured tensor."""
    rows, cols = weight.shape
    return Bitmask.bytes_of(rows, cols, 0, weight.dtype) - SLACK * weight.dtype.itemsize


def put_on(module: nn.Linear) -> None:
    """Let a linear layer of a semi-structured weight take what suits a call's rows, in place.

    Nothing is done where the weight's values do not lie as is expected of them.
    """
    weight = cast(Tensor, module._parameters["weight"])
    packed = parts_of(weight)
    if packed is None:
        return
    for name in ("bits", "values", "starts"):
        module.register_buffer(f"few_{name}", getattr(packed, name), persistent=False)
    module.__dict__[_OF] = weight
    module.__class__ = SemiStructuredLinear


def take_off(module: nn.Module) -> None:
    """Undo `put_on`, in place."""
    if isinstance(module, SemiStructuredLinear):
        for name in ("bits", "values", "starts"):
            delattr(module, f"few_{name}")
        module.__dict__.pop(_OF)
        cast(nn.Module, module).__class__ = nn.Linear


def parts_of(weight: Tensor) -> Bitmask | None:
    """A semi-structured weight as a bitmask over its own values, or None if these lie otherwise."""
    with torch.no_grad():
        try:
            return _parts_of(cast(Any, weight))
        except (RuntimeError, NotImplementedError):  # no such layout: torch's products stand alone
            return None


def _parts_of(weight: Any) -> Bitmask | None:
    rows, cols = weight.shape
    values, slots = weight.values().detach().reshape(-1), _slots_of(weight)
    if len(values) != rows * cols // 2 or not bool((slots.sum(1) == cols // 2).all()):
        return None
    bits = Bitmask.pack(slots.to(weight.dtype)).bits
    starts = torch.arange(rows + 1, dtype=torch.int32, device=weight.device) * (cols // 2)
    if weight.device.type == "cpu":  # whose kernels read whole vectors
        values = torch.cat([values, values.new_zeros(SLACK)])
    packed = Bitmask(bits, values, starts, None, cols)
    return packed if torch.equal(packed.unpack(), decompress(weight)) else None


def _slots_of(weight: Any) -> Tensor:
    """(rows, cols) bool: where a weight's values belong, zero ones too."""
    ones, kind = weight.packed.clone(), type(weight)
    if kind is SparseSemiStructuredTensorCUTLASS:
        ones.fill_(1)
    else:  # values, and then what tells where they belong
        ones[: weight.numel() // 2].fill_(1)
    parts = dict.fromkeys(("packed_t", "meta_t", "compressed_swizzled_bitmask"))
    return decompress(kind(weight.shape, packed=ones, meta=weight.meta, **parts)) != 0
