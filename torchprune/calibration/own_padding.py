"""Padding that a model adds itself: to fill windows of attention, it makes its input longer.

In a shadow (see `padding`) no input holds the id that stands at its batch's padding any more. Where
a table is asked for the shadow's ids and that id in front of them or behind them, or later for that
id alone, the model has put it there. Other ids are looked up in its place, as at all padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Longer = Callable[[int, int], None]
"""Told how many positions a model has added in front of the others and behind them."""


@dataclass(frozen=True, eq=False)
class Ids:
    """Ids with other ones at their padding, (items, length), and the one that stood there."""

    shadow: Tensor
    pad: int

    @classmethod
    def of(cls, ids: Tensor, shadow: Tensor, tokens: Tensor) -> Ids | None:
        """Those of a batch and its shadow; None if no one id stands at the padding alone.

        Args:
            tokens: (items, length) bool, False at padding.
        """
        if ids.is_floating_point() or ids.dim() != 2 or ids.shape != tokens.shape:
            return None
        pads = ids[~tokens.to(ids.device)].unique()
        if len(pads) != 1 or bool((shadow == pads).any()):
            return None
        return cls(shadow, int(pads))

    def added(self, index: Tensor) -> tuple[int, int] | None:
        """How many paddings an index has in front of these ids and behind them, if it is these and
        such."""
        (items, length), shape = self.shadow.shape, index.shape
        if index.dim() != 2 or shape[0] != items or shape[1] <= length:
            return None
        more = shape[1] - length
        for front, behind in ((0, more), (more, 0)):
            own = torch.equal(index[:, front : front + length], self.shadow.to(index.device))
            rest = index[:, :front] if front else index[:, length:]
            if own and bool((rest == self.pad).all()):
                return front, behind
        return None

    def alone(self, index: Tensor) -> bool:
        """Whether an index holds nothing but padding for the same items."""
        same = index.dim() == 2 and len(index) == len(self.shadow) and index.numel() > 0
        return same and bool((index == self.pad).all())

    def longer(self, front: int, behind: int) -> Tensor:
        """The ids with others of them in front or behind."""
        place = torch.arange(-front, self.shadow.shape[1] + behind) % self.shadow.shape[1]
        return self.shadow[:, place.to(self.shadow.device)]


def follow(stack: ExitStack, model: nn.Module, some: Iterable[Ids], told: Longer) -> None:
    """Exchange what a model adds to these ids itself, until the stack is closed."""
    known, asked = list(some), set[tuple[nn.Module, Ids]]()

    def look(table: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(index := args[0], Tensor):
            return None
        for ids in known:
            if torch.equal(index, ids.shadow.to(index.device)):
                asked.add((table, ids))
            elif (added := ids.added(index)) is not None:
                told(*added)
                return (ids.longer(*added).to(index), *args[1:])
            elif (table, ids) in asked and ids.alone(index):
                told(0, index.shape[1])  # it will be on one of the sides
                told(index.shape[1], 0)
                return (ids.longer(0, index.shape[1])[:, -index.shape[1] :].to(index), *args[1:])
        return None

    if known:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_pre_hook(look).remove)
