"""Rules of views, cuts and joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from torchprune.graph import values
from torchprune.graph.context import Context, unknown
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
    return x


def permuted(ctx: Context, x: Value, order: Sequence[int]) -> Value:
    return x.permuted(order)


def transposed(ctx: Context, x: Value, one: int = 0, two: int = 1) -> Value:
    if x.dim < 2:
        return x
    order = [*range(x.dim)]
    order[one], order[two] = order[two], order[one]
    return x.permuted(order)


def moved(ctx: Context, x: Value, source: Any, target: Any) -> Value:
    sources = [a % x.dim for a in ([source] if isinstance(source, int) else source)]
    targets = [a % x.dim for a in ([target] if isinstance(target, int) else target)]
    order = [-1] * x.dim
    for a, b in zip(sources, targets, strict=True):
        order[b] = a
    rest = iter(a for a in range(x.dim) if a not in sources)
    return x.permuted([a if a >= 0 else next(rest) for a in order])


def turned(ctx: Context, x: Value) -> Value:
    return x.permuted(list(reversed(range(x.dim)))) if x.dim > 1 else x


def turned_last(ctx: Context, x: Value) -> Value:
    return values.turned(x)


def inserted(ctx: Context, x: Value, axis: int) -> Value:
    return x.inserted(axis)


def squeezed(ctx: Context, x: Value, dim: Any = None) -> Value:
    axes = range(x.dim) if dim is None else [dim] if isinstance(dim, int) else dim
    return values.squeezed(x, [a % x.dim for a in axes if x.shape[a] == 1])


def repeated_view(ctx: Context, x: Value, *_: Any, **__: Any) -> Value:
    return expanded(ctx.labels, x, ctx.shape)


def repeated(ctx: Context, x: Value, times: Sequence[int]) -> Value:
    wide = x.widened(len(times))
    for axis, count in enumerate(times):
        if count > 1 and wide.shape[axis] == 1:
            shape = [count if a == axis else s for a, s in enumerate(wide.shape)]
            wide = expanded(ctx.labels, wide, shape)
        elif count > 1:
            wide = indexed(wide, axis, torch.arange(wide.shape[axis]).repeat(count))
    return wide


def interleaved(ctx: Context, x: Value, times: Any, dim: int | None = None, **_: Any) -> Any:
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
    return indexed(x, dim, torch.arange(x.shape[dim])[slice(start, end, step)])


def narrowed(ctx: Context, x: Value, dim: int, start: int, length: int) -> Value:
    return indexed(x, dim, torch.arange(start, start + length))


def chosen(ctx: Context, x: Value, dim: int, index: int) -> Value:
    return selected(x, dim, index)


def unbound(ctx: Context, x: Value, dim: int = 0) -> tuple[Value, ...]:
    return tuple(selected(x, dim, i) for i in range(x.shape[dim]))


def cut(ctx: Context, x: Value, _: Any, dim: int = 0) -> tuple[Value, ...]:
    """Chunks and splits: the results' shapes say where the cuts are."""
    return parted(ctx.labels, x, dim, [shape[dim] for shape in ctx.shapes])


def concatenated(ctx: Context, parts: Sequence[Value], dim: int = 0) -> Value:
    full = [v for v in parts if 0 not in v.shape]
    return joined(ctx.labels, full, dim, ctx.why)


def stacked(ctx: Context, parts: Sequence[Value], dim: int = 0) -> Value:
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


def put(ctx: Context, x: Value, indices: Sequence[Value | None], source: Value, *_: Any) -> Any:
    """`x[:, index] = source` with one index: that axis is read as a whole."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dim != 1:
        return unknown(ctx, x, source, [index for _, index in given])
    axis, index = given[0]
    ctx.freeze(index)
    kept = ctx.whole(x, [axis], keep=True)
    own = source.widened(x.dim) if source.dim < x.dim else source
    if own.shape[axis] > 1:
        own = ctx.whole(own, [axis])
        own = replace(own, shape=tuple(1 if a == axis else n for a, n in enumerate(own.shape)))
    return met(ctx.labels, [kept, own], ctx.why)


def parted_complex(ctx: Context, x: Value) -> Value:
    """Real and imaginary parts on a new last axis."""
    return replace(x.inserted(x.dim), shape=ctx.shape)


def padded(ctx: Context, x: Value, pad: Sequence[int], *_: Any, **__: Any) -> Value:
    """Padded axes keep their sizes; `pad` counts from the last one."""
    axes = [x.dim - 1 - i // 2 for i, width in enumerate(pad) if width]
    return replace(ctx.whole(x, axes), shape=ctx.shape)


def kept_along(ctx: Context, x: Value, *args: Any, **named: Any) -> Value:
    """`roll`, `flip`: the axes that they permute keep their sizes."""
    dims = named.get("dims", args[-1] if args else [])
    axes = [dims] if isinstance(dims, int) else list(dims)
    return ctx.whole(x, axes or range(x.dim), keep=True)


def looked_up(ctx: Context, x: Value, indices: Sequence[Value | None]) -> Any:
    """`x[:, index]` along one axis, as a table is read; other forms freeze."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return unknown(ctx, x, [index for _, index in given])
    axis, index = given[0]
    ctx.freeze(index)
    kept = ctx.whole(x, [axis])
    ones = (1,) * index.dim
    tags = tuple(t.reshape(*t.shape[:axis], *ones, *t.shape[axis + 1 :]) for t in kept.tags)
    shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    return Value(shape, tags, x.weight and index.weight)
