"""What a model would hold, or compute, if some units and blocks went: counted without removing any.

A quantity is a sum over items (tensors, products, layers); each is worth what its axes' lengths
make of it, and units shorten axes. So the worth of a group at every number of units gone is one
calculation over vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchprune.graph.context import Product
from torchprune.graph.groups import Group, Structure
from torchprune.graph.labels import axes_of
from torchprune.masking.plain_state import Slot

Worth = Callable[[Sequence[Tensor]], Tensor]
"""From the lengths of an item's axes, each (n,), to what it is worth, (n,) float64."""


@dataclass(frozen=True, eq=False)
class Item:
    """A part of a quantity.

    Attributes:
        lengths: of the axes that units may shorten.
        places: the names of what it belongs to; it goes with blocks that hold all of these.
    """

    lengths: tuple[int, ...]
    places: tuple[str, ...]
    worth: Worth


@dataclass(frozen=True, eq=False)
class Use:
    """Where units lie: on an axis of an item, `spans` (count,) int64 indices of it a unit."""

    item: int
    axis: int
    spans: Tensor


@dataclass(eq=False)
class Ledger:
    """A quantity of a model, and how much of it the units of some groups carry.

    Attributes:
        uses: for each group, where its units lie.
    """

    items: list[Item]
    uses: list[list[Use]]

    def of(self, orders: Sequence[Tensor], steps: Sequence[Tensor]) -> Account:
        """The quantity as units go in a given order.

        Args:
            orders: (count,) a group, its units, those first that go first.
            steps: (s,) a group, how many of them are gone after each step, from 0 steps on.
        """
        lines: list[list[_Line]] = []
        for uses, order, step in zip(self.uses, orders, steps, strict=True):
            found = []
            for use in uses:
                gone = torch.cat([use.spans.new_zeros(1), use.spans[order].cumsum(0)])
                found.append(_Line(use.item, use.axis, gone[step]))
            lines.append(found)
        return Account(self.items, lines)


@dataclass(frozen=True, eq=False)
class _Line:
    """How much shorter an axis of an item is after each step of a group."""

    item: int
    axis: int
    less: Tensor


@dataclass(eq=False)
class Account:
    """A quantity, by how many steps each group has taken and which blocks are gone."""

    items: list[Item]
    lines: list[list[_Line]]
    now: list[int] = field(default_factory=list)
    gone: frozenset[str] = frozenset()

    def open(self, now: Sequence[int], gone: Collection[str]) -> None:
        """Begin at a state."""
        self.now, self.gone = list(now), frozenset(gone)
        self._lengths = [list(item.lengths) for item in self.items]
        for lines, step in zip(self.lines, self.now, strict=True):
            for line in lines:
                self._lengths[line.item][line.axis] -= int(line.less[step])
        self._alive = [not _all_inside(item.places, self.gone) for item in self.items]
        self._worths = [
            float(item.worth([torch.tensor([n]) for n in lengths])) if alive else 0.0
            for item, lengths, alive in zip(self.items, self._lengths, self._alive, strict=True)
        ]

    @property
    def total(self) -> float:
        """The quantity in the present state."""
        return math.fsum(self._worths)

    def along(self, group: int) -> Tensor:
        """(s,) float64: what the items that a group shortens are worth after each of its steps."""
        total = torch.zeros((), dtype=torch.float64)
        for number, lines in self._by_item(group).items():
            total = total + self.items[number].worth(self._along(number, group, lines))
        return total

    def _by_item(self, group: int) -> dict[int, list[_Line]]:
        found: dict[int, list[_Line]] = {}
        for line in self.lines[group]:
            if self._alive[line.item]:
                found.setdefault(line.item, []).append(line)
        return found

    def _along(self, number: int, group: int, lines: Sequence[_Line]) -> list[Tensor]:
        steps = len(lines[0].less)
        lengths = [torch.full((steps,), n) for n in self._lengths[number]]
        for line in lines:
            lengths[line.axis] = lengths[line.axis] + line.less[self.now[group]] - line.less
        return lengths

    def go(self, group: int, step: int) -> None:
        """Let a group be at another of its steps."""
        for number, lines in self._by_item(group).items():
            lengths = [int(n[step]) for n in self._along(number, group, lines)]
            self._lengths[number] = lengths
            worth = self.items[number].worth([torch.tensor([n]) for n in lengths])
            self._worths[number] = float(worth)
        self.now[group] = step


def _all_inside(places: Iterable[str], blocks: Collection[str]) -> bool:
    return bool(blocks) and all(
        any(place == block or place.startswith(f"{block}.") for block in blocks) for place in places
    )


def counted(whole: int, lengths: Sequence[int]) -> Worth:
    """A count that shrinks with each axis."""

    def worth(now: Sequence[Tensor]) -> Tensor:
        left = torch.full((1,), whole)
        for before, after in zip(lengths, now, strict=True):
            left = left // before * after
        return left.double()

    return worth


def parameters_of(slots: Mapping[str, Slot], groups: Sequence[Group]) -> Ledger:
    """All parameters, tied ones once."""
    numbers: dict[int, int] = {}
    found: list[tuple[Tensor, list[str]]] = []
    for key, slot in slots.items():
        if slot.kind == "parameter":
            at = numbers.setdefault(id(slot.tensor), len(found))
            if at == len(found):
                found.append((slot.tensor, []))
            found[at][1].append(key)
    items = [Item(tuple(t.shape), tuple(keys), counted(t.numel(), t.shape)) for t, keys in found]
    uses = []
    for group in groups:
        own = [(m, numbers.get(id(slots[m.key].tensor))) for m in group.members]
        uses.append(
            [Use(at, m.axis, _spans(m.units, group.count)) for m, at in own if at is not None]
        )
    return Ledger(items, uses)


def products_of(structure: Structure, groups: Sequence[Group]) -> Ledger:
    """Floating point operations of all products."""
    items = [_item(product) for product in structure.trace.products]
    at = {id(group): number for number, group in enumerate(groups)}
    owner = torch.full((len(structure.trace.resolved.classes),), -1)
    unit = torch.zeros_like(owner)
    for group, own in zip(structure.groups, structure.classes, strict=True):
        if id(group) in at:
            owner[own], unit[own] = at[id(group)], torch.arange(group.count)
    uses: list[list[Use]] = [[] for _ in groups]
    for number, product in enumerate(structure.trace.products):
        for axis, tag in enumerate(product.tags):
            labels = structure.trace.resolved.classes[tag].flatten()
            for which in owner[labels].unique().tolist():
                if which >= 0:
                    inside = torch.where(owner[labels] == which, unit[labels], -1)
                    spans = _spans(inside, groups[which].count)
                    uses[which].append(Use(number, axis, spans))
    return Ledger(items, uses)


def _item(product: Product) -> Item:
    lengths = tuple(math.prod(product.shape[a] for a in axes_of(tag)) for tag in product.tags)
    return Item(lengths, (product.module,), counted(2 * math.prod(product.shape), lengths))


def _spans(units: Tensor, count: int) -> Tensor:
    return torch.bincount(units[units >= 0], minlength=count)
