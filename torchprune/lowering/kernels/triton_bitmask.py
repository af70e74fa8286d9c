"""The products with a bitmask weight in Triton, for CUDA devices. Needs triton when imported.

A program takes some rows of the weight and walks along them, some words of 32 columns at a time
(the format's words of 64 read as pairs). The bits below a column's own, counted, and the values
before its word tell where its value lies: one load for each nonzero, next to its neighbours'. The
words of the next step are loaded before the values of this one.

Damage cannot be refused here, as that would mean to wait for the device. What a row may read is
bounded by its entries in `starts`, and these by the size of `values`; a row whose bits do not use
up just what `starts` gives it comes out as NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ones(word):
    """How many bits of each uint32 are set: what compilers know to be one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _words(bits_ptr, row, inside, first, per_row, cols, WORDS: tl.constexpr):
    """uint32 (rows, WORDS): words of the rows from the word `first` on, none beyond `cols`."""
    at = first + tl.arange(0, WORDS)
    there = inside[:, None] & (32 * at < cols)[None, :]
    place = row.to(tl.int64)[:, None] * per_row + at[None, :]
    word = tl.load(bits_ptr + place, mask=there, other=0).to(tl.uint32, bitcast=True)
    beyond = tl.minimum(tl.maximum(32 * at + 32 - cols, 0), 31).to(tl.uint32)[None, :]
    return (word << beyond) >> beyond


@triton.jit
def _span(starts_ptr, row, inside, size):
    """Where the values of each row start and end, and whether that can be: else 0, 0."""
    start = tl.load(starts_ptr + row, mask=inside, other=0)
    end = tl.load(starts_ptr + row + 1, mask=inside, other=0)
    possible = (start >= 0) & (start <= end) & (end <= size)
    return tl.where(possible, start, 0), tl.where(possible, end, 0), possible


@triton.jit
def _before(bits_ptr, row, inside, first, per_row, cols, WORDS: tl.constexpr):
    """How many nonzeros each row has in the words before `first`, a multiple of WORDS."""
    found = tl.full(row.shape, 0, tl.int32)
    for at in range(0, first, WORDS):
        found += tl.sum(_ones(_words(bits_ptr, row, inside, at, per_row, cols, WORDS)), 1)
    return found


@triton.jit
def _places(word, offset, end):
    """What of the words has its values before `end`, where these start, and where the next do."""
    count = _ones(word)
    last = offset[:, None] + tl.cumsum(count, 1)
    fits = last.to(tl.uint32) <= end.to(tl.uint32)[:, None]
    return tl.where(fits, word, 0), last - count, offset + tl.sum(count, 1)


@triton.jit
def _tile(values_ptr, word, place):
    """(rows, WORDS, 32): the weight, zeros and all."""
    bit = tl.arange(0, 32).to(tl.uint32)
    one = (tl.full((32,), 1, tl.uint32) << bit)[None, None, :]
    word = word[:, :, None]
    at = place[:, :, None] + _ones(word & (one - 1))
    return tl.load(values_ptr + at, mask=(word & one) != 0, other=0)


@triton.jit
def _write(sums, b, row, inside, broken, scales_ptr, bias_ptr, out_ptr, batch, rows):
    """Scale the sums (of x, of the weight), add the bias, round once, and store."""
    if scales_ptr is not None:
        scale = tl.load(scales_ptr + row, mask=inside, other=0)
        sums *= scale.to(tl.float32)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + row, mask=inside, other=0)
        sums += bias.to(tl.float32)[None, :]
    sums = tl.where(broken[None, :], float("nan"), sums)
    at = b.to(tl.int64)[:, None] * rows + row[None, :]
    there = (b < batch)[:, None] & inside[None, :]
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def sums_apiece(
    x_ptr,
    bits_ptr,
    values_ptr,
    starts_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    batch,
    rows,
    cols,
    per_row,
    size,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """x W^T + bias for one, two or four rows of x, of any dtypes, with float32 arithmetic.

    The grid is (ceil(rows / ROWS), ceil(batch / BATCH)).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    offset, end, possible = _span(starts_ptr, row, inside, size)
    x_row = x_ptr + b.to(tl.int64)[:, None, None] * cols
    sums = tl.full((BATCH, ROWS, WORDS, 32), 0.0, tl.float32)
    word = _words(bits_ptr, row, inside, 0, per_row, cols, WORDS)
    for first in range(0, per_row, WORDS):
        ahead = _words(bits_ptr, row, inside, first + WORDS, per_row, cols, WORDS)
        word, place, offset = _places(word, offset, end)
        tile = _tile(values_ptr, word, place).to(tl.float32)
        col = 32 * (first + tl.arange(0, WORDS))[:, None] + tl.arange(0, 32)[None, :]
        there = (b < batch)[:, None, None] & (col < cols)[None, :, :]
        x = tl.load(x_row + col[None, :, :], mask=there, other=0).to(tl.float32)
        sums += tile[None, :, :, :] * x[:, None, :, :]
        word = ahead
    broken = (possible == 0) | (offset != end)
    total = tl.sum(tl.sum(sums, 3), 2)
    _write(total, b, row, inside, broken, scales_ptr, bias_ptr, out_ptr, batch, rows)


@triton.jit
def by_blocks(
    x_ptr,
    bits_ptr,
    values_ptr,
    starts_ptr,
    out_ptr,
    batch,
    rows,
    cols,
    per_row,
    size,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """x W^T for up to BATCH rows of x of 16 bits, with the units that multiply blocks, in parts.

    Values are of x's dtype, or int8, which both float16 and bfloat16 hold exactly. A program takes
    STEPS * WORDS words of its rows, after counting what is before them, and writes its sums to its
    part of the output, float32 (parts, batch, rows). The grid is (ceil(rows / ROWS),
    ceil(batch / BATCH), parts). ROWS and BATCH are 16 at the least.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    part = tl.program_id(2)
    begin = part * STEPS * WORDS
    start, end, possible = _span(starts_ptr, row, inside, size)
    word = _words(bits_ptr, row, inside, begin, per_row, cols, WORDS)
    offset = start + _before(bits_ptr, row, inside, begin, per_row, cols, WORDS)
    x_row = x_ptr + b.to(tl.int64)[None, :] * cols
    sums = tl.full((ROWS, BATCH), 0.0, tl.float32)
    for step in range(0, STEPS):
        first = begin + step * WORDS
        ahead = _words(bits_ptr, row, inside, first + WORDS, per_row, cols, WORDS)
        word, place, offset = _places(word, offset, end)
        tile = _tile(values_ptr, word, place)
        if values_ptr.dtype.element_ty == tl.int8:
            tile = tile.to(tl.float32)
        tile = tile.to(x_ptr.dtype.element_ty)
        col = 32 * first + tl.arange(0, 32 * WORDS)
        there = (b < batch)[None, :] & (col < cols)[:, None]
        x = tl.load(x_row + col[:, None], mask=there, other=0)
        sums = tl.dot(tl.reshape(tile, (ROWS, 32 * WORDS)), x, sums)
        word = ahead
    last = part == tl.num_programs(2) - 1
    broken = (possible == 0) | ((offset != end) & last)
    sums = tl.where(broken[:, None], float("nan"), sums)
    at = (part * batch + b).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(out_ptr + at, sums, mask=(b < batch)[None, :] & inside[:, None])


@triton.jit
def joined(
    parts_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    batch,
    rows,
    parts,
    ROWS: tl.constexpr,
):
    """The parts added up in their order, scaled, with the bias. The grid is
    (ceil(rows / ROWS), batch)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    b = tl.program_id(1) + tl.arange(0, 1)
    sums = tl.full((1, ROWS), 0.0, tl.float32)
    for part in range(0, parts):
        at = (part * batch + b).to(tl.int64)[:, None] * rows + row[None, :]
        sums += tl.load(parts_ptr + at, mask=inside[None, :], other=0)
    none = row < 0
    _write(sums, b, row, inside, none, scales_ptr, bias_ptr, out_ptr, batch, rows)


@triton.jit
def unpacked(
    bits_ptr,
    values_ptr,
    starts_ptr,
    scales_ptr,
    out_ptr,
    rows,
    cols,
    per_row,
    size,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The (rows, cols) matrix, scaled where there are scales, in the output's dtype.

    A broken row comes out as NaN, where whole numbers have none as zeros. The grid is
    (ceil(rows / ROWS),).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    offset, end, possible = _span(starts_ptr, row, inside, size)
    out_row = out_ptr + row.to(tl.int64)[:, None, None] * cols
    word = _words(bits_ptr, row, inside, 0, per_row, cols, WORDS)
    for first in range(0, per_row, WORDS):
        ahead = _words(bits_ptr, row, inside, first + WORDS, per_row, cols, WORDS)
        word, place, offset = _places(word, offset, end)
        tile = _tile(values_ptr, word, place)
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + row, mask=inside, other=0)
            tile = tile.to(tl.float32) * scale.to(tl.float32)[:, None, None]
        col = 32 * (first + tl.arange(0, WORDS))[:, None] + tl.arange(0, 32)[None, :]
        there = inside[:, None, None] & (col < cols)[None, :, :]
        tl.store(out_row + col[None, :, :], tile.to(out_ptr.dtype.element_ty), mask=there)
        word = ahead
    broken = inside & ((possible == 0) | (offset != end))
    if tl.sum(broken.to(tl.int32), 0) > 0:
        lost = tl.full((ROWS, WORDS, 32), 0.0, tl.float32)
        if out_ptr.dtype.element_ty.is_floating():
            lost = tl.full((ROWS, WORDS, 32), float("nan"), tl.float32)
        for first in range(0, per_row, WORDS):
            col = 32 * (first + tl.arange(0, WORDS))[:, None] + tl.arange(0, 32)[None, :]
            there = broken[:, None, None] & (col < cols)[None, :, :]
            tl.store(out_row + col[None, :, :], lost.to(out_ptr.dtype.element_ty), mask=there)
