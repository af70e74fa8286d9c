"""Sizes of a model's inputs that may vary: found by running it, not by guessing.

`torch.export` takes a size of 1 for a constant, and equal sizes for one size. So a program is made
at sizes that nothing else has, and what may vary is what the model itself runs at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Axis = tuple[int, int]
"""A flat index of an input, and one of its axes."""

Shapes = list[dict[int, Any]]
"""For every input, flat, what is asked of its axes: a `torch.export.Dim`, a hint or a name."""

_UNUSUAL = (5, 7, 11, 13, 3, 2)
_CHECKED = ((1, 2, 3), (3, 9, 4, 6, 2), (2, 4, 6, 9))
"""Sizes to check at, each time the first at which the model runs; two checks, none the example."""


@dataclass(frozen=True)
class Inputs:
    """Flat inputs, and the tensors that the model gives for them."""

    leaves: list[Any]
    outputs: list[Tensor]


@dataclass(frozen=True)
class Sizes:
    """What `measure` found.

    Attributes:
        leaves: inputs to export with.
        shapes: what was asked, without `Dim.AUTO` where the model runs at the example's size alone.
        checks: inputs at other sizes than those and the example's.
    """

    leaves: list[Any]
    shapes: Shapes
    checks: list[Inputs]


@dataclass(frozen=True)
class _Group:
    """Axes that change together, each by its own function of one number."""

    axes: tuple[tuple[Axis, Callable[[int], int]], ...]
    example: int
    low: int
    high: int | None

    def candidates(self) -> Iterator[int]:
        n = self.example
        for number in (*_UNUSUAL, n + 1, n - 1, n + 2, 2 * n, 3 * n, self.low):
            if number > 1 and self.allows(number):
                yield number

    def allows(self, number: int) -> bool:
        return self.low <= number and (self.high is None or number <= self.high)


def measure(run: Callable[[list[Any]], list[Tensor]], leaves: list[Any], asked: Shapes) -> Sizes:
    """Which of the sizes asked for vary, and inputs to export with and to check at.

    Axes of one name change together. Of the others those that are equally long in the example do,
    unless the model runs only when they change otherwise: all of that length, all in proportion, or
    one alone. No size is that of another group, so that nothing fits by chance.

    Args:
        run: the model on flat inputs; raises what it raises at sizes that it does not take.
        leaves: the example, flat.
        asked: for every leaf.
    """
    now: dict[_Group, int] = {}
    named, hints = _split(asked)
    usual = {_size(leaves, axis) for axis in hints}

    def works(values: Mapping[_Group, int]) -> list[Tensor] | None:
        try:
            return run(_resized(leaves, values))
        except Exception:  # whatever a model raises: it does not take these sizes
            return None

    def accept(group: _Group) -> bool:
        taken = usual | {size(n) for other, n in now.items() for _, size in other.axes}
        for number in group.candidates():
            if taken.isdisjoint(size(number) for _, size in group.axes) and (
                works({**now, group: number}) is not None
            ):
                now[group] = number
                return True
        return False

    def is_open(axes: Sequence[Axis]) -> bool:
        return not any(axis in axes for group in now for axis, _ in group.axes)

    for members in named:
        accept(_of_name(leaves, members))
    for axes in _ways(leaves, hints):
        if is_open(axes):
            accept(_tied(leaves, axes, asked))
    shapes = [
        {
            axis: dim
            for axis, dim in dims.items()
            if getattr(dim, "type", None) != torch.export.Dim.AUTO.type
            or not is_open([(leaf, axis)])
        }
        for leaf, dims in enumerate(asked)
    ]
    return Sizes(_resized(leaves, now), shapes, _checks(works, leaves, now))


def is_hint(dim: Any) -> bool:
    """Whether it is `Dim.AUTO` or `Dim.DYNAMIC`: no name says what it goes with."""
    return isinstance(dim, type(torch.export.Dim.AUTO))


def varies(dim: Any) -> bool:
    """Whether an axis of which this is asked is to vary."""
    if is_hint(dim):
        return bool(dim.type != torch.export.Dim.STATIC.type)
    return dim is not None and not isinstance(dim, int)


def bounds(dim: Any) -> tuple[int, int | None]:
    """The least and the greatest size that are asked for; no greatest is None."""
    low, high = getattr(dim, "min", None), getattr(dim, "max", None)
    return low if isinstance(low, int) else 0, high if isinstance(high, int) else None


def asked_of(dims: Any, axis: int) -> Any:
    """What is asked of an axis, by a tensor's entry in `dynamic_shapes`."""
    if isinstance(dims, Sequence):
        return dims[axis]
    return None if dims is None else dims.get(axis)


def _checks(
    works: Callable[[Mapping[_Group, int]], list[Tensor] | None],
    leaves: list[Any],
    now: Mapping[_Group, int],
) -> list[Inputs]:
    found = []
    for numbers in _CHECKED:
        other, outputs = dict(now), None
        for group, made in now.items():
            for number in (*numbers, max(group.low, 1)):
                if number == made or not group.allows(number):
                    continue
                given = works({**other, group: number})
                if given is not None:
                    other[group], outputs = number, given
                    break
        if outputs is not None and any(n != group.example for group, n in other.items()):
            found.append(Inputs(_resized(leaves, other), outputs))
    return found[:2]


def _resized(leaves: Sequence[Any], values: Mapping[_Group, int]) -> list[Any]:
    """Inputs with other sizes: rows and tokens are left out, or come round again."""
    made = list(leaves)
    for group, number in values.items():
        for (leaf, axis), size in group.axes:
            old = made[leaf]
            index = torch.arange(size(number), device=old.device) % old.shape[axis]
            made[leaf] = old.index_select(axis, index)
    return made


def _split(asked: Shapes) -> tuple[list[list[tuple[Axis, Any]]], list[Axis]]:
    """Axes with a name, together with those of the same name; and axes with a hint."""
    named: dict[str, list[tuple[Axis, Any]]] = {}
    hints: list[Axis] = []
    for leaf, dims in enumerate(asked):
        for axis, dim in dims.items():
            if is_hint(dim):
                hints.append((leaf, axis))
            else:
                root: Any = getattr(dim, "root", dim)
                name = root if isinstance(root, str) else root.__name__
                named.setdefault(name, []).append(((leaf, axis), dim))
    return list(named.values()), hints


def _of_name(leaves: list[Any], members: list[tuple[Axis, Any]]) -> _Group:
    """Axes of one name; a size derived from it, as `2 * batch`, is a function of it."""
    axes, example, (low, high) = [], 1, (0, None)
    for axis, dim in members:
        size = getattr(dim, "fn", _same)
        axes.append((axis, lambda number, size=size: int(size(number))))
        low, high = bounds(getattr(dim, "root", dim))
        if size is _same:
            example = _size(leaves, axis)
    return _Group(tuple(axes), example, low, high)


def _tied(leaves: list[Any], axes: Sequence[Axis], asked: Shapes) -> _Group:
    """Axes that take one size where their sizes are equal, else multiples of their own."""
    sizes = [_size(leaves, axis) for axis in axes]
    limits = [bounds(asked[leaf][axis]) for leaf, axis in axes]
    highs = [high for _, high in limits if high is not None]
    if len(set(sizes)) == 1:
        low, high = max(low for low, _ in limits), min(highs, default=None)
        return _Group(tuple((axis, _same) for axis in axes), sizes[0], low, high)
    functions = [(a, lambda number, n=n: number * n) for a, n in zip(axes, sizes, strict=True)]
    tops = [h // n for (_, h), n in zip(limits, sizes, strict=True) if h is not None]
    return _Group(tuple(functions), 1, 1, min(tops, default=None))


def _ways(leaves: list[Any], hints: Sequence[Axis]) -> Iterator[list[Axis]]:
    """Axes that may go together, the likeliest first."""
    for key in (
        lambda axis: (axis[1], _size(leaves, axis)),  # rows with rows
        lambda axis: _size(leaves, axis),  # square
        lambda axis: axis[1],  # rows, twice as many rows
        lambda axis: axis,
    ):
        groups: dict[Any, list[Axis]] = {}
        for axis in hints:
            groups.setdefault(key(axis), []).append(axis)
        yield from groups.values()


def _size(leaves: Sequence[Any], axis: Axis) -> int:
    return int(leaves[axis[0]].shape[axis[1]])


def _same(number: int) -> int:
    return number
