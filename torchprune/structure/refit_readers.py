"""A layer fitted to what stays of its inputs: ridge least squares on their second moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune.calibration.moments import Moments

_WIDEST_DOUBLE = 6144
"""Columns up to which the fit is solved in float64."""


@dataclass(frozen=True)
class Refit:
    """The fitted layer.

    Attributes:
        weight: (rows, cols) float32, zero in the columns that go.
        shift: (rows,) float32, what to add to the bias, or None where there is none.
        lost: ||X (W - W')^T||^2 over all calibration tokens, with the shift if there is one.
        total: ||X W^T||^2.
    """

    weight: Tensor
    shift: Tensor | None
    lost: float
    total: float


def refit(
    weight: Tensor,
    moments: Moments,
    keep: Tensor,
    damping: float,
    *,
    group: int = 0,
    bias: bool = False,
    fit: bool = True,
) -> Refit:
    """Change the kept columns so that the output changes least.

    Minimises ||X (W - W')^T||^2 + ridge * ||W' - W||^2 over W' that is zero off `keep`, in closed
    form: W'_S = W_S + W_P G_PS (G_SS + ridge I)^-1. The ridge pulls to the old weights, so a fit
    never raises the error. With a bias the inputs are centred, and the shift makes up for the
    means.

    Args:
        weight: (rows, cols), any floating dtype.
        moments: of the layer's inputs, with the second moment, and with totals for a bias.
        keep: (cols,) bool.
        damping: the ridge, as a share of the mean diagonal of G_SS.
        group: which of the moments' groups.
        bias: whether the layer can take a shift.
        fit: False leaves the kept columns, and only measures.
    """
    assert moments.gram is not None
    rows = max(1, moments.rows[group])
    wide = torch.float64 if len(keep) <= _WIDEST_DOUBLE else torch.float32
    if weight.device.type == "mps":
        wide = torch.float32
    w, gram = weight.to(wide), moments.gram[group].to(wide) / rows
    mean = None
    whole = gram
    if bias:
        assert moments.total is not None
        mean = moments.total[group].to(wide) / rows
        gram = gram - mean.outer(mean)
    new = w * keep
    stays, goes = keep.nonzero().flatten(), (~keep).nonzero().flatten()
    if fit and len(goes) and len(stays):
        inner = gram[stays][:, stays]
        cross = w[:, goes] @ gram[goes][:, stays]
        solved = _solve(inner, cross, damping)
        if solved is not None:
            new[:, stays] += solved
    change = w - new
    shift = change @ mean if mean is not None and fit else None
    lost = ((change @ whole) * change).sum()
    if shift is not None and mean is not None:
        lost = lost - shift.square().sum()  # of centred inputs, given that the shift is the best
    total = ((w @ whole) * w).sum()
    shift = None if shift is None else shift.float()
    return Refit(new.float(), shift, float(lost.clamp_min(0)) * rows, float(total) * rows)


def _solve(matrix: Tensor, right: Tensor, damping: float) -> Tensor | None:
    """right (matrix + ridge I)^-1; damping grows tenfold until it works, None if it never does."""
    mean = matrix.diagonal().mean()
    if not mean > 0:
        return None
    while damping <= 1e3:
        ridged = matrix.clone()
        ridged.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(ridged)
        if not failed and bool(lower.diagonal().isfinite().all()):
            return torch.cholesky_solve(right.T, lower).T
        damping *= 10
    return None
