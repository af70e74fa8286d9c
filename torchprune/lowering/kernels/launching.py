"""Which kernel runs on a CUDA device for how many rows of input, and how it is started.

    up to 2 rows     float32 arithmetic, a row at a time: `sums_apiece`
    up to 16 rows    blocks, if input and values are of 16 bits: `by_blocks`, parts of the
                     columns beside each other, and `joined`; else as before
    more             the weight is unpacked, once, and torch multiplies

No call waits for the device or reads from it, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MOST = 16
"""Rows of input beyond which the weight is unpacked: the bytes are then shared by enough rows."""

APIECE = 2
"""Rows of input up to which each is summed by itself, though blocks could be multiplied."""

WIDE = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)

_JOINED = 256
"""Rows of weight whose parts a program of `joined` adds up."""

_COLS = 1 << 30
"""Columns that the kernels count in 32 bits, with room to spare."""


@dataclass(frozen=True)
class Tiles:
    """What a program of a kernel does.

    Attributes:
        rows: of the weight, that it takes.
        words: of 32 columns, in a step.
        warps: that share it.
        batch: rows of input.
        steps: of so many words, that it takes; only blocks are split along the columns.
    """

    rows: int
    words: int
    warps: int
    batch: int = 1
    steps: int = 8


UNPACKING = Tiles(4, 16, 4)


def tiles_for(batch: int, rows: int, *, blocks: bool) -> Tiles:
    """The tiles of a product of `batch` rows of input with `rows` of weight.

    Chosen from the compiled code: registers, and instructions for a weight. What a device says to
    them is for `benchmarks/lowering/gpu.py`.
    """
    few = rows < 4096  # a program for every two rows, or most of the device has none
    if blocks:
        return Tiles(16, 2, 2, 16, 4 if few else 8)
    if batch <= 2:
        return Tiles(2, 32, 4, batch) if few else Tiles(4, 16, 4, batch)
    return Tiles(2, 16, 4, 4)


@functools.cache
def why_not(device: torch.device) -> str:
    """Why Triton's kernels do not run on a device; empty if they do."""
    if device.type != "cuda":
        return f"Triton's kernels are for CUDA devices, not for {device.type}"
    if torch.version.hip is not None:
        return "Triton's kernels have not been tried on AMD's devices"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{name_of(device)} is older than what Triton supports (sm_80)"
    try:
        kernels()
    except Exception as error:  # whatever a package of another version does
        return f"triton does not work: {error}"
    return ""


def name_of(device: torch.device) -> str:
    """The architecture of a CUDA device, such as "sm_90"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def kernels() -> Any:
    """The kernels' module, which imports triton."""
    from torchprune.lowering.kernels import triton_bitmask

    return triton_bitmask


def can_take(x_dtype: torch.dtype, values: Tensor, cols: int) -> bool:
    """Whether there is a kernel for this; float64 is for torch."""
    return x_dtype in WIDE and values.dtype in (*WIDE, torch.int8) and cols < _COLS


def product(
    x: Tensor,
    bits: Tensor,
    values: Tensor,
    starts: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    cols: int,
    *,
    tiles: Tiles | None = None,
    blocks: bool | None = None,
) -> Tensor:
    """What `bitmask_linear` computes, for up to `MOST` rows of input in a kernel of its own.

    Args:
        tiles, blocks: to tune: the tiles, and whether blocks are multiplied; None leaves it here.
    """
    rows, batch = len(bits), x.shape[:-1].numel()
    if tiles is None and batch > MOST:
        weight = unpacked(bits, values, starts, cols, scales, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    out = x.new_empty((*x.shape[:-1], rows))
    if not out.numel():
        return out
    if blocks is None:
        alike = x.dtype in HALVES and values.dtype in (x.dtype, torch.int8)
        blocks = alike and batch > APIECE
    tiles = tiles or tiles_for(batch, rows, blocks=blocks)
    per_row = 2 * bits.shape[1]
    sizes = (batch, rows, cols, per_row, _size(values))
    given = _contiguous(x, _halved(bits), values, starts)
    ends = _contiguous(scales, bias)
    grid = (-(-rows // tiles.rows), -(-batch // tiles.batch))
    shape = {"BATCH": tiles.batch, "ROWS": tiles.rows, "WORDS": tiles.words}
    if not blocks:
        _run(kernels().sums_apiece, grid, tiles.warps, *given, *ends, out, *sizes, **shape)
        return out
    parts = max(1, -(-per_row // (tiles.words * tiles.steps)))
    sums = x.new_empty((parts, batch, rows), dtype=torch.float32)
    shape["STEPS"] = tiles.steps
    _run(kernels().by_blocks, (*grid, parts), tiles.warps, *given, sums, *sizes, **shape)
    grid = (-(-rows // _JOINED), batch)
    _run(kernels().joined, grid, 4, sums, *ends, out, batch, rows, parts, ROWS=_JOINED)
    return out


def unpacked(
    bits: Tensor,
    values: Tensor,
    starts: Tensor,
    cols: int,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    tiles: Tiles = UNPACKING,
) -> Tensor:
    """What `bitmask_unpack` gives; with scales and in another dtype if asked."""
    out = values.new_empty((len(bits), cols), dtype=dtype)
    if out.numel():
        parts = _contiguous(_halved(bits), values, starts, scales)
        sizes = (len(bits), cols, 2 * bits.shape[1], _size(values))
        grid = (-(-len(bits) // tiles.rows),)
        shape = {"ROWS": tiles.rows, "WORDS": tiles.words}
        _run(kernels().unpacked, grid, tiles.warps, *parts, out, *sizes, **shape)
    return out


def _contiguous(*parts: Tensor | None) -> list[Tensor | None]:
    return [None if part is None else part.contiguous() for part in parts]


def _halved(bits: Tensor) -> Tensor:
    """The words of 64 columns as pairs of 32."""
    return bits.contiguous().view(torch.int32)


def _size(values: Tensor) -> int:
    """How many values there are to read, as far as `starts` can tell of them."""
    return min(len(values), 2**31 - 1)


def _run(kernel: Any, grid: tuple[int, ...], warps: int, *given: Any, **fixed: Any) -> None:
    device = next(part.device for part in given if part is not None)
    with _on(device):
        kernel[grid](*given, **fixed, num_warps=warps, enable_fp_fusion=True)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton starts kernels on the current device. Under its interpreter tensors are on the CPU."""
    on: Callable[..., contextlib.AbstractContextManager[Any]] = torch.cuda.device
    return on(device) if device.type == "cuda" else contextlib.nullcontext()
