"""Rules of products: contractions of every kind, and what multiplies by a table."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from torchprune.graph.context import Context, Product, unknown
from torchprune.graph.labels import UNLABELLED, axes_of
from torchprune.graph.values import (
    Value,
    expanded,
    indexed,
    met,
    reduced_to_one,
    squeezed,
    turned,
)


def contract(
    ctx: Context,
    x: Value,
    y: Value,
    axes: Sequence[int] = (-1,),
    apart: Collection[int] = (),
) -> Value:
    """The sum over some axes of a pointwise product.

    Args:
        apart: the axes along which there are products apart from each other. Where both factors
            are activations, what lies on them are heads.
    """
    product = met(ctx.labels, [x, y], ctx.why)
    ctx.products.append(Product(product.shape, product.tags, ctx.module))
    dim = product.dim
    summed = sorted(axis % dim for axis in axes)
    for factor in (x.widened(dim), y.widened(dim)):
        if factor.weight:
            ctx.labels.read += [tag for axis in summed if (tag := factor.on(axis)) is not None]
    weighed = x.weight or y.weight
    tags = []
    for tag in product.tags:
        if not weighed:
            ctx.labels.summed(tag, [axis for axis in axes_of(tag) if axis in summed])
        if {*axes_of(tag)} <= {*summed}:
            if not weighed:
                ctx.labels.freeze(tag, ctx.why)
            continue
        tags.append(ctx.labels.united(tag, summed))
        if not weighed and {*axes_of(tag)} & {axis % dim for axis in apart}:
            ctx.labels.attend(tags[-1], {axis % dim for axis in apart})
    return squeezed(reduced_to_one(product, tags, summed), summed)


def linear(ctx: Context, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """A sum over the last axis of input and weight."""
    return _plus(ctx, contract(ctx, x.inserted(-2), weight), bias)


def addmm(ctx: Context, bias: Value, x: Value, y: Value, **_: Any) -> Value:
    """A matrix product, and what is added to it."""
    return _plus(ctx, matmul(ctx, x, y), bias)


def matmul(ctx: Context, x: Value, y: Value) -> Value:
    """A sum over one axis; what lies on leading axes is kept apart, as heads are."""
    if y.dim == 1:
        return contract(ctx, x, y)
    if x.dim == 1:
        return contract(ctx, x, turned(y))
    return _rows_by_columns(ctx, x, turned(y))


def dotted(ctx: Context, x: Value, y: Value, *, dim: int = -1) -> Value:
    """Products of vectors on one axis, for all others apart."""
    return contract(ctx, x, y, [dim])


def _rows_by_columns(ctx: Context, x: Value, y: Value) -> Value:
    """Every row of x times every row of y, for all leading axes apart."""
    dim = max(x.dim, y.dim) + 1
    return contract(ctx, x.inserted(-2), y.inserted(-3), apart=range(dim - 3))


def _plus(ctx: Context, value: Value, bias: Value | None) -> Value:
    return value if bias is None else met(ctx.labels, [value, bias], ctx.why)


def attention(
    ctx: Context,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Scores of queries and keys, a softmax that keeps heads apart, a sum of values."""
    if enable_gqa:
        key, value = (_repeated(ctx, v, query.shape[-3] // v.shape[-3]) for v in (key, value))
    scores = _rows_by_columns(ctx, query, key)
    if attn_mask is not None:
        scores = met(ctx.labels, [scores, attn_mask], ctx.why)
    scores = ctx.whole(scores, [-1])
    return _rows_by_columns(ctx, scores, turned(value))


def routed(ctx: Context, x: Value, weights: Value, *_: Any, **__: Any) -> Value:
    """Every row times one expert's matrix: experts stay, their inputs and outputs are shared."""
    kept = ctx.whole(weights, [0])
    one = Value(weights.shape[1:], tuple(t.squeeze(0) for t in kept.tags), weights.weight)
    return contract(ctx, x.inserted(-2), turned(one))


def _repeated(ctx: Context, value: Value, times: int) -> Value:
    if value.shape[-3] == 1:
        return expanded(ctx.labels, value, (*value.shape[:-3], times, *value.shape[-2:]))
    index = torch.arange(value.shape[-3]).repeat_interleave(times)
    return indexed(value, -3, index)


def einsum(ctx: Context, equation: str, operands: Sequence[Value], **__: Any) -> Any:
    """Any number of operands, one after the other; an axis twice in one operand is not followed."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names, output = _without_dots(inputs.split(","), output, operands)
    if not arrow or any(len(set(letters)) < len(letters) for letters in [*names, output]):
        return unknown(ctx, *operands)
    done, held = names[0], operands[0]
    for at in range(1, max(2, len(operands))):
        later = "".join(names[at + 1 :]) + output
        own, other = (names[at], operands[at]) if at < len(operands) else ("", None)
        both = [c for c in dict.fromkeys(done + own) if c in later]
        summed = [c for c in dict.fromkeys(done + own) if c not in later]
        if at == len(operands) - 1 or other is None:
            both = list(output)
        order = [*both, *summed]
        axes = range(len(both), len(order))
        left = _laid(held, done, order)
        if other is None:
            kept = ctx.whole(left, axes)
            held = squeezed(reduced_to_one(kept, kept.tags, list(axes)), list(axes))
        elif summed:
            apart = [a for a, c in enumerate(both) if c in done and c in own]
            held = contract(ctx, left, _laid(other, own, order), axes, apart)
        else:
            held = met(ctx.labels, [left, _laid(other, own, order)], ctx.why)
        done = "".join(both)
    return held


def _laid(value: Value, letters: str, order: Sequence[str]) -> Value:
    """An operand with an axis for every letter in order, of size 1 where it has none."""
    laid = value.permuted([letters.index(c) for c in order if c in letters])
    for place, letter in enumerate(order):
        if letter not in letters:
            laid = laid.inserted(place)
    return laid


def _without_dots(
    names: Sequence[str], output: str, operands: Sequence[Value]
) -> tuple[list[str], str]:
    """An equation with letters of their own for the axes that `...` stands for."""
    spare = [chr(c) for c in range(0x3B1, 0x3CA)]
    counts = [v.dim - len(n) + 3 for n, v in zip(names, operands, strict=True) if "..." in n]
    most = max(counts, default=0)
    dots = "".join(spare[:most])
    made = []
    for letters, value in zip(names, operands, strict=True):
        own = value.dim - len(letters) + 3
        made.append(letters.replace("...", dots[most - own :] if own else ""))
    return made, output.replace("...", dots)


def convolution(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    *options: Any,
    **named: Any,
) -> Value:
    """Channels as in a matrix product, positions as they come; groups and depthwise too."""
    groups = named.get("groups", options[3] if len(options) > 3 else 1)
    return _convolved(ctx, x, weight, bias, int(groups), swapped=False)


def transposed_convolution(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    *options: Any,
    **named: Any,
) -> Value:
    """As a convolution, with the weight's first axis read."""
    groups = named.get("groups", options[3] if len(options) > 3 else 1)
    return _convolved(ctx, x, weight, bias, int(groups), swapped=True)


def any_convolution(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Value:
    """The one operator that all convolutions become."""
    return _convolved(ctx, x, weight, bias, groups, swapped=transposed)


def _convolved(
    ctx: Context, x: Value, weight: Value, bias: Value | None, groups: int, *, swapped: bool
) -> Value:
    """Channels as in a matrix product; positions are no business of labels."""
    space = weight.dim - 2
    x = ctx.whole(x, range(x.dim - space, x.dim))
    weight = ctx.whole(weight, range(2, weight.dim))
    channels = x.dim - space - 1
    inputs = Value(x.shape[: channels + 1], _flat(x.tags, space), x.weight)
    filters = Value(weight.shape[:2], _flat(weight.tags, space), weight.weight)
    filters = filters.permuted([1, 0]) if swapped else filters
    positions = (x.shape if swapped else ctx.shape)[channels + 1 :]
    whole = _extent(positions) * _extent(weight.shape[2:])
    before = len(ctx.products)
    if groups == 1:
        out = contract(ctx, inputs.inserted(-2), filters)
    elif weight.shape[1] == 1 and groups == inputs.shape[-1]:
        own = Value((weight.shape[0],), _first_axis(weight, space), weight.weight)
        out = _depthwise(ctx, inputs, own)
    else:
        out = _grouped(ctx, inputs, weight, groups, swapped=swapped)
    ctx.products[before:] = [_scaled(p, whole) for p in ctx.products[before:]]
    out = _plus(ctx, out, bias)
    tags = tuple(tag.reshape(*tag.shape, *(1,) * space) for tag in out.tags)
    return Value(ctx.shape, tags, out.weight)


def _first_axis(weight: Value, space: int) -> tuple[Tensor, ...]:
    """A depthwise weight's tags without its other axes, all of size 1."""
    return tuple(tag.reshape(-1) for tag in _flat(weight.tags, space) if tag.shape[0] > 1)


def _depthwise(ctx: Context, x: Value, filters: Value) -> Value:
    """Every input channel has its own filters."""
    times = filters.shape[0] // x.shape[-1]
    index = torch.arange(x.shape[-1]).repeat_interleave(times)
    out = met(ctx.labels, [indexed(x, -1, index), filters], ctx.why)
    ctx.products.append(Product(out.shape, out.tags, ctx.module))
    return out


def _grouped(ctx: Context, x: Value, weight: Value, groups: int, *, swapped: bool) -> Value:
    """Whole groups of channels go, or the same places of all groups.

    A weight has its channels on the first axis, of outputs (of inputs, if swapped), and those of
    one group on the second.
    """
    shared = Value(weight.shape[:2], _flat(weight.tags, weight.dim - 2), weight.weight)
    channels, count = x.shape[-1], ctx.shape[x.dim - 1]
    if (tag := x.on(x.dim - 1)) is not None and len(axes_of(tag)) > 1:
        ctx.freeze(x, weight)
        return Value((*x.shape[:-1], count))
    read = _labels(tag, channels)
    rows, inner = (_labels(shared.on(axis), weight.shape[axis]) for axis in (0, 1))
    reads = read.view(groups, -1)
    makes = inner.view(1, -1) if swapped else rows.view(groups, -1)
    if ctx.labels.whole_groups(rows, reads, makes):
        return _whole_groups(ctx, x, reads, rows, inner, count, swapped=swapped)
    return _within_groups(ctx, x, reads, rows, inner, count, swapped=swapped)


def _whole_groups(
    ctx: Context, x: Value, reads: Tensor, rows: Tensor, inner: Tensor, count: int, *, swapped: bool
) -> Value:
    """A group of input channels, and the filters that read it, go together or not at all.

    Args:
        reads: (groups, inputs of a group) labels of the input.
        rows, inner: labels of the weight's axes; what is inside a group stays as it is.
    """
    groups = len(reads)
    _stay(ctx, inner)
    makes = ctx.labels.united(rows.view(groups, -1), [1])
    ctx.labels.join(ctx.labels.united(reads, [1]), makes)
    if swapped:  # a group's outputs are no axis of the weight: they stand for their group
        rows = makes.expand(groups, count // groups).reshape(-1)
    shape = (*x.shape[:-1], count, reads.shape[1])
    ctx.products.append(Product(shape, (_last(rows, x.dim + 1, -2),), ctx.module))
    return Value((*x.shape[:-1], count), (_last(rows, x.dim, -1),))


def _within_groups(
    ctx: Context, x: Value, reads: Tensor, rows: Tensor, inner: Tensor, count: int, *, swapped: bool
) -> Value:
    """The same places of all groups go together: there are as many groups, each is narrower.

    Args: as of `_whole_groups`.
    """
    groups = len(reads)
    each = ctx.labels.united(rows.view(groups, -1), [0]).reshape(-1)
    ins, outs = (each, inner) if swapped else (inner, each)
    fixed = not bool((reads != UNLABELLED).any())
    if fixed:
        _stay(ctx, ins)
    else:
        ctx.labels.join(reads, ins)
        ctx.labels.read.append(rows if swapped else inner)
    made = outs.repeat(groups)
    tags = [_last(made, x.dim + 1, -2)]
    if not fixed:
        tags.append(_last(ins, x.dim + 1, -1))
    shape = (*x.shape[:-1], count, reads.shape[1])
    ctx.products.append(Product(shape, tuple(t for t in tags if axes_of(t)), ctx.module))
    return Value((*x.shape[:-1], count), (_last(made, x.dim, -1),))


def _stay(ctx: Context, labels: Tensor) -> None:
    if bool((labels != UNLABELLED).any()):
        ctx.labels.freeze(labels, ctx.why)


def _labels(tag: Tensor | None, size: int) -> Tensor:
    """(size,) the labels of a tag of one axis, or of what stays."""
    return torch.full((size,), UNLABELLED) if tag is None else tag.reshape(-1)


def _last(tag: Tensor, dim: int, axis: int) -> Tensor:
    shape = [1] * dim
    shape[axis] = len(tag)
    return tag.reshape(shape)


def _flat(tags: Sequence[Tensor], space: int) -> tuple[Tensor, ...]:
    return tuple(tag.reshape(tag.shape[: tag.dim() - space]) for tag in tags)


def _extent(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _scaled(product: Product, times: int) -> Product:
    tags = tuple(tag.unsqueeze(0) for tag in product.tags)
    return Product((times, *product.shape), tags, product.module)


def distances(ctx: Context, x: Value, y: Value, *_: Any, **__: Any) -> Value:
    """Every row of one with every row of the other, over all of their last axis."""
    pairs = met(ctx.labels, [x.inserted(-2), y.inserted(-3)], ctx.why)
    return squeezed(
        reduced_to_one(pairs, ctx.whole(pairs, [-1]).tags, [pairs.dim - 1]), [pairs.dim - 1]
    )


def bag(ctx: Context, weight: Value, indices: Value, offsets: Value, *options: Any) -> Any:
    """Sums of an embedding's rows: columns pass, rows are chosen by the input."""
    ctx.freeze(indices, offsets, *options)
    kept = ctx.whole(weight, [0])
    out = Value(ctx.shape, kept.tags, weight.weight)
    return tuple(out if shape == ctx.shape else Value(shape) for shape in ctx.shapes)


def embedding(ctx: Context, weight: Value, indices: Value, *_: Any) -> Value:
    """Rows are chosen by the input, so none of them can go; columns pass."""
    ctx.freeze(indices)
    kept = ctx.whole(weight, [0])
    tags = (t.reshape((1,) * indices.dim + (t.shape[1],)) for t in kept.tags)
    return Value((*indices.shape, weight.shape[1]), tuple(tags), weight.weight and indices.weight)
