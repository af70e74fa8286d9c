"""A matrix as a bitmask and its packed nonzeros: the smallest exact form of a sparse weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune.errors import LoweringError
from torchprune.lowering.kernels import gradients, operators
from torchprune.masking.packing import as_words, pack_bits, pack_values, unpack_bits

WORD = 64
"""Columns that one word of the bitmask covers."""

SLACK = 64
"""Zeros after the last value, so that kernels may read whole vectors of 64 bytes."""

gradients.register()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What values can be, but for int8 with a scale for each row."""


@dataclass(frozen=True, eq=False)
class Bitmask:
    """A (rows, cols) matrix without its zeros.

    Attributes:
        bits: (rows, ceil(cols / 64)) int64; bit c % 64 of word c // 64 is column c, 1 = nonzero.
        values: (nonzeros + slack,) float32, float16, bfloat16 or int8, row after row.
        starts: (rows + 1,) int32, the index of each row's first value.
        scales: (rows,) float32 by which a row's values are multiplied, or None.
        cols: columns of the matrix.
    """

    bits: Tensor
    values: Tensor
    starts: Tensor
    scales: Tensor | None
    cols: int

    @staticmethod
    def pack(weight: Tensor, scales: Tensor | None = None) -> Bitmask:
        """Leave out the zeros of a matrix.

        Args:
            weight: (rows, cols) float32, float16, bfloat16, or int8 with scales. Both zeros count
                as zero, so -0.0 comes back as 0.0; everything else bit for bit.
            scales: (rows,) for int8.

        Raises:
            LoweringError: another dtype, inf or NaN, or 2^31 nonzeros and more.
        """
        if weight.dim() != 2:
            raise LoweringError(f"a bitmask holds a matrix, got the shape {tuple(weight.shape)}")
        if weight.dtype not in DTYPES and weight.dtype != torch.int8:
            raise LoweringError(
                f"bitmask values are float32, float16, bfloat16 or int8, got {weight.dtype}"
            )
        with torch.inference_mode(False), torch.no_grad():
            return _packed(weight.detach(), scales)

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return len(self.bits)

    @staticmethod
    def bytes_of(rows: int, cols: int, nonzeros: int, dtype: torch.dtype) -> int:
        """Bytes of a matrix packed: bits in whole words, starts, nonzeros with slack, scales."""
        size = rows * (WORD // 8 * -(-cols // WORD) + 4) + 4
        return size + dtype.itemsize * (nonzeros + SLACK) + (4 * rows if dtype == torch.int8 else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.bits, self.values, self.starts, self.scales)
        return sum(part.nbytes for part in parts if part is not None)

    def unpack(self) -> Tensor:
        """The (rows, cols) matrix, in the values' dtype; float32 where there are scales."""
        unpack: Callable[..., Tensor] = torch.ops.torchprune.bitmask_unpack
        if self.values.dtype not in (*DTYPES, torch.int8):  # as `.to()` may have made them
            unpack = operators.unpack_in_torch
        dense = unpack(self.bits, self.values, self.starts, self.cols)
        return dense if self.scales is None else dense.float() * self.scales[:, None]

    def check(self, name: str, *, rows: int) -> None:
        """See that the parts fit together. Kernels do too, but cannot name the layer at fault.

        Raises:
            LoweringError: they do not. Parts without data (on "meta") are only held to be of the
                right shapes.
        """
        words = -(-self.cols // WORD)
        kinds = (self.bits.dtype, self.starts.dtype)
        parts = [p for p in (self.bits, self.values, self.starts, self.scales) if p is not None]
        if (
            kinds != (torch.int64, torch.int32)
            or self.bits.shape != (rows, words)
            or self.starts.shape != (rows + 1,)
            or self.values.dim() != 1
            or (self.scales is not None and self.scales.shape != (rows,))
            or (self.scales is not None and self.scales.dtype != torch.float32)
        ):
            scales = "" if self.scales is None else f", scales float32 {(rows,)}"
            got = "".join(
                f", {kind} {part.dtype} {tuple(part.shape)}"
                for kind, part in zip(("bits", "values", "starts", "scales"), parts, strict=False)
            )
            raise LoweringError(
                f"{name}: expected bits int64 {(rows, words)}, values of one dimension, starts "
                f"int32 {(rows + 1,)}{scales}, got{got[1:]}"
            )
        if len({(part.device, part.layout) for part in parts}) > 1:
            where = ", ".join(f"{part.layout} on {part.device}" for part in parts)
            raise LoweringError(f"{name}: its parts must lie alike and in one place, got {where}")
        if self.bits.is_meta:
            return
        found = unpack_bits(as_words(self.bits).view(torch.uint8), (rows, words * WORD))
        counts = torch.zeros(rows + 1, dtype=torch.int64, device=self.bits.device)
        torch.cumsum(found.sum(1), 0, out=counts[1:])
        if (
            bool(found[:, self.cols :].any())
            or not torch.equal(counts, self.starts.to(counts.dtype))
            or len(self.values) != int(counts[-1]) + SLACK
        ):
            raise LoweringError(f"{name}: its bits, starts and values contradict each other")


def _packed(weight: Tensor, scales: Tensor | None) -> Bitmask:
    if weight.is_floating_point() and not bool(weight.isfinite().all()):
        raise LoweringError("the weight holds inf or NaN")
    rows, cols = weight.shape
    mask = weight != 0
    counts = mask.sum(1)
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(counts, 0, out=starts[1:])
    if int(starts[-1]) >= 2**31:
        raise LoweringError(f"{int(starts[-1])} nonzeros; a bitmask holds less than 2^31")
    words = -(-cols // WORD)
    wide = torch.zeros(rows, words * WORD, dtype=torch.bool, device=weight.device)
    wide[:, :cols] = mask
    bits = pack_bits(wide).view(torch.int64).reshape(rows, words)
    values = pack_values(weight, mask)
    slack = values.new_zeros(SLACK)
    return Bitmask(
        bits,
        torch.cat([values, slack]),
        starts.int(),
        None if scales is None else scales.detach().float().contiguous(),
        cols,
    )


def obstacle(weight: Tensor, min_sparsity: float, devices: Sequence[str] = ("cpu",)) -> str | None:
    """Why a weight, in its module's layout, should not become a bitmask, or None.

    Args:
        devices: the kinds of device where it may be.
    """
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}"
    if weight.device.type not in devices:
        kinds = " and ".join(kind.upper() for kind in devices)
        return f"it is on {weight.device}, and packed products are for {kinds} devices here"
    if not weight.numel():
        return "it has no elements"
    if 1 - int(torch.count_nonzero(weight)) / weight.numel() < min_sparsity:
        return f"less than {min_sparsity:.0%} of it is zero (min_sparsity)"
    if not bool(weight.isfinite().all()):
        return "it holds inf or NaN"
    return None
