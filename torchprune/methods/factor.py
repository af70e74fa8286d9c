"""The factorised inverse Hessian that SparseGPT sweeps with."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune.calibration.moments import panels
from torchprune.errors import CalibrationError
from torchprune.modes import one_thread

_INVERT_DIRECTLY = 192
_ONE_THREAD_UP_TO = 768
"""Columns up to which several threads cost more to wake than they save."""

_PANELS = 4


@dataclass(frozen=True, eq=False)
class Factor:
    """The factorised inverse Hessian of one set of inputs, shared by all layers reading them.

    Attributes:
        upper: (cols, cols) float32 U, with U^T U = (H + damping)^-1.
        dead: (cols,) bool, inputs that were always zero.
        damping: the damping that succeeded, as a share of the live inputs' mean diagonal.
        ridge: what was added to the diagonal of H = 2/n sum of x x^T.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    ridge: float


def factorise(gram: Tensor, rows: int, damping: float, name: str) -> Factor:
    """U from the second moment. Escalates the damping tenfold, up to 1, if H is not positive.

    H^-1 = U^T U with U upper triangular is the inverse of the factor V in H = V V^T, V upper. It is
    computed in float64: against the accumulation of the gram its cost is small, and it saves most
    of the cases that single precision would need more damping for.

    Args:
        gram: (cols, cols) float32 sum of x x^T.
        rows: number of x summed.
        damping: share of its mean diagonal added to it. Inputs that were always zero have no part
            in the mean: they say nothing about the size of the others.

    Raises:
        CalibrationError: naming the layer, if no damping up to 1 helps.
    """
    device = gram.device
    if device.type == "mps":  # has no float64
        gram = gram.cpu()
    scale, dead = 2.0 / max(rows, 1), gram.diagonal() == 0
    share = damping
    while True:
        hessian = gram.double().mul_(scale)
        diagonal = hessian.diagonal()
        diagonal[dead] = 1.0 if bool(dead.all()) else diagonal[~dead].mean()
        ridge = share * diagonal.mean()
        diagonal += ridge
        with one_thread() if len(gram) <= _ONE_THREAD_UP_TO else nullcontext():
            worked = _invert_factor(hessian)
        if worked:
            break
        if share >= 1.0:
            raise CalibrationError(
                f"{name}: the second moment of its inputs could not be factorised even with "
                f"damping {share:g}; check the calibration data, or give the layer another method"
            )
        share = min(share * 10, 1.0)
    return Factor(hessian.float().to(device), dead.to(device), share, float(ridge))


def _invert_factor(matrix: Tensor) -> bool:
    """Turn a matrix V V^T, V upper triangular, into V^-1, in place. Reads its upper triangle alone.

    By halves, so that products do nearly all the work. Of

        [A  B]   [V1 W ] [V1^T     ]
        [.  C] = [   V2] [W^T  V2^T]

    C gives V2, then W = B V2^-T, then A - W W^T gives V1; the corner of V^-1 is -V1^-1 W V2^-1.
    Products of triangles, or into one, go panel by panel and leave out most of what is zero.

    Returns:
        whether it worked: False if the matrix is not positive definite in this precision.
    """
    size = len(matrix)
    if size <= _INVERT_DIRECTLY:
        # V is an ordinary Cholesky factor with the order of columns reversed both ways.
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if failed or not bool(lower.diagonal().isfinite().all()):
            return False
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1))
        return True
    half = size // 2
    first, edge, last = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    if not _invert_factor(last):
        return False
    w = torch.empty_like(edge)
    for start, stop in panels(size - half, _PANELS):
        torch.mm(edge[:, start:], last[start:stop, start:].T, out=w[:, start:stop])
    for start, stop in panels(half, _PANELS):
        first[start:stop, start:].addmm_(w[start:stop], w[start:].T, alpha=-1)
    if not _invert_factor(first):
        return False
    corner = torch.empty_like(edge)
    for start, stop in panels(half, _PANELS):
        torch.mm(first[start:stop, start:], w[start:], out=corner[start:stop])
    for start, stop in panels(size - half, _PANELS):
        torch.mm(corner[:, :stop], last[:stop, start:stop], out=edge[:, start:stop])
    edge.neg_()
    matrix[half:, :half] = 0
    return True
