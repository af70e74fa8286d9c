"""What is kept of a matrix's rows to tell which of them another run read too.

A fingerprint says that two rows are the same to the bit: its sum of integers does not round, so it
depends on nothing but the row. A sketch, a few random projections, says how far two rows are apart.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch
from torch import Tensor

_WIDTH = 16
"""Projections of a row."""
_CHUNK = 1 << 17
"""Words that are fingerprinted at a time: few enough to stay in a processor's cache."""
_TOO_SMALL = 1e-3
"""Rows shorter than this share of the usual length are told apart as if they were that long."""


class Prints:
    """The prints of n rows.

    Args:
        rows: (n, cols).
        scale: (cols,) by which columns are divided in the sketch, so that none outweighs the
            others: of the prints that these will be compared with, or None.

    Attributes:
        exact: (n,) int64, equal where rows are equal (a zero's sign aside).
        tolerance: relative distance that rounding in the rows' dtype may explain.
    """

    def __init__(self, rows: Tensor, scale: Tensor | None = None) -> None:
        self._rows: Tensor | None = rows.detach()
        self.exact = _fingerprints(self._rows)
        precise = rows.dtype if rows.is_floating_point() else torch.float32
        self.tolerance = torch.finfo(precise).eps ** 0.5
        self._scale = scale

    def __len__(self) -> int:
        return len(self.exact)

    @cached_property
    def scale(self) -> Tensor:
        """(cols,) float32, the given one or the size of the columns."""
        if self._scale is not None:
            return self._scale
        assert self._rows is not None
        size = self._rows.float().square().mean(0).sqrt()
        return torch.where(size > 0, size, size.mean().clamp_min(torch.finfo(torch.float32).tiny))

    @cached_property
    def sketch(self) -> Tensor:
        """(n, 16) float32."""
        assert self._rows is not None
        directions = _directions(self._rows.shape[1], self._rows.device)
        return self._rows.float() @ (directions / self.scale[:, None])

    def kept(self) -> Prints:
        """These prints, when the rows are gone."""
        _ = self.sketch
        self._rows = None
        return self


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
    rows = rows + 0.0 if rows.element_size() > 1 else rows  # -0.0 becomes 0.0
    if rest := -rows.shape[1] % (8 // rows.element_size()):
        rows = torch.nn.functional.pad(rows, (0, rest))
    words = rows.contiguous().view(torch.int64)
    factors = _factors(words.shape[1], words.device)
    step = max(1, _CHUNK // max(1, words.shape[1]))
    return torch.cat([(part * factors).sum(1) for part in words.split(step)])


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
