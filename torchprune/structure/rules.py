"""How each operator of a graph passes labels on. What is not here freezes what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from torchprune.structure.labels import Labels, axes_of
from torchprune.structure.values import (
    Value,
    expanded,
    filled,
    indexed,
    joined,
    met,
    parted,
    reshaped,
    selected,
)

_aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """A contraction: its sizes, and the tags that tell how they shrink.

    Attributes:
        shape: extents of all axes of the product, those summed over included.
        tags: of both factors, broadcast to those axes.
        module: the path of the module whose code multiplies.
    """

    shape: tuple[int, ...]
    tags: tuple[Tensor, ...]
    module: str = ""


@dataclass
class Context:
    """One node being followed.

    Attributes:
        labels: of the whole graph.
        why: what to tell of labels that this node freezes.
        shapes: of the node's results, as on the example inputs.
        module: the path of the module whose code runs it.
        products: filled by every contraction, for counting floating point operations.
    """

    labels: Labels
    why: str = ""
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    module: str = ""
    products: list[Product] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    def freeze(self, *values: Any) -> None:
        """All labels of some values."""
        for value in values:
            if isinstance(value, Value):
                for tag in value.tags:
                    self.labels.freeze(tag, self.why)
            elif isinstance(value, list | tuple):
                self.freeze(*value)

    def whole(self, value: Value, axes: Sequence[int], *, keep: bool = False) -> Value:
        """The value after an operator read all of it along some axes.

        Args:
            keep: whether these axes remain; labels that vary on them alone are frozen, and else
                gone.
        """
        fixed = {axis % value.dim for axis in axes}
        tags = []
        for tag in value.tags:
            own = axes_of(tag)
            inner = [axis for axis in own if axis in fixed]
            if len(inner) == len(own):
                self.labels.freeze(tag, self.why)
                tags += [tag] if keep and own else []
            else:
                tags.append(self.labels.united(tag, inner))
        return replace(value, tags=tuple(tags))


Rule = Callable[..., Any]


# -- products --------------------------------------------------------------------------------------


def contract(ctx: Context, x: Value, y: Value, axes: Sequence[int] = (-1,)) -> Value:
    """The sum over some axes of a pointwise product."""
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
        if {*axes_of(tag)} <= {*summed}:
            if not weighed:
                ctx.labels.freeze(tag, ctx.why)
            continue
        tags.append(ctx.labels.united(tag, summed))
        if not weighed:
            ctx.labels.attend(tags[-1])
    return _squeezed(_narrowed(product, tags, summed), summed)


def _narrowed(value: Value, tags: Sequence[Tensor], axes: Sequence[int]) -> Value:
    """Reduced to size 1 along some axes, where the tags do not vary any more."""
    shape = tuple(1 if a in axes else s for a, s in enumerate(value.shape))
    return Value(shape, tuple(tags), value.weight)


def linear(ctx: Context, x: Value, weight: Value, bias: Value | None = None) -> Value:
    return _plus(ctx, contract(ctx, x.inserted(-2), weight), bias)


def addmm(ctx: Context, bias: Value, x: Value, y: Value, **_: Any) -> Value:
    return _plus(ctx, matmul(ctx, x, y), bias)


def matmul(ctx: Context, x: Value, y: Value) -> Value:
    if y.dim == 1:
        return contract(ctx, x, y)
    if x.dim == 1:
        return contract(ctx, x, _turned(y))
    return contract(ctx, x.inserted(-2), _turned(y).inserted(-3))


def _turned(value: Value) -> Value:
    order = [*range(value.dim)]
    order[-2:] = order[-1], order[-2]
    return value.permuted(order)


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
    scores = contract(ctx, query.inserted(-2), key.inserted(-3))
    if attn_mask is not None:
        scores = met(ctx.labels, [scores, attn_mask], ctx.why)
    scores = ctx.whole(scores, [-1])
    return contract(ctx, scores.inserted(-2), _turned(value).inserted(-3))


def routed(ctx: Context, x: Value, weights: Value, *_: Any, **__: Any) -> Value:
    """Every row times one expert's matrix: experts stay, their inputs and outputs are shared."""
    kept = ctx.whole(weights, [0])
    one = Value(weights.shape[1:], tuple(t.squeeze(0) for t in kept.tags), weights.weight)
    return contract(ctx, x.inserted(-2), _turned(one))


def _repeated(ctx: Context, value: Value, times: int) -> Value:
    if value.shape[-3] == 1:
        return expanded(ctx.labels, value, (*value.shape[:-3], times, *value.shape[-2:]))
    index = torch.arange(value.shape[-3]).repeat_interleave(times)
    return indexed(value, -3, index)


def einsum(ctx: Context, equation: str, operands: Sequence[Value], **_: Any) -> Value:
    inputs, _, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if len(names) != 2 or "." in equation or not output or len(set(output)) != len(output):
        return _unknown(ctx, *operands)
    summed = [c for c in dict.fromkeys(inputs.replace(",", "")) if c not in output]
    order = output + "".join(summed)
    both = []
    for letters, value in zip(names, operands, strict=True):
        if len(set(letters)) != len(letters):
            return _unknown(ctx, *operands)
        laid = value.permuted([letters.index(c) for c in order if c in letters])
        for place, letter in enumerate(order):
            if letter not in letters:
                laid = laid.inserted(place)
        both.append(laid)
    if not summed:
        return met(ctx.labels, both, ctx.why)
    return contract(ctx, *both, axes=range(len(output), len(order)))


def convolution(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    *options: Any,
    **named: Any,
) -> Value:
    groups = named.get("groups", options[3] if len(options) > 3 else 1)
    return _convolved(ctx, x, weight, bias, int(groups), turned=False)


def transposed_convolution(
    ctx: Context,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    *options: Any,
    **named: Any,
) -> Value:
    groups = named.get("groups", options[3] if len(options) > 3 else 1)
    return _convolved(ctx, x, weight, bias, int(groups), turned=True)


def _convolved(
    ctx: Context, x: Value, weight: Value, bias: Value | None, groups: int, *, turned: bool
) -> Value:
    """Channels as in a matrix product; positions are no business of labels."""
    space = weight.dim - 2
    x = ctx.whole(x, range(x.dim - space, x.dim))
    weight = ctx.whole(weight, range(2, weight.dim))
    channels = x.dim - space - 1
    inputs = Value(x.shape[: channels + 1], _flat(x.tags, space), x.weight)
    filters = Value(weight.shape[:2], _flat(weight.tags, space), weight.weight)
    if turned:
        filters = filters.permuted([1, 0])
    positions = (x.shape if turned else ctx.shape)[channels + 1 :]
    whole = _extent(positions) * _extent(weight.shape[2:])
    before = len(ctx.products)
    if groups == 1:
        out = contract(ctx, inputs.inserted(-2), filters)
    elif filters.shape[1] == 1 and groups == inputs.shape[-1]:
        out = _depthwise(ctx, inputs, filters)
    else:
        out = _grouped(ctx, inputs, weight, groups, turned=turned)
    ctx.products[before:] = [_scaled(p, whole) for p in ctx.products[before:]]
    out = _plus(ctx, out, bias)
    tags = tuple(tag.reshape(*tag.shape, *(1,) * space) for tag in out.tags)
    return Value(ctx.shape, tags, out.weight)


def _depthwise(ctx: Context, x: Value, filters: Value) -> Value:
    """Every input channel has its own filters."""
    times = filters.shape[0] // x.shape[-1]
    index = torch.arange(x.shape[-1]).repeat_interleave(times)
    own = Value((filters.shape[0],), tuple(t.squeeze(1) for t in filters.tags), filters.weight)
    out = met(ctx.labels, [indexed(x, -1, index), own], ctx.why)
    ctx.products.append(Product(out.shape, out.tags, ctx.module))
    return out


def _grouped(ctx: Context, x: Value, weight: Value, groups: int, *, turned: bool) -> Value:
    """A group of input channels, and the filters that read it, go together or not at all."""
    inner = 1 if not turned else 0
    shared = Value(weight.shape[:2], _flat(weight.tags, weight.dim - 2), weight.weight)
    channels = x.shape[-1]
    if (tag := x.on(x.dim - 1)) is not None and len(axes_of(tag)) > 1:
        ctx.freeze(x, weight)
        return Value((*x.shape[:-1], ctx.shape[x.dim - 1]))
    count = ctx.shape[x.dim - 1]
    per_in, per_out = channels // groups, count // groups
    read = torch.zeros(channels, dtype=torch.long) if tag is None else tag.reshape(-1)
    if turned:
        # Filters are laid out by input channel; output channels repeat in every group.
        ctx.freeze(shared, x)
        return Value((*x.shape[:-1], count))
    rows = shared.on(0)
    made = torch.zeros(count, dtype=torch.long) if rows is None else rows.reshape(-1)
    if (cols := shared.on(inner)) is not None:
        ctx.labels.freeze(cols, ctx.why)
    reads, makes = read.view(groups, per_in), made.view(groups, per_out)
    reads = ctx.labels.united(reads, [1])
    makes = ctx.labels.united(makes, [1])
    ctx.labels.join(reads, makes)
    if tag is None:
        return Value((*x.shape[:-1], count))
    shape = (*x.shape[:-1], count, per_in)
    ctx.products.append(Product(shape, (_last(made, x.dim + 1, -2),), ctx.module))
    return Value((*x.shape[:-1], count), (_last(made, x.dim, -1),))


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


def embedding(ctx: Context, weight: Value, indices: Value, *_: Any) -> Value:
    """Rows are chosen by the input, so none of them can go; columns pass."""
    ctx.freeze(indices)
    kept = ctx.whole(weight, [0])
    tags = (t.reshape((1,) * indices.dim + (t.shape[1],)) for t in kept.tags)
    return Value((*indices.shape, weight.shape[1]), tuple(tags), weight.weight and indices.weight)


# -- norms and reductions --------------------------------------------------------------------------


def layer_norm(
    ctx: Context, x: Value, shape: Sequence[int], weight: Any = None, bias: Any = None, *_: Any
) -> Value:
    """Also rms_norm, which has no bias."""
    out = ctx.whole(x, range(x.dim - len(shape), x.dim), keep=True)
    parts = [v for v in (weight, bias) if isinstance(v, Value)]
    return met(ctx.labels, [out, *parts], ctx.why)


def batch_norm(ctx: Context, x: Value, *statistics: Any, **_: Any) -> Value:
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
            return replace(out, tags=())
        ctx.labels.united(tag.reshape(groups, -1), [1])
    return out


def normalised(ctx: Context, x: Value, dim: Any = None, *_: Any, **__: Any) -> Value:
    """Softmax, cumulated sums and whatever else reads along an axis and keeps it."""
    axes = range(x.dim) if dim is None else [dim] if isinstance(dim, int) else dim
    return ctx.whole(x, axes, keep=True)


def reduced(ctx: Context, x: Value, dim: Any = None, *_: Any, **__: Any) -> Any:
    """Means, sums, extremes over some axes; `max` of two tensors is pointwise."""
    if isinstance(dim, Value):
        return pointwise(ctx, x, dim)
    whole = dim is None or dim == []
    axes = range(x.dim) if whole else [dim] if isinstance(dim, int) else dim
    axes = sorted(axis % x.dim for axis in axes)
    out = _narrowed(x, ctx.whole(x, axes).tags, axes)
    if len(ctx.shape) < x.dim:
        out = _squeezed(out, axes)
    return out if len(ctx.shapes) == 1 else tuple(out for _ in ctx.shapes)


def normed(ctx: Context, x: Value, _: Any = None, dim: Any = None, *__: Any, **___: Any) -> Any:
    return reduced(ctx, x, dim)


def pooled(ctx: Context, x: Value, *_: Any, **__: Any) -> Any:
    """Pools and resampling over the last axes, which here all have fixed sizes."""
    space = [axis for axis in range(x.dim) if axis > 1 or x.shape[axis] != ctx.shape[axis]]
    out = ctx.whole(x, space)
    made = Value(ctx.shape, out.tags, x.weight)
    return made if len(ctx.shapes) == 1 else tuple(made for _ in ctx.shapes)


# -- views -----------------------------------------------------------------------------------------


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
    return _turned(x)


def inserted(ctx: Context, x: Value, axis: int) -> Value:
    return x.inserted(axis)


def squeezed(ctx: Context, x: Value, dim: Any = None) -> Value:
    axes = range(x.dim) if dim is None else [dim] if isinstance(dim, int) else dim
    return _squeezed(x, [a % x.dim for a in axes if x.shape[a] == 1])


def _squeezed(x: Value, axes: Sequence[int]) -> Value:
    for axis in sorted(axes, reverse=True):
        x = selected(x, axis, 0)
    return x


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


def interleaved(ctx: Context, x: Value, times: Any, dim: int | None = None, **_: Any) -> Value:
    if not isinstance(times, int) or dim is None:
        return _unknown(ctx, x)
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


def parts(ctx: Context, x: Value, _: Any, dim: int = 0) -> tuple[Value, ...]:
    """Chunks and splits: the results' shapes say where the cuts are."""
    return parted(ctx.labels, x, dim, [shape[dim] for shape in ctx.shapes])


def concatenated(ctx: Context, values: Sequence[Value], dim: int = 0) -> Value:
    full = [v for v in values if 0 not in v.shape]
    return joined(ctx.labels, full, dim, ctx.why)


def stacked(ctx: Context, values: Sequence[Value], dim: int = 0) -> Value:
    axis = dim % (values[0].dim + 1)
    return joined(ctx.labels, [v.inserted(axis) for v in values], axis, ctx.why)


def padded(ctx: Context, x: Value, pad: Sequence[int], *_: Any, **__: Any) -> Value:
    """Padded axes keep their sizes; `pad` counts from the last one."""
    axes = [x.dim - 1 - i // 2 for i, width in enumerate(pad) if width]
    return replace(ctx.whole(x, axes), shape=ctx.shape)


def kept_along(ctx: Context, x: Value, *args: Any, **named: Any) -> Value:
    """`roll`, `flip`: the axes that they permute keep their sizes."""
    dims = named.get("dims", args[-1] if args else [])
    axes = [dims] if isinstance(dims, int) else list(dims)
    return ctx.whole(x, axes or range(x.dim), keep=True)


def looked_up(ctx: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    """`x[:, index]` along one axis, as a table is read; other forms freeze."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return _unknown(ctx, x, [index for _, index in given])
    axis, index = given[0]
    ctx.freeze(index)
    kept = ctx.whole(x, [axis])
    ones = (1,) * index.dim
    tags = tuple(t.reshape(*t.shape[:axis], *ones, *t.shape[axis + 1 :]) for t in kept.tags)
    shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    return Value(shape, tags, x.weight and index.weight)


# -- pointwise and the rest ------------------------------------------------------------------------


def pointwise(ctx: Context, *args: Any, **named: Any) -> Any:
    values = [v for v in (*args, *named.values()) if isinstance(v, Value)]
    return met(ctx.labels, values, ctx.why)


def _unknown(ctx: Context, *args: Any) -> Any:
    """An operator without a rule: nothing that it reads can go."""
    ctx.freeze(*args)
    made = tuple(Value(shape) for shape in ctx.shapes)
    return made if len(made) != 1 else made[0]


def rule_for(target: Any) -> Rule:
    """The rule of an operator."""
    packet = getattr(target, "overloadpacket", None)
    if packet in _RULES:
        return _RULES[packet]
    if "grouped_mm" in str(packet):  # torch's own, or the operator transformers stands in with
        return routed
    tags = getattr(target, "tags", ())
    return pointwise if torch.Tag.pointwise in tags else _unknown


def _named(*names: str) -> list[Any]:
    """Operators of ATen as this version of torch has them."""
    return [getattr(_aten, name) for name in names if hasattr(_aten, name)]


_RULES: dict[Any, Rule] = {
    packet: rule
    for rule, packets in {
        linear: _named("linear"),
        addmm: _named("addmm", "baddbmm"),
        matmul: _named("matmul", "mm", "bmm", "mv", "dot"),
        attention: _named("scaled_dot_product_attention"),
        einsum: _named("einsum"),
        convolution: _named("conv1d", "conv2d", "conv3d"),
        transposed_convolution: _named("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        embedding: _named("embedding"),
        layer_norm: _named("layer_norm", "rms_norm"),
        batch_norm: _named("batch_norm", "_batch_norm_with_update", "prelu"),
        group_norm: _named("group_norm"),
        normalised: _named("softmax", "log_softmax", "_softmax", "cumsum", "logcumsumexp"),
        reduced: _named(
            "mean",
            "sum",
            "amax",
            "amin",
            "max",
            "min",
            "prod",
            "any",
            "all",
            "argmax",
            "argmin",
            "logsumexp",
            "var",
            "std",
            "var_mean",
        ),
        normed: _named("linalg_vector_norm", "norm"),
        pooled: _named(
            "max_pool1d",
            "max_pool2d",
            "max_pool3d",
            "avg_pool1d",
            "avg_pool2d",
            "avg_pool3d",
            "adaptive_avg_pool1d",
            "adaptive_avg_pool2d",
            "adaptive_avg_pool3d",
            "adaptive_max_pool1d",
            "adaptive_max_pool2d",
            "max_pool2d_with_indices",
            "_adaptive_avg_pool2d",
            "upsample_nearest1d",
            "upsample_nearest2d",
            "upsample_nearest3d",
            "upsample_bilinear2d",
            "upsample_bicubic2d",
            "upsample_linear1d",
        ),
        viewed: _named(
            "view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as"
        ),
        same: _named(
            "clone",
            "contiguous",
            "detach",
            "detach_",
            "alias",
            "to",
            "_to_copy",
            "dropout",
            "dropout_",
            "feature_dropout",
            "alpha_dropout",
            "lift_fresh_copy",
            "type_as",
            "float",
        ),
        permuted: _named("permute"),
        transposed: _named("transpose", "transpose_", "swapaxes"),
        moved: _named("movedim", "moveaxis"),
        turned: _named("t", "numpy_T"),
        turned_last: _named("mT"),
        inserted: _named("unsqueeze", "unsqueeze_"),
        squeezed: _named("squeeze", "squeeze_"),
        repeated_view: _named("expand", "expand_as", "broadcast_to"),
        repeated: _named("repeat"),
        interleaved: _named("repeat_interleave"),
        sliced: _named("slice"),
        narrowed: _named("narrow"),
        chosen: _named("select"),
        unbound: _named("unbind"),
        parts: _named("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split"),
        concatenated: _named("cat", "concat", "concatenate"),
        stacked: _named("stack"),
        padded: _named("constant_pad_nd", "pad"),
        kept_along: _named("roll", "flip"),
        looked_up: _named("index"),
        pointwise: _named("where", "masked_fill", "masked_fill_", "add_", "mul_", "sub_", "div_"),
    }.items()
    for packet in packets
}


_FILLED = _named("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like")
"""They make one value over and over, in whatever size the code asks for."""


def follow(ctx: Context, target: Any, args: Any, kwargs: Any) -> Any:
    """What a node's results depend on. Without labels among the inputs, on nothing."""
    if not ctx.shapes:  # an assertion, a size: nothing that could be removed
        return None
    values = [*_values(args), *_values(kwargs)]
    if getattr(target, "overloadpacket", None) in _FILLED:
        made = filled(ctx.labels, ctx.shape, range(len(ctx.shape)))
        return Value(ctx.shape, tuple(made), weight=True)
    if not any(v.tags for v in values):
        weight = all(v.weight for v in values)
        plain = tuple(Value(shape, weight=weight) for shape in ctx.shapes)
        return plain if len(plain) != 1 else plain[0]
    try:
        return rule_for(target)(ctx, *args, **kwargs)
    except (TypeError, ValueError, IndexError):  # a form of the operator that its rule lacks
        return _unknown(ctx, *args, *cast(dict[str, Any], kwargs).values())


def _values(nested: Any) -> list[Value]:
    if isinstance(nested, Value):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    elif not isinstance(nested, list | tuple):
        return []
    return [v for item in nested for v in _values(item)]
