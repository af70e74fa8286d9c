"""Weights on a grid of whole numbers: scales, codes and values, as torchao makes them.

A group of a row shares one scale s, and its weights are k s with whole codes k from -8 to 7 (-128
to 127); a pruned weight has the code 0 and is zero to the bit. The scale that torchao finds in
such values, max(max / 7, -min / 8) in the weights' dtype, is s again if some weight has the code 7
or -8, and if s is one of those numbers of the dtype that come back from 7 s / 7. So scales are
such numbers here, and the largest weight of each group is held at its end of the grid. Then
quantizing what is on the grid changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune.specs.quantize import Grid

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""What scales are tried, as shares of the one that clips nothing."""


@dataclass(frozen=True, eq=False)
class Scaled:
    """What each group of a matrix is rounded by.

    Attributes:
        scale: (rows, groups) float32, above zero.
        pinned: (rows, cols) float32, the value at its end of the grid of the one weight of each
            group that is held there; zero elsewhere.
    """

    scale: Tensor
    pinned: Tensor


def ends_of(grid: Grid) -> tuple[int, int]:
    """The lowest and the highest code."""
    half = 1 << (grid.bits - 1)
    return -half, half - 1


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the scales of weights in a dtype: their own, as far as torchao knows it."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def settled(scale: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Scales near these that torchao finds again in values of this dtype: float32."""
    high, kind = ends_of(grid)[1], scale_dtype(dtype)
    least = torch.finfo(kind).smallest_normal  # torchao's, too
    near = scale.to(kind).clamp_min(least)
    return ((near * high) / high).clamp_min(least).float()


def plain_scale(weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """(rows, groups) float32: the scales of a matrix that clip nothing."""
    low, high = ends_of(grid)
    return settled(_reach(in_groups(weight.detach().float(), grid), low, high), grid, dtype)


def in_groups(matrix: Tensor, grid: Grid) -> Tensor:
    """(rows, groups, size): a view of a contiguous (rows, cols) matrix."""
    return matrix.view(len(matrix), -1, grid.group or matrix.shape[1])


def rounded(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """(rows, cols) float32: each weight's nearest value of the grid, never -0.0.

    Args:
        weight: (rows, cols), any floating dtype.
        scale: (rows, groups) float32.
    """
    return _near(in_groups(weight.detach().float().contiguous(), grid), scale, grid).view(
        weight.shape
    )


def _near(groups: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    step = scale.unsqueeze(2)
    codes = (groups * (1 / step)).round_().clamp_(*ends_of(grid))
    return codes.mul_(step).add_(0.0)  # -0.0 + 0.0 is 0.0


def _reach(groups: Tensor, low: int, high: int) -> Tensor:
    """(rows, groups): what a code must stand for at least so that nothing is clipped."""
    return torch.maximum(groups.amax(2) / high, groups.amin(2) / low).clamp_min_(0)


def scaled(weight: Tensor, counts: Tensor, grid: Grid, dtype: torch.dtype) -> Scaled:
    """The scales of a matrix, each the best of a few: those that clip nothing, and smaller ones.

    Args:
        weight: (rows, cols) float32, zero where pruned.
        counts: (cols,) float32, what a column's squared error weighs; where it is 0 weights have no
            say in the scales, unless there are no others in their group.
        dtype: of the weights that will hold the values.
    """
    low, high = ends_of(grid)
    groups = in_groups(weight, grid)
    shares = counts.view(groups.shape[1:])
    heard = groups * (shares > 0)
    heard = torch.where(heard.any(2, keepdim=True), heard, groups)
    outer = torch.maximum(heard / high, heard / low)
    reach, at = outer.max(2)
    best = torch.zeros_like(reach)
    least = torch.full_like(reach, torch.inf)
    for share in _SHRINK:
        scale = settled(reach * share, grid, dtype)
        lost = ((_near(heard, scale, grid) - heard).square_() * shares).sum(2)
        better = lost < least
        best, least = torch.where(better, scale, best), torch.where(better, lost, least)
    best = torch.where(best > 0, best, settled(reach, grid, dtype))  # where no error is a number
    end = torch.where(heard.gather(2, at.unsqueeze(2)).squeeze(2) > 0, high, low) * best
    # What is smaller than the smallest scale's reach is held nowhere: the scale stays as it is.
    end = end.masked_fill_((reach <= 0) | (best <= torch.finfo(scale_dtype(dtype)).tiny), 0)
    pinned = torch.zeros_like(groups).scatter_(2, at.unsqueeze(2), end.unsqueeze(2))
    return Scaled(best, pinned.view(weight.shape))
