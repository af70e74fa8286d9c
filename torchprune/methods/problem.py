"""A layer as one quadratic problem: what every method that changes weights solves.

With inputs x of a layer, G = sum of x x^T and W0 its dense weights, a pruned layer W costs

    ||X W^T - X W0^T||^2 = tr((W - W0) G (W - W0)^T).

The problem is held with every input scaled to unit length (G has a unit diagonal then, and a weight
its Wanda score), so that a few outlying inputs do not set the scale of all others, and with a ridge
that pulls toward W0, never toward zero. Where the dense model reads x_d while the pruned one reads
x, and C = sum of x_d x^T, the outputs to reach may be blended from both:

    ||X W^T - ((1 - alpha) X + alpha X_d) W0^T||^2,

which has the same G, and (1 - alpha) G + alpha C in place of G in the linear term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise tr(W A W^T) - 2 tr(W B^T), B = `wanted`, over scaled weights W = weight * scale.

    Attributes:
        matrix: (cols, cols) float32 A, the scaled second moment plus the ridge.
        pull: (cols, cols) float32, B = W0 @ pull; A itself where the outputs to reach are the
            layer's own.
        scale: (cols,) float32, the length of each input; 1 where it is dead.
        dead: (cols,) bool, inputs that were always zero. Their weights matter to nothing.
    """

    matrix: Tensor
    pull: Tensor
    scale: Tensor
    dead: Tensor

    def scaled(self, weight: Tensor) -> Tensor:
        """(rows, cols) float32 weights in the problem's own units; 0 at dead inputs."""
        return (weight.detach().float() * self.scale).masked_fill_(self.dead, 0)

    def wanted(self, weight: Tensor) -> Tensor:
        """(rows, cols) float32 B, the linear term of dense weights; 0 at dead inputs.

        What is dead now may be alive in the dense model, whose outputs are then still reached for.
        """
        return (weight.detach().float() * self.scale @ self.pull).masked_fill_(self.dead, 0)

    def unscaled(self, scaled: Tensor, weight: Tensor) -> Tensor:
        """Back in the weights' units; what dead inputs meet is the given weight."""
        return torch.where(self.dead, weight.detach().float(), scaled / self.scale)


def problem_of(
    gram: Tensor, ridge: float, cross: Tensor | None = None, alpha: float = 0.0
) -> Problem:
    """The problem of one layer's inputs.

    Args:
        gram: (cols, cols) float32 sum of x x^T.
        ridge: added to the unit diagonal.
        cross: (cols, cols) float32 sum of x_d x^T, for an alpha above 0.
        alpha: the share of the dense model's own outputs in what is to be reached.
    """
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    scale = diagonal.clamp_min(0).sqrt().masked_fill(dead, 1)
    matrix = gram / scale / scale.unsqueeze(1)
    pull = matrix
    if alpha:
        assert cross is not None
        pull = torch.lerp(matrix, cross / scale / scale.unsqueeze(1), alpha)
        pull.diagonal().add_(ridge)
    matrix.diagonal().add_(ridge)
    matrix.diagonal().masked_fill_(dead, 1)  # positive, so that it can be factorised
    return Problem(matrix, pull, scale, dead)
