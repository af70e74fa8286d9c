"""2:4 weights as torch's semi-structured tensors: half the values, for the sparse units of GPUs.

torch compresses whatever it is given, and silently drops what is not 2:4; so everything is checked
here first. The tensors are of torch's own classes, for cuSPARSELt where torch has it, else CUTLASS.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

DTYPES = (torch.float16, torch.bfloat16)


def backend() -> type[SparseSemiStructuredTensor]:
    """The class that torch would compress to here, `_FORCE_CUTLASS` heeded as torch does."""
    forced = SparseSemiStructuredTensor._FORCE_CUTLASS
    lt = torch.backends.cusparselt.is_available() and not forced
    return SparseSemiStructuredTensorCUSPARSELT if lt else SparseSemiStructuredTensorCUTLASS


def is_semi_structured(weight: object) -> bool:
    """Whether a weight is compressed already."""
    return isinstance(weight, SparseSemiStructuredTensor)


def obstacle(weight: Tensor, kind: type[SparseSemiStructuredTensor]) -> str | None:
    """Why a (rows, cols) weight cannot be compressed without changing it, or None.

    Any device: what the product needs is asked elsewhere.
    """
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}; 2:4 products are of float16 or bfloat16"
    rules = cast(Any, kind)._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    rows, cols = rules.sparse_min_rows, rules.sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % cols:
        name = kind.__name__.removeprefix("SparseSemiStructuredTensor")
        return (
            f"its shape {tuple(weight.shape)} is no multiple of {rows}x{cols}, which {name} needs"
        )
    if not bool(weight.isfinite().all()):
        return "it holds inf or NaN"
    crowded = (weight != 0).view(len(weight), -1, 4).sum(-1) > 2
    if bool(crowded.any()):
        where = tuple(crowded.nonzero()[0].tolist())
        return (
            f"it is not 2:4: {int(crowded.sum())} groups of four hold more than two nonzeros, the "
            f"first in row {where[0]} at column {4 * where[1]}"
        )
    return None


def compressed_bytes(weight: Tensor) -> int:
    """Bytes of a compressed weight: half the values, and two bits for the place of each."""
    return weight.nbytes // 2 + weight.numel() // 8


def compress(weight: Tensor, kind: type[SparseSemiStructuredTensor]) -> Tensor:
    """A 2:4 weight as a semi-structured tensor. Call `obstacle` first.

    CUTLASS's layout is packed on any device, cuSPARSELt's needs its GPU.
    """
    zeros = torch.zeros((), dtype=weight.dtype, device=weight.device)
    plain = torch.where(weight == 0, zeros, weight)  # -0.0 is no zero to one of the compressors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in prototype stage"
        if kind is SparseSemiStructuredTensorCUTLASS:
            from torch.sparse._semi_structured_conversions import (
                sparse_semi_structured_from_dense_cutlass,
            )

            packed, meta = sparse_semi_structured_from_dense_cutlass(plain)
            return cast(
                Tensor,
                SparseSemiStructuredTensorCUTLASS(
                    plain.shape,
                    packed=packed,
                    meta=meta,
                    packed_t=None,
                    meta_t=None,
                    compressed_swizzled_bitmask=None,
                ),
            )
        return cast(Tensor, cast(Any, kind).from_dense(plain))


def decompress(weight: Tensor) -> Tensor:
    """The dense weight again, exactly."""
    return cast(Tensor, cast(Any, weight).to_dense())
