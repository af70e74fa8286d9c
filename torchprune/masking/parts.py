"""Which part of a parameter an operand is: whole, transposed, a chunk, a slice, one of a stack.

An operand is described by its axes, each a size and a step in memory, and by what each axis stands
for in the product: groups of matrices, rows (outputs) or columns (inputs). All reads of one
parameter together cut its memory into axes so that every read is made of whole ones, or of a
range of those that tell its parts apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import gcd, prod
from typing import Literal

from torch import Tensor

from torchprune.masking.matrices import View

Role = Literal["group", "row", "col"]


@dataclass(frozen=True)
class Axis:
    """One axis of an operand: its size, its step in memory, and what it stands for."""

    size: int
    step: int
    role: Role


@dataclass(frozen=True)
class Part:
    """The memory of a parameter that one product reads.

    Attributes:
        offset: elements from the parameter's beginning to the part's, in a contiguous parameter.
        axes: in the order in which the product counts its groups, rows and columns.
        inner: length of the input axis an n:m group runs along, or None for all columns.
    """

    offset: int
    axes: tuple[Axis, ...]
    inner: int | None = None

    def transposed(self) -> Part:
        """The same with rows for columns."""
        swap: dict[Role, Role] = {"row": "col", "col": "row", "group": "group"}
        axes = tuple(Axis(a.size, a.step, swap[a.role]) for a in self.axes)
        return Part(self.offset, axes)


def view_of_parts(parameter: Tensor, parts: Sequence[Part]) -> View | None:
    """The view in which each of these parts is a range of groups, or None where there is none.

    Args:
        parameter: read by these parts, as if it were contiguous. What none of them covers is in
            groups of its own.
    """
    size = parameter.numel()
    if not parts or not size:
        return None
    steps = _steps(size, parts)
    if steps is None:
        return None
    sizes = [after // step for step, after in zip(steps, [*steps[1:], size], strict=True)]
    roles: list[Role | None] = [None] * len(steps)
    for part in parts:
        for place, role in enumerate(_roles(steps, sizes, part)):
            if roles[place] not in (None, role):
                if "group" not in (roles[place], role):
                    return None  # rows of one product are columns of another
                role = "group"
            roles[place] = role
    # from the outermost axis inward, as a tensor of that shape has them
    shape = sizes[::-1]
    found = [role or "group" for role in roles[::-1]]
    places = _in_order(steps[::-1], parts[0])
    picked = {role: [a for a in places if found[a] == role] for role in ("group", "row", "col")}
    first = parts[0]
    return View.of("parts", shape, picked["group"], picked["row"], picked["col"], axis=first.inner)


@dataclass(frozen=True)
class Covered:
    """A group of a view that a part is, or is some of.

    Attributes:
        group: the view's group.
        own: which of the part's own groups it belongs to.
        start: the first of the part's own columns that it has.
    """

    group: int
    own: int
    start: int


def covered(view: View, part: Part) -> list[Covered] | None:
    """The groups of a view that a part is made of, or None if it is not made of whole groups.

    Groups of the same own group and columns are rows of one matrix: they read the same inputs.
    """
    steps = [prod(view.shape[a + 1 :]) for a in range(len(view.shape))]
    ranges: list[range] = []
    roles: list[Role | None] = []
    for step, size in zip(steps, view.shape, strict=True):
        axis = _holder(step, part)
        start = part.offset // step % size
        reach = 1 if axis is None else min(axis.size * axis.step // step, size)
        if axis is not None and (axis.size * axis.step % step or start + reach > size):
            return None
        ranges.append(range(start, start + reach))
        roles.append(None if axis is None else axis.role)
    groups, rows, cols = view.order[: view.lead], *_rows_and_cols(view)
    for places, role in ((rows, "row"), (cols, "col")):
        for a in places:
            if len(ranges[a]) != view.shape[a] or (view.shape[a] > 1 and roles[a] != role):
                return None
    own = sorted(
        (a for a in groups if roles[a] == "group"), key=lambda a: _position(steps[a], part)
    )
    cut = sorted((a for a in groups if roles[a] == "col"), key=lambda a: _position(steps[a], part))
    if cut and any(
        _position(steps[a], part) > _position(steps[c], part) for a in cut for c in cols
    ):
        return None  # its columns do not follow one another
    found = []
    for digits in product(*(ranges[a] for a in groups)):
        at = dict(zip(groups, digits, strict=True))
        group = _number([at[a] for a in groups], [view.shape[a] for a in groups])
        mine = _number([at[a] - ranges[a].start for a in own], [len(ranges[a]) for a in own])
        start = _number([at[a] - ranges[a].start for a in cut], [len(ranges[a]) for a in cut])
        found.append(Covered(group, mine, start * view.cols))
    return found


def _rows_and_cols(view: View) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a view's rows and those of its columns."""
    inside, size, at = view.order[view.lead :], 1, 0
    while size < view.rows:
        size *= view.shape[inside[at]]
        at += 1
    return inside[:at], inside[at:]


def _number(digits: Sequence[int], sizes: Sequence[int]) -> int:
    number = 0
    for digit, size in zip(digits, sizes, strict=True):
        number = number * size + digit
    return number


def _steps(size: int, parts: Iterable[Part]) -> list[int] | None:
    """Ascending steps of the axes that all parts are made of, each a multiple of the one before."""
    steps = {1}
    for part in parts:
        axes = sorted((a for a in part.axes if a.size > 1), key=lambda a: a.step)
        for axis, after in zip(axes, [*axes[1:], None], strict=False):
            limit = size if after is None else after.step
            if limit % axis.step:
                return None
            extent = limit // axis.step
            if axis.size > extent:
                return None  # overlapping windows
            steps.add(axis.step)
            if axis.size < extent:
                start = part.offset // axis.step % extent
                steps.add(axis.step * gcd(gcd(axis.size, extent), start))
            if after is not None:
                steps.add(after.step)
    chain = sorted(steps)
    if size % chain[-1] or any(b % a for a, b in pairwise(chain)):
        return None
    if chain[-1] == size and len(chain) > 1:
        chain.pop()
    return chain


def _roles(steps: Sequence[int], sizes: Sequence[int], part: Part) -> list[Role]:
    """What each of the cut axes stands for in a part; those it covers in part tell parts apart."""
    roles: list[Role] = []
    for step, size in zip(steps, sizes, strict=True):
        axis = _holder(step, part)
        if axis is None:
            roles.append("group")
        else:
            whole = axis.size * axis.step >= step * size
            roles.append(axis.role if whole or size == 1 else "group")
    return roles


def _holder(step: int, part: Part) -> Axis | None:
    """The axis of a part that an axis of this step is in."""
    for axis in part.axes:
        if axis.size > 1 and axis.step <= step < axis.step * axis.size:
            return axis
    return None


def _position(step: int, part: Part) -> tuple[int, int]:
    """Where an axis of this step comes in a part's own order."""
    for place, axis in enumerate(part.axes):
        if axis.size > 1 and axis.step <= step < axis.step * axis.size:
            return place, -step
    return len(part.axes), -step


def _in_order(steps: Sequence[int], part: Part) -> list[int]:
    """The cut axes in the order of a part's own, those outside it first."""
    outside = [p for p, step in enumerate(steps) if _holder(step, part) is None]
    inside = [p for p, step in enumerate(steps) if _holder(step, part) is not None]
    return [*outside, *sorted(inside, key=lambda p: _position(steps[p], part))]
