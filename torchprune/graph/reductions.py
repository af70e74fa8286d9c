"""Rules of what reads along axes: norms, reductions, pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchprune.graph.context import Context
from torchprune.graph.labels import axes_of
from torchprune.graph.values import Value, indexed, met, reduced_to_one, squeezed


def layer_norm(
    ctx: Context, x: Value, shape: Sequence[int], weight: Any = None, bias: Any = None, *_: Any
) -> Value:
    """The normed axes are read as a whole; the others pass."""
    out = ctx.whole(x, range(x.dim - len(shape), x.dim), keep=True)
    parts = [v for v in (weight, bias) if isinstance(v, Value)]
    return met(ctx.labels, [out, *parts], ctx.why)


def layer_norm_and_moments(
    ctx: Context, x: Value, shape: Sequence[int], weight: Any, bias: Any, *_: Any
) -> tuple[Value, Value, Value]:
    """A layer norm that tells its means and deviations too."""
    axes = range(x.dim - len(shape), x.dim)
    moments = reduced_to_one(x, ctx.whole(x, axes).tags, axes)
    return layer_norm(ctx, x, shape, weight, bias), moments, moments


def by_channel(ctx: Context, x: Value, *statistics: Any, **_: Any) -> Value:
    """Weight, bias, mean and variance: one of each a channel. Also PReLU's slopes."""
    parts = [
        Value(
            (v.shape[0], *(1,) * (x.dim - 2)),
            tuple(t.reshape(-1, *(1,) * (x.dim - 2)) for t in v.tags),
            v.weight,
        )
        for v in statistics
        if isinstance(v, Value)
    ]
    return met(ctx.labels, [x, *parts], ctx.why)


def batch_norm(
    ctx: Context,
    x: Value,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    *_: Any,
) -> Value:
    """With statistics of its own input it reads all but the channels."""
    if training or mean is None:
        x = ctx.whole(x, [axis for axis in range(x.dim) if axis != 1], keep=True)
    return by_channel(ctx, x, weight, bias, mean, variance)


def batch_norm_and_moments(ctx: Context, x: Value, *given: Any) -> tuple[Value, ...]:
    """A batch norm that tells its means and deviations too; statistics may be absent."""
    at = next(place for place, held in enumerate(given) if not isinstance(held, Value | None))
    weight, bias, *statistics = given[:at]
    mean, variance = statistics or (None, None)
    training = given[at] is True  # else it is a number: without training there is no such flag
    out = batch_norm(ctx, x, weight, bias, mean, variance, training)
    moments = Value((x.shape[1],), _of_channels(ctx, out), x.weight)
    return out, *(moments if shape == moments.shape else Value(shape) for shape in ctx.shapes[1:])


def _of_channels(ctx: Context, out: Value) -> tuple[Tensor, ...]:
    """The tags of one number for each index of the second axis."""
    tag = out.on(1)
    if tag is None:
        return ()
    if axes_of(tag) != (1,):
        ctx.freeze(out)
        return ()
    return (tag.reshape(-1),)


def instance_norm(
    ctx: Context,
    x: Value,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    own: bool,
    *_: Any,
) -> Value:
    """Every channel of every sample by itself."""
    if own or mean is None:
        x = ctx.whole(x, range(2, x.dim), keep=True)
    return by_channel(ctx, x, weight, bias, mean, variance)


def weight_norm(ctx: Context, direction: Value, length: Value, dim: int = 0) -> Value:
    """g * v / |v|: the norm is over all axes but one, or over all where `dim` is -1."""
    axes = [axis for axis in range(direction.dim) if axis != dim]
    return met(ctx.labels, [ctx.whole(direction, axes, keep=True), length], ctx.why)


def group_norm(
    ctx: Context, x: Value, groups: int, weight: Any = None, bias: Any = None, *_: Any
) -> Value:
    """The channels of one group go together."""
    space = (1,) * (x.dim - 2)
    parts = [
        Value((v.shape[0], *space), tuple(t.reshape(-1, *space) for t in v.tags), v.weight)
        for v in (weight, bias)
        if isinstance(v, Value)
    ]
    out = met(ctx.labels, [ctx.whole(x, range(2, x.dim)), *parts], ctx.why)
    if (tag := out.on(1)) is not None:
        if axes_of(tag) != (1,):
            ctx.freeze(out)
            return Value(out.shape, weight=out.weight)
        ctx.labels.united(tag.reshape(groups, -1), [1])
    return out


def group_norm_and_moments(
    ctx: Context,
    x: Value,
    weight: Any,
    bias: Any,
    samples: int,
    channels: int,
    places: int,
    groups: int,
    *_: Any,
) -> tuple[Value, Value, Value]:
    """A group norm that tells its means and deviations too."""
    out = group_norm(ctx, x, groups, weight, bias)
    tags = []
    for tag in out.tags:
        if tag.shape[1] > 1:
            tags.append(tag.reshape(groups, -1)[:, 0].reshape(1, -1))
        elif tag.shape[0] > 1:
            tags.append(tag.reshape(-1, 1))
    moments = Value((samples, groups), tuple(tags), x.weight)
    return out, moments, moments


def normalised(ctx: Context, x: Value, dim: Any = None, *_: Any, **__: Any) -> Value:
    """Softmax, cumulated sums and whatever else reads along an axis and keeps it."""
    axes = range(x.dim) if dim is None else [dim] if isinstance(dim, int) else dim
    return ctx.whole(x, axes, keep=True)


def reduced(ctx: Context, x: Value, dim: Any = None, *_: Any, **__: Any) -> Any:
    """Means, sums, extremes over some axes; `max` of two tensors is pointwise."""
    if isinstance(dim, Value):
        return met(ctx.labels, [x, dim], ctx.why)
    whole = dim is None or dim == []
    axes = range(x.dim) if whole else [dim] if isinstance(dim, int) else dim
    axes = sorted(axis % x.dim for axis in axes)
    out = reduced_to_one(x, ctx.whole(x, axes).tags, axes)
    if len(ctx.shape) < x.dim:
        out = squeezed(out, axes)
    return out if len(ctx.shapes) == 1 else tuple(out for _ in ctx.shapes)


def along(default: int | None, place: int = 0, name: str = "dim") -> Any:
    """The rule of operators that read one axis as a whole and each of the others index by index:
    sorts, extremes, cumulations, look-ups.

    Args:
        default: the axis where none is given; None for all.
        place: of the axis among the arguments after the tensor.
    """

    def rule(ctx: Context, x: Value, *args: Any, **named: Any) -> Any:
        """One axis is read as a whole, each of the others index by index."""
        dim = named.get(name, args[place] if len(args) > place else default)
        dims = range(x.dim) if dim is None else [dim] if isinstance(dim, int) else dim
        axes = sorted({axis % x.dim for axis in dims})
        parts = []
        for value in (x, *(v for v in (*args, *named.values()) if isinstance(v, Value))):
            if value.dim == x.dim:
                kept = ctx.whole(value, axes)
                parts.append(reduced_to_one(kept, kept.tags, axes))
            else:
                ctx.freeze(value)
        out = met(ctx.labels, parts, ctx.why)
        same = len(ctx.shape) == x.dim
        out = replace(out, shape=ctx.shape) if same else squeezed(out, axes)
        return out if len(ctx.shapes) == 1 else tuple(out for _ in ctx.shapes)

    return rule


def edged(ctx: Context, x: Value, pad: Sequence[int], *_: Any) -> Value:
    """Padding from what lies at the edges: the padded axes are read as a whole, and others pass."""
    axes = range(x.dim - len(pad) // 2, x.dim)
    return replace(ctx.whole(x, axes), shape=ctx.shape)


def unfolded(ctx: Context, x: Value, dim: int, *_: Any) -> Value:
    """Windows along an axis, as a new last one."""
    return replace(ctx.whole(x, [dim]).inserted(x.dim), shape=ctx.shape)


def diagonal(ctx: Context, x: Value, _: int = 0, one: int = 0, two: int = 1) -> Value:
    """Two axes are read together, and what is read is the last."""
    axes = [one % x.dim, two % x.dim]
    kept = ctx.whole(x, axes)
    return replace(
        squeezed(reduced_to_one(kept, kept.tags, axes), axes).inserted(-1), shape=ctx.shape
    )


def patches(ctx: Context, x: Value, *_: Any) -> Value:
    """`unfold` of images: every channel as many times as a patch has places."""
    kept = ctx.whole(x, range(x.dim - 2, x.dim))
    flat = squeezed(reduced_to_one(kept, kept.tags, [x.dim - 2, x.dim - 1]), [x.dim - 1])
    axis = x.dim - 3
    index = torch.arange(x.shape[axis]).repeat_interleave(ctx.shape[axis] // x.shape[axis])
    return replace(indexed(flat, axis, index), shape=ctx.shape)


def from_patches(ctx: Context, x: Value, *_: Any) -> Value:
    """`fold`: the places of a patch are one channel."""
    axis = x.dim - 2
    kept = ctx.whole(x, [x.dim - 1])
    tags = []
    for tag in kept.tags:
        if axes_of(tag) == (axis,):
            grid = tag.reshape(ctx.shape[axis], -1)
            ctx.labels.united(grid, [1])
            tags.append(grid[:, :1].reshape(*tag.shape[:axis], -1, 1, 1))
        else:
            ctx.labels.freeze(tag, ctx.why)
    return Value(ctx.shape, tuple(tags), x.weight)


def sampled(ctx: Context, x: Value, grid: Value, *_: Any) -> Value:
    """Positions are chosen by the grid, for all channels alike."""
    ctx.freeze(grid)
    return replace(ctx.whole(x, [0, *range(2, x.dim)]), shape=ctx.shape)


def unpooled(ctx: Context, x: Value, indices: Value, *_: Any) -> Value:
    """Every channel's values at every channel's own places."""
    return replace(
        ctx.whole(met(ctx.labels, [x, indices], ctx.why), range(x.dim - 2, x.dim)), shape=ctx.shape
    )


def bucketed(ctx: Context, x: Value, boundaries: Value, *_: Any, **__: Any) -> Value:
    """Elements are looked up one by one in boundaries that stay."""
    ctx.freeze(boundaries)
    return x


def normed(ctx: Context, x: Value, _: Any = None, dim: Any = None, *__: Any, **___: Any) -> Any:
    """A norm over some axes."""
    return reduced(ctx, x, dim)


def pooled(space: int) -> Any:
    """The rule of pools and resampling over so many last axes."""

    def rule(ctx: Context, x: Value, *_: Any, **__: Any) -> Any:
        """The last axes, of space, keep their sizes; the others pass."""
        out = ctx.whole(x, range(x.dim - space, x.dim))
        made = Value(ctx.shape, out.tags, x.weight)
        return made if len(ctx.shapes) == 1 else tuple(made for _ in ctx.shapes)

    return rule
