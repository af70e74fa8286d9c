"""What is kept of a matrix's rows to tell which of them another run read too.

A fingerprint says that two rows are the same to the bit: its sum of integers does not round, so it
depends on nothing but the row. A sketch, a few random projections, says how far two rows are apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_WIDTH = 16
"""Projections of a row."""
_CHUNK = 1 << 20
"""Numbers that are fingerprinted at a time."""
_TOO_SMALL = 1e-3
"""Rows shorter than this share of the usual length are told apart as if they were that long."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Prints:
    """The prints of n rows.

    Attributes:
        exact: (n,) int64, equal where rows are equal (a zero's sign aside).
        sketch: (n, 16) float32.
        scale: (cols,) float32 by which columns were divided, so that none outweighs the others.
        tolerance: relative distance that rounding in the rows' dtype may explain.
    """

    exact: Tensor
    sketch: Tensor
    scale: Tensor
    tolerance: float

    def __len__(self) -> int:
        return len(self.exact)


def prints_of(rows: Tensor, scale: Tensor | None = None) -> Prints:
    """The prints of a (n, cols) matrix.

    Args:
        scale: of the prints that these will be compared with.
    """
    rows = rows.detach()
    wide = rows.float()
    if scale is None:
        size = wide.square().mean(0).sqrt()
        scale = torch.where(size > 0, size, size.mean().clamp_min(torch.finfo(torch.float32).tiny))
    sketch = (wide / scale) @ _directions(rows.shape[1], rows.device)
    precise = rows.dtype if rows.is_floating_point() else torch.float32
    return Prints(_fingerprints(rows), sketch, scale, torch.finfo(precise).eps ** 0.5)


def found_in(mine: Prints, other: Prints) -> Tensor:
    """(n,) bool: which rows the other has too, each of its own standing for one of mine."""
    order = mine.exact.argsort(stable=True)
    ordered = mine.exact[order]
    place = torch.arange(len(ordered), device=ordered.device)
    earlier = place - torch.searchsorted(ordered, ordered)  # equal rows before it
    theirs = other.exact.sort().values
    count = torch.searchsorted(theirs, ordered, right=True) - torch.searchsorted(theirs, ordered)
    found = torch.empty_like(order, dtype=torch.bool)
    found[order] = earlier < count
    return found


def distances(mine: Prints, other: Prints) -> Tensor:
    """(n,) float32: how far each row is from the other's row at its place, relative to them."""
    lengths = torch.maximum(_length(mine.sketch), _length(other.sketch))
    return _length(mine.sketch - other.sketch) / _at_least(lengths)


def nearest(mine: Prints, other: Prints) -> Tensor:
    """(n,) float32: how far each row is from the nearest of the other's, relative to it."""
    lengths = _at_least(_length(mine.sketch))
    if not len(other):
        return torch.full_like(lengths, torch.inf)
    exactly = "donot_use_mm_for_euclid_dist"  # a product would round small distances away
    parts = [
        torch.cdist(part, other.sketch, compute_mode=exactly).amin(1)
        for part in mine.sketch.split(1024)
    ]
    return torch.cat(parts) / lengths


def _length(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return length


def _at_least(lengths: Tensor) -> Tensor:
    usual = lengths.median() if len(lengths) else lengths.new_zeros(())
    return lengths.clamp_min(_TOO_SMALL * float(usual)).clamp_min(torch.finfo(torch.float32).tiny)


def _fingerprints(rows: Tensor) -> Tensor:
    if rows.element_size() > 1:
        rows = rows + 0.0  # -0.0 becomes 0.0
    bits = rows.contiguous().view(_BITS[rows.element_size()])
    factors = _factors(bits.shape[1], bits.device)
    step = max(1, _CHUNK // max(1, bits.shape[1]))
    return torch.cat([(part.long() * factors).sum(1) for part in bits.split(step)])


@lru_cache(16)
def _factors(cols: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(cols)
    with torch.inference_mode(False):
        return torch.randint(-(2**62), 2**62, (cols,), generator=generator).to(device) | 1


@lru_cache(16)
def _directions(cols: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(cols)
    with torch.inference_mode(False):
        return torch.randn(cols, _WIDTH, generator=generator).to(device)
