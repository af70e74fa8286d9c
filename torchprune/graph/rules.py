"""How each operator of a graph passes labels on. What is not here freezes what it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchprune.graph import products, reductions, views
from torchprune.graph.context import Context, unknown
from torchprune.graph.values import Value, filled, met

Rule = Callable[..., Any]

_aten = torch.ops.aten


def pointwise(ctx: Context, *args: Any, **named: Any) -> Any:
    values = [v for v in (*args, *named.values()) if isinstance(v, Value)]
    return met(ctx.labels, values, ctx.why)


def rule_for(target: Any) -> Rule:
    """The rule of an operator."""
    packet = getattr(target, "overloadpacket", None)
    if packet in _RULES:
        return _RULES[packet]
    if "grouped_mm" in str(packet):  # torch's own, or the operator transformers stands in with
        return products.routed
    tags = getattr(target, "tags", ())
    return pointwise if torch.Tag.pointwise in tags else unknown


def _named(*names: str) -> list[Any]:
    """Operators of ATen as this version of torch has them."""
    return [getattr(_aten, name) for name in names if hasattr(_aten, name)]


_OPERATORS: dict[Rule, list[Any]] = {
    products.linear: _named("linear"),
    products.addmm: _named("addmm", "baddbmm"),
    products.matmul: _named("matmul", "mm", "bmm", "mv", "dot"),
    products.attention: _named("scaled_dot_product_attention"),
    products.einsum: _named("einsum"),
    products.convolution: _named("conv1d", "conv2d", "conv3d"),
    products.transposed_convolution: _named(
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"
    ),
    products.embedding: _named("embedding"),
    reductions.layer_norm: _named("layer_norm", "rms_norm"),
    reductions.batch_norm: _named("batch_norm"),
    reductions.by_channel: _named("prelu"),
    reductions.instance_norm: _named("instance_norm"),
    reductions.weight_norm: _named("_weight_norm"),
    reductions.group_norm: _named("group_norm"),
    reductions.normalised: _named("softmax", "log_softmax", "_softmax", "cumsum", "logcumsumexp"),
    reductions.reduced: _named(
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
    reductions.normed: _named("linalg_vector_norm", "norm"),
    reductions.pooled: _named(
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
    views.viewed: _named(
        "view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as"
    ),
    views.same: _named(
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
    views.permuted: _named("permute"),
    views.transposed: _named("transpose", "transpose_", "swapaxes"),
    views.moved: _named("movedim", "moveaxis"),
    views.turned: _named("t", "numpy_T"),
    views.turned_last: _named("mT"),
    views.inserted: _named("unsqueeze", "unsqueeze_"),
    views.squeezed: _named("squeeze", "squeeze_"),
    views.repeated_view: _named("expand", "expand_as", "broadcast_to"),
    views.repeated: _named("repeat"),
    views.interleaved: _named("repeat_interleave"),
    views.sliced: _named("slice"),
    views.narrowed: _named("narrow"),
    views.chosen: _named("select"),
    views.unbound: _named("unbind"),
    views.cut: _named("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split"),
    views.concatenated: _named("cat", "concat", "concatenate"),
    views.stacked: _named("stack"),
    views.padded: _named("constant_pad_nd", "pad"),
    views.kept_along: _named("roll", "flip"),
    views.looked_up: _named("index"),
    pointwise: _named("where", "masked_fill", "masked_fill_", "add_", "mul_", "sub_", "div_"),
}
_RULES = {packet: rule for rule, packets in _OPERATORS.items() for packet in packets}


_FILLED = _named("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like")
"""They make one value over and over, in whatever size the code asks for."""


def follow(ctx: Context, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
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
        made = rule_for(target)(ctx, *args, **kwargs)
    except (TypeError, ValueError, IndexError, RuntimeError):  # a form that its rule lacks
        return unknown(ctx, *args, *kwargs.values())
    found = made if isinstance(made, tuple) else (made,)
    if [value.shape for value in found] != ctx.shapes:
        return unknown(ctx, *args, *kwargs.values())
    return made


def _values(nested: Any) -> list[Value]:
    if isinstance(nested, Value):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    elif not isinstance(nested, list | tuple):
        return []
    return [v for item in nested for v in _values(item)]
