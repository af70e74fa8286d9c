"""A layer fitted to what stays of its inputs: ridge least squares on their second moment, or on
rows of them where a layer is too wide for that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune.calibration.moments import Moments

_WIDEST_DOUBLE = 6144
"""Columns up to which the fit is solved in float64."""

_AT_ONCE = 4096
"""Columns that are read in float64 at once, where there are rows."""


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

    Where there is no second moment but rows X of inputs, it is the same fit to these rows, solved
    in as many unknowns as they are: W'_S = W_S + W_P X_P^T (X_S X_S^T + ridge I)^-1 X_S.

    Args:
        weight: (rows, cols), any floating dtype.
        moments: of the layer's inputs, with the second moment, and with totals for a bias; or with
            a sample of rows alone.
        keep: (cols,) bool.
        damping: the ridge, as a share of the mean diagonal of G_SS.
        group: which of the moments' groups.
        bias: whether the layer can take a shift.
        fit: False leaves the kept columns, and only measures.
    """
    if moments.gram is None:
        found = moments.samples(group)
        x = weight.new_zeros(1, len(keep)).float() if found is None else found
        one = _by_rows(weight, x, keep, damping, bias=bias, fit=fit)
        share = moments.rows[group] / len(x)
        return Refit(one.weight, one.shift, one.lost * share, one.total * share)
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


def _by_rows(
    weight: Tensor, x: Tensor, keep: Tensor, damping: float, *, bias: bool, fit: bool
) -> Refit:
    """The same, on rows of inputs (n, cols) float32, of which there are fewer than columns."""
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    mean = x.to(wide).mean(0) if bias else None
    places = {True: keep.nonzero().flatten(), False: (~keep).nonzero().flatten()}

    def parts(stays: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for some in places[stays].split(_AT_ONCE):
            columns = x[:, some].to(wide)
            yield some, columns if mean is None else columns - mean[some]

    new, count = (weight * keep).to(wide), len(places[True])
    if fit and count and len(places[False]):
        gone = sum((p @ weight[:, at].to(wide).T for at, p in parts(False)), start=x.new_zeros(()))
        inner = sum((p @ p.T for _, p in parts(True)), start=x.new_zeros(()))
        # of the columns' mean diagonal, as a share of the rows'
        solved = _solve(inner, gone.T, damping * len(x) / count)
        if solved is not None:
            for at, part in parts(True):
                new[:, at] += solved @ part
    change = weight.to(wide) - new
    shift = change @ mean if mean is not None and fit else None
    lost = x.new_zeros((), dtype=wide)
    total = lost.clone()
    for some in x.split(_AT_ONCE // 16):
        left = some.to(wide) @ change.T
        lost += (left if shift is None else left - shift).square().sum()
        total += (some.to(wide) @ weight.to(wide).T).square().sum()
    shift = None if shift is None else shift.float()
    return Refit(new.float(), shift, float(lost), float(total))


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
