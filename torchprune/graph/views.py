"""Rules of views, cuts and joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from torchprune.graph import values
from torchprune.graph.context import Context, unknown
from torchprune.graph.labels import axes_of
from torchprune.graph.values import (
    Value,
    expanded,
    indexed,
    joined,
    met,
    parted,
    reshaped,
    selected,
)


def viewed(ctx: Context, x: Value, *_: Any, **__: Any) -> Value:
    """Whatever keeps the elements in their order: the result's own shape says it all."""
    return reshaped(ctx.labels, x, ctx.shape, ctx.why)


def same(ctx: Context, x: Value, *_: Any, **__: Any) -> Value:
    """Each element by itself, or as it is."""
    return x


def permuted(ctx: Context, x: Value, order: Sequence[int]) -> Value:
    """Labels go with their axes."""
    return x.permuted(order)


def transposed(ctx: Context, x: Value, one: int = 0, two: int = 1) -> Value:
    """Labels go with their axes."""
    if x.dim < 2:
        return x
    order = [*range(x.dim)]
    order[one], order[two] = order[two], order[one]
    return x.permuted(order)


def moved(ctx: Context, x: Value, source: Any, target: Any) -> Value:
    """Labels go with their axes."""
    sources = [a % x.dim for a in ([source] if isinstance(source, int) else source)]
    targets = [a % x.dim for a in ([target] if isinstance(target, int) else target)]
    order = [-1] * x.dim
    for a, b in zip(sources, targets, strict=True):
        order[b] = a
    rest = iter(a for a in range(x.dim) if a not in sources)
    return x.permuted([a if a >= 0 else next(rest) for a in order])


def turned(ctx: Context, x: Value) -> Value:
    """Labels go with their axes."""
    return x.permuted(list(reversed(range(x.dim)))) if x.dim > 1 else x


def turned_last(ctx: Context, x: Value) -> Value:
    """Labels go with their axes."""
    return values.turned(x)


def inserted(ctx: Context, x: Value, axis: int) -> Value:
    """An axis of size 1 more."""
    return x.inserted(axis)


def squeezed(ctx: Context, x: Value, dim: Any = None) -> Value:
    """Axes of size 1 less."""
    axes = range(x.dim) if dim is None else [dim] if isinstance(dim, int) else dim
    return values.squeezed(x, [a % x.dim for a in axes if x.shape[a] == 1])


def repeated_view(ctx: Context, x: Value, *_: Any, **__: Any) -> Value:
    """A value along an axis, as often as the code asks for."""
    return expanded(ctx.labels, x, ctx.shape)


def repeated(ctx: Context, x: Value, times: Sequence[int]) -> Value:
    """An axis several times over; each copy has the labels of the first."""
    wide = x.widened(len(times))
    for axis, count in enumerate(times):
        if count > 1 and wide.shape[axis] == 1:
            shape = [count if a == axis else s for a, s in enumerate(wide.shape)]
            wide = expanded(ctx.labels, wide, shape)
        elif count > 1:
            wide = indexed(wide, axis, torch.arange(wide.shape[axis]).repeat(count))
    return wide


def interleaved(ctx: Context, x: Value, times: Any, dim: int | None = None, **_: Any) -> Any:
    """Every index of an axis several times."""
    if not isinstance(times, int) or dim is None:
        return unknown(ctx, x)
    return indexed(x, dim, torch.arange(x.shape[dim]).repeat_interleave(times))


def sliced(
    ctx: Context,
    x: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    """Indices of one axis."""
    return indexed(x, dim, torch.arange(x.shape[dim])[slice(start, end, step)])


def narrowed(ctx: Context, x: Value, dim: int, start: int, length: int) -> Value:
    """Indices of one axis."""
    return indexed(x, dim, torch.arange(start, start + length))


def chosen(ctx: Context, x: Value, dim: int, index: int) -> Value:
    """One index of one axis."""
    return selected(x, dim, index)


def unbound(ctx: Context, x: Value, dim: int = 0) -> tuple[Value, ...]:
    """The indices of one axis, one by one."""
    return tuple(selected(x, dim, i) for i in range(x.shape[dim]))


def shuffled(ctx: Context, x: Value, rows: int) -> Value:
    """Channels cut into rows and read column by column: the same places of all rows go together."""
    whole = []
    for tag in x.tags:
        if tag.shape[1] > 1 and len(axes_of(tag)) == 1:
            cut = ctx.labels.united(tag.reshape(rows, -1), [0])
            tag = cut.reshape(-1).repeat_interleave(rows).reshape(tag.shape)
        elif tag.shape[1] > 1:
            ctx.labels.freeze(tag, ctx.why)
        whole.append(tag)
    return replace(x, tags=tuple(whole))


def cut(ctx: Context, x: Value, _: Any, dim: int = 0) -> tuple[Value, ...]:
    """Chunks and splits: the results' shapes say where the cuts are."""
    return parted(ctx.labels, x, dim, [shape[dim] for shape in ctx.shapes])


def concatenated(ctx: Context, parts: Sequence[Value], dim: int = 0) -> Value:
    """End to end along an axis; along the others they meet."""
    full = [v for v in parts if 0 not in v.shape]
    return joined(ctx.labels, full, dim, ctx.why)


def stacked(ctx: Context, parts: Sequence[Value], dim: int = 0) -> Value:
    """Along a new axis; along the others they meet."""
    axis = dim % (parts[0].dim + 1)
    return joined(ctx.labels, [v.inserted(axis) for v in parts], axis, ctx.why)


def written(
    ctx: Context,
    x: Value,
    source: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    """A tensor with a slice of one axis replaced."""
    axis, size = dim % x.dim, x.shape[dim]
    places = list(range(size))[slice(start, end, step)]
    parts, last, used = list[Value](), 0, 0
    for first, count in _runs(places):
        if first > last:
            parts.append(indexed(x, axis, torch.arange(last, first)))
        parts.append(indexed(source, axis, torch.arange(used, used + count)))
        last, used = first + count, used + count
    if last < size:
        parts.append(indexed(x, axis, torch.arange(last, size)))
    return joined(ctx.labels, parts, axis, ctx.why)


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Places as runs of neighbours: (first, how many)."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and sum(runs[-1]) == place:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((place, 1))
    return runs


def written_at(ctx: Context, x: Value, source: Value, dim: int, index: int) -> Any:
    """A tensor with one index of one axis replaced."""
    at = index % x.shape[dim]
    return written(ctx, x, source.inserted(dim % x.dim), dim, at, at + 1)


def overwritten(ctx: Context, x: Value, source: Value, *_: Any) -> Value:
    """The values of another tensor in the shape of this one."""
    return met(ctx.labels, [x, expanded(ctx.labels, source, x.shape)], ctx.why)


def parted_complex(ctx: Context, x: Value) -> Value:
    """Real and imaginary parts on a new last axis."""
    return replace(x.inserted(x.dim), shape=ctx.shape)


def padded(ctx: Context, x: Value, pad: Sequence[int], *_: Any, **__: Any) -> Value:
    """Padded axes keep their sizes; `pad` counts from the last one."""
    axes = [x.dim - 1 - i // 2 for i, width in enumerate(pad) if width]
    return replace(ctx.whole(x, axes), shape=ctx.shape)


def mirrored(ctx: Context, x: Value, dims: Any) -> Value:
    """Indices in reverse order: without some of them it is the reverse of the others."""
    for axis in [dims] if isinstance(dims, int) else dims:
        x = indexed(x, axis, torch.arange(x.shape[axis]).flip(0))
    return x


def doubled(ctx: Context, x: Value, *_: Any) -> tuple[Value, ...]:
    """What keeps its input's shape, and a mask of that shape."""
    return tuple(x for _ in ctx.shapes)


def rolled(ctx: Context, x: Value, _: Any, dims: Any = ()) -> Value:
    """The axes that are turned keep their sizes: all of them where none is named."""
    axes = [dims] if isinstance(dims, int) else list(dims)
    return ctx.whole(x, axes or range(x.dim), keep=True)


def as_complex(ctx: Context, x: Value) -> Value:
    """Real and imaginary parts on the last axis become one number."""
    kept = ctx.whole(x, [-1])
    return values.squeezed(values.reduced_to_one(kept, kept.tags, [x.dim - 1]), [x.dim - 1])
