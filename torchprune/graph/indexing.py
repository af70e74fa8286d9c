"""Rules of indices and boolean masks: what is looked up, and what is written at places.

What a boolean mask picks lies in a row, as long as the input's values say. Such a row is followed
as the tensor that it was picked from: element by element it goes through pointwise operators, and
written back where the same mask is true it is again that tensor, changed in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchprune.graph.context import Context, unknown
from torchprune.graph.labels import axes_of
from torchprune.graph.values import Constant, Value, indexed, met


@dataclass(frozen=True, eq=False)
class Picked(Value):
    """What a mask picks of a tensor; its own shape and tags say nothing.

    Attributes:
        mask: the very value that picked, on the axes of `whole` from `axis` on.
        whole: the tensor that it was picked from, changed element by element since.
    """

    mask: Value | None = None
    axis: int = 0
    whole: Value | None = None

    def held(self) -> tuple[Tensor, ...]:
        """Of the tensor and of the mask."""
        return tuple(tag for v in (self.mask, self.whole) if v is not None for tag in v.held())


def look_up(ctx: Context, x: Value, indices: Sequence[Value | None]) -> Any:
    """Indexed axes are read as a whole, the others pass; a mask's picks keep their labels."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if _masks(ctx, given):
        return _picked(ctx, x, given) if len(given) == 1 else unknown(ctx, x, _of(given))
    axis, index = given[0]
    if (
        len(given) == 1
        and isinstance(index, Constant)
        and index.data is not None
        and index.dim == 1
    ):
        return _at_places(ctx, x, axis, index.data)
    ctx.freeze(_of(given))
    axes = [axis for axis, _ in given]
    kept = ctx.whole(x, axes)
    found = torch.broadcast_shapes(*(index.shape for _, index in given))
    at = axes[0] if axes == [*range(axes[0], axes[-1] + 1)] else 0
    tags = []
    for tag in kept.tags:
        rest = [size for axis, size in enumerate(tag.shape) if axis not in axes]
        tags.append(tag.reshape(*rest[:at], *(1,) * len(found), *rest[at:]))
    rest = [size for axis, size in enumerate(x.shape) if axis not in axes]
    shape = (*rest[:at], *found, *rest[at:])
    return Value(shape, tuple(tags), x.weight and all(index.weight for _, index in given))


def _at_places(ctx: Context, x: Value, axis: int, index: Tensor) -> Value:
    """An axis at places that the code counts from one of its ends: all from there on stays, or
    goes together with what the axis is inside of."""
    places, size = index.long(), x.shape[axis]
    if (tag := x.on(axis)) is not None:
        front = int(places.max()) + 1 if bool((places >= 0).any()) else 0
        back = int(places.min()) + size if bool((places < 0).any()) else size
        for start, stop in ((0, front), (back, size)):
            side = tag.narrow(axis, start, stop - start)
            if axes_of(tag)[0] < axis and start < stop:
                ctx.labels.united(side, [axis])
            else:
                ctx.labels.freeze(side, ctx.why)
    return indexed(x, axis, places % size)


def put(ctx: Context, x: Value, indices: Sequence[Value | None], source: Value, *_: Any) -> Any:
    """Written axes are read as a whole, the others meet; under a mask all elements meet."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if _masks(ctx, given):
        if len(given) == 1:
            return _masked(ctx, x, *given[0], source)
        return unknown(ctx, x, source, _of(given))
    ctx.freeze(_of(given))
    axes = [axis for axis, _ in given]
    kept = ctx.whole(x, axes, keep=True)
    found = torch.broadcast_shapes(*(index.shape for _, index in given))
    at = axes[0] if axes == [*range(axes[0], axes[-1] + 1)] else 0
    own = source.widened(x.dim - len(axes) + len(found))
    own = ctx.whole(own, range(at, at + len(found)))
    laid = []
    for sizes in (own.shape, *(tag.shape for tag in own.tags)):
        rest = iter([*sizes[:at], *sizes[at + len(found) :]])
        laid.append([1 if axis in axes else next(rest) for axis in range(x.dim)])
    tags = tuple(tag.reshape(shape) for tag, shape in zip(own.tags, laid[1:], strict=True))
    return met(ctx.labels, [kept, Value(tuple(laid[0]), tags, source.weight)], ctx.why)


def masked_select(ctx: Context, x: Value, mask: Value) -> Any:
    """What a mask picks of all axes, in a row."""
    return _picked(ctx, x, [(0, mask)]) if mask.shape == x.shape else unknown(ctx, x, mask)


def masked_scatter(ctx: Context, x: Value, mask: Value, source: Value) -> Any:
    """What the same mask picked goes back to its places; other rows are taken as they come."""
    if not isinstance(source, Picked) or mask.shape != x.shape:
        return unknown(ctx, x, mask, source)
    return _masked(ctx, x, 0, mask, source)


def each(ctx: Context, *args: Any, **named: Any) -> Any:
    """A pointwise operator on rows that one mask picked, and on single elements."""
    values = [v for v in (*args, *named.values()) if isinstance(v, Value)]
    rows = [v for v in values if isinstance(v, Picked)]
    others = [v for v in values if not isinstance(v, Picked)]
    first = rows[0]
    same = all(v.mask is first.mask and v.axis == first.axis for v in rows)
    if not same or any(torch.Size(v.shape).numel() != 1 for v in others):
        return unknown(ctx, *values)
    wholes = [v.whole for v in rows if v.whole is not None]
    made = met(ctx.labels, wholes, ctx.why)
    return replace(first, shape=ctx.shape, whole=made, weight=all(v.weight for v in values))


def _masks(ctx: Context, given: Sequence[tuple[int, Value]]) -> bool:
    """Whether some index is a boolean mask; without an example none is known to be."""
    held = ctx.example[0][1] if ctx.example is not None else ()
    return any(held[axis].dtype in (torch.bool, torch.uint8) for axis, _ in given if held)


def _of(given: Sequence[tuple[int, Value]]) -> list[Value]:
    return [index for _, index in given]


def _picked(ctx: Context, x: Value, given: Sequence[tuple[int, Value]]) -> Value:
    axis, mask = given[0]
    whole = met(ctx.labels, [x, _over(x, axis, mask)], ctx.why)
    return Picked(ctx.shape, (), x.weight and mask.weight, mask, axis, whole)


def _over(x: Value, axis: int, mask: Value) -> Value:
    """A mask with an axis for each that comes after those that it covers."""
    tail = (1,) * (x.dim - axis - mask.dim)
    tags = tuple(tag.reshape(*tag.shape, *tail) for tag in mask.tags)
    return Value((*mask.shape, *tail), tags, mask.weight)


def _masked(ctx: Context, x: Value, axis: int, mask: Value, source: Value) -> Any:
    """The tensor with other values where a mask is true."""
    over = _over(x, axis, mask)
    if isinstance(source, Picked):
        if source.mask is not mask or source.axis != axis or source.whole is None:
            return unknown(ctx, x, mask, source)
        return met(ctx.labels, [x, over, source.whole], ctx.why)
    after = x.dim - axis - mask.dim
    if source.dim > after and any(size != 1 for size in source.shape[: source.dim - after]):
        return unknown(ctx, x, mask, source)
    cut = max(0, source.dim - after)
    tags = tuple(tag.reshape(tag.shape[cut:]) for tag in source.tags if axes_of(tag))
    return met(ctx.labels, [x, over, Value(source.shape[cut:], tags, source.weight)], ctx.why)
