"""Some inputs of every layer made always zero, to see that their weights go first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.masking.matrices import ConvNd, View, input_rows, is_stock
from torchprune.masking.targets import Target
from torchprune.specs.patterns import NM, Block, Pattern

_NOTHING = 1e-12
"""Share of the largest weight below which a weight is as good as zero."""


@dataclass(eq=False)
class Silenced:
    """A layer whose first inputs (channels of each group, for convolutions) always read zero.

    Attributes:
        dead: (cols,) bool, the inputs that do.
        live: (groups, cols) bool, inputs that were not zero throughout in any call so far; None
            before the first call.
    """

    target: Target
    dead: Tensor
    live: Tensor | None = None

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Silence the first tensor that the module gets."""
        given = [*args, *kwargs.values()]
        at = next((i for i, v in enumerate(given) if isinstance(v, Tensor)), None)
        if at is None:
            return None
        axis = self.target.view.axis
        x, dead = given[at], self.dead[:axis].to(given[at].device)
        channel = -1
        if isinstance(module, ConvNd):
            channel = -len(module.kernel_size) - 1
            dead = dead.repeat(module.groups)
        shape = [1] * x.dim()
        shape[channel] = len(dead)
        x = given[at] = x.masked_fill(dead.view(shape), 0)
        with torch.no_grad():
            rows = input_rows(module, x)
            live = torch.stack([r.float().square().sum(0) > 0 for r in rows]).cpu()
        self.live = live if self.live is None else self.live & live
        return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))


@contextmanager
def silenced(targets: Sequence[Target], share: float) -> Iterator[list[Silenced]]:
    """For the time of the context, the first `share` of each layer's inputs are zero.

    Only layers that are called as modules: see whether `live` was filled.
    """
    with ExitStack() as stack:
        found = []
        for target in targets:
            view = target.view
            if is_stock(target.layer.module) and target.layer.tensor == "weight":
                dead = torch.arange(view.cols) % view.axis < round(share * view.axis)
                found.append(Silenced(target, dead))
                hook = target.layer.module.register_forward_pre_hook(
                    found[-1].hook, with_kwargs=True
                )
                stack.callback(hook.remove)
        yield found


def wasted(
    one: Silenced, keep: Tensor, dense: Tensor, pattern: Pattern, scope: str
) -> tuple[Tensor, Tensor]:
    """For each budget of a layer, whether live weights went, and whether dead ones stay.

    Args:
        keep: the layer's mask, in its weight's own layout.
        dense: its weight before.

    Returns:
        (budgets,) bool each.
    """
    assert one.live is not None
    view: View = one.target.view
    gone, size = view.to_matrix(~keep.cpu()), view.to_matrix(dense.abs().float().cpu())
    dead = one.dead.expand(gone.shape)
    live = one.live.unsqueeze(1) & (size > _NOTHING * float(size.max()))
    of = partial(_budgets, pattern, scope)
    went = (of(gone).all(2) & of(live).any(2)).any(1)
    stay = (~of(gone).any(2) & of(dead).all(2)).any(1)
    return went, stay


def _budgets(pattern: Pattern, scope: str, matrix: Tensor) -> Tensor:
    """(budgets, units, weights): weights that go together, and the units that share a count."""
    groups, rows, cols = matrix.shape
    if isinstance(pattern, NM):
        return matrix.reshape(-1, pattern.m, 1)
    tall, wide = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)
    tiles = matrix.reshape(groups, rows // tall, tall, cols // wide, wide).transpose(2, 3)
    tiles = tiles.flatten(3)  # (groups, rows, cols, weights)
    return tiles.flatten(0, 1) if scope == "row" else tiles.flatten(1, 2)
