"""How each operator of a graph passes labels on. What is not here freezes what it reads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchprune.graph import products, reductions, views
from torchprune.graph.context import Context, unknown
from torchprune.graph.derived import parts_of
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
        "upsample_trilinear3d",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "adaptive_max_pool3d",
        "max_pool3d_with_indices",
        "_adaptive_avg_pool3d",
    ),
    reductions.sampled: _named("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"),
    reductions.unpooled: _named("max_unpool2d"),
    reductions.unfolded: _named("unfold"),
    reductions.diagonal: _named("diagonal"),
    reductions.patches: _named("im2col"),
    reductions.from_patches: _named("col2im"),
    reductions.bucketed: _named("bucketize", "searchsorted"),
    reductions.along(-1): _named(
        "sort", "argsort", "mode", "cummax", "cummin", "cumprod", "_fft_r2c", "_fft_c2r", "_fft_c2c"
    ),
    reductions.along(0): _named(
        "msort",
        "gather",
        "index_select",
        "index_add",
        "index_copy",
        "index_fill",
        "scatter",
        "scatter_add",
        "scatter_reduce",
    ),
    reductions.along(None): _named("median", "nanmedian"),
    reductions.along(None, 1): _named("quantile", "nanquantile"),
    reductions.along(-1, 1): _named("topk", "kthvalue", "linalg_cross", "take_along_dim"),
    views.written: _named("slice_scatter"),
    views.written_at: _named("select_scatter"),
    views.overwritten: _named("copy"),
    views.put: _named("index_put"),
    views.parted_complex: _named("view_as_real"),
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
    pointwise: _named(
        "where",
        "masked_fill",
        "masked_fill_",
        "add_",
        "mul_",
        "sub_",
        "div_",
        "hardswish_",
        "hardsigmoid_",
        "complex",
        "real",
        "imag",
    ),
}
_RULES = {packet: rule for rule, packets in _OPERATORS.items() for packet in packets}


_FILLED = _named(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
)
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
    rule = rule_for(target)
    if rule is unknown and ctx.example is not None:
        parts = parts_of(target, *ctx.example)
        if parts is not None:
            return _by_parts(ctx, parts, values)
    try:
        made = rule(ctx, *args, **kwargs)
    except (TypeError, ValueError, IndexError, RuntimeError):  # a form that its rule lacks
        return unknown(ctx, *args, *kwargs.values())
    found = made if isinstance(made, tuple) else (made,)
    if [value.shape for value in found] != ctx.shapes:
        return unknown(ctx, *args, *kwargs.values())
    return made


def _by_parts(ctx: Context, parts: GraphModule, given: list[Value]) -> Any:
    """An operator followed through the simpler ones that it is made of."""
    env: dict[Node, Any] = {}
    rest = iter(given)
    for node in parts.graph.nodes:
        shapes = [tuple(t.shape) for t in tensors_in(node.meta.get("val"))]
        if node.op == "placeholder":
            env[node] = next(rest)
        elif node.op == "get_attr":  # a constant of the operator's own
            env[node] = Value(tuple(getattr(parts, str(node.target)).shape), weight=True)
        elif node.op == "output":
            return _as_tuple(torch.fx.map_arg(node.args[0], env.get))
        elif node.target is operator.getitem:
            held = env[node.args[0]]
            env[node] = held[node.args[1]] if isinstance(held, tuple) else held
        else:
            example = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
            inner = replace(ctx, shapes=shapes, example=example)
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), env.get)
            env[node] = follow(inner, node.target, args, kwargs)
    raise AssertionError("a graph without an output")


def _as_tuple(made: Any) -> Any:
    return tuple(made) if isinstance(made, list | tuple) else made


def tensors_in(val: Any) -> Iterator[Tensor]:
    """The tensors that a node gives."""
    if isinstance(val, Tensor):
        yield val
    elif isinstance(val, list | tuple):
        for item in val:
            yield from tensors_in(item)


def _values(nested: Any) -> list[Value]:
    if isinstance(nested, Value):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    elif not isinstance(nested, list | tuple):
        return []
    return [v for item in nested for v in _values(item)]
