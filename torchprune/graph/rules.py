"""How each operator of a graph passes labels on. What is not here freezes what it reads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchprune.graph import indexing, products, recurrent_rules, reductions, views
from torchprune.graph.context import Context, unknown
from torchprune.graph.derived import parts_of
from torchprune.graph.reasons import reason_for
from torchprune.graph.values import UNKNOWN, Constant, Value, filled, met, sizes_of

Rule = Callable[..., Any]

_aten = torch.ops.aten


def pointwise(ctx: Context, *args: Any, **named: Any) -> Any:
    """Elements that meet go together."""
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


_POOLS = (
    *("max_pool{}d", "avg_pool{}d", "max_pool{}d_with_indices", "fractional_max_pool{}d"),
    *("adaptive_avg_pool{}d", "adaptive_max_pool{}d", "_adaptive_avg_pool{}d"),
    *("upsample_nearest{}d", "_upsample_nearest_exact{}d"),
)
_MODES = {1: ["linear"], 2: ["bilinear", "bicubic"], 3: ["trilinear"]}

_OPERATORS: dict[Rule, list[Any]] = {
    products.linear: _named("linear"),
    products.addmm: _named("addmm", "baddbmm", "addmv"),
    products.dotted: _named("linalg_vecdot"),
    products.matmul: _named("matmul", "mm", "bmm", "mv", "dot"),
    products.attention: _named("scaled_dot_product_attention"),
    products.einsum: _named("einsum"),
    products.convolution: _named("conv1d", "conv2d", "conv3d"),
    products.transposed_convolution: _named(
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"
    ),
    products.any_convolution: _named("convolution"),
    products.embedding: _named("embedding"),
    products.bag: _named("_embedding_bag", "_embedding_bag_forward_only"),
    recurrent_rules.recurrent: _named("lstm", "gru", "rnn_tanh", "rnn_relu"),
    products.distances: _named("cdist", "_cdist_forward"),
    reductions.layer_norm: _named("layer_norm", "rms_norm"),
    reductions.layer_norm_and_moments: _named("native_layer_norm"),
    reductions.batch_norm: _named("batch_norm"),
    reductions.batch_norm_and_moments: _named(
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_native_batch_norm_legit_functional",
        "native_batch_norm",
    ),
    reductions.by_channel: _named("prelu"),
    reductions.instance_norm: _named("instance_norm"),
    reductions.weight_norm: _named("_weight_norm"),
    reductions.group_norm: _named("group_norm"),
    reductions.group_norm_and_moments: _named("native_group_norm"),
    reductions.normalised: _named(
        "softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "logcumsumexp"
    ),
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
    **{
        reductions.pooled(space): _named(
            *(name.format(space) for name in _POOLS),
            *(f"upsample_{how}{space}d" for how in _MODES[space]),
            *(f"_upsample_{how}{space}d_aa" for how in _MODES[space]),
        )
        for space in (1, 2, 3)
    },
    reductions.sampled: _named("grid_sampler", "grid_sampler_2d", "grid_sampler_3d"),
    reductions.unpooled: _named("max_unpool2d"),
    reductions.edged: _named(
        *(f"{how}_pad{n}d" for how in ("reflection", "replication") for n in (1, 2, 3))
    ),
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
    views.shuffled: _named("channel_shuffle", "native_channel_shuffle"),
    views.chosen: _named("select"),
    views.unbound: _named("unbind"),
    views.cut: _named("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split"),
    views.concatenated: _named("cat", "concat", "concatenate"),
    views.stacked: _named("stack"),
    views.padded: _named("constant_pad_nd", "pad"),
    views.mirrored: _named("flip"),
    views.doubled: _named("native_dropout"),
    views.rolled: _named("roll"),
    views.as_complex: _named("view_as_complex"),
    indexing.look_up: _named("index"),
    indexing.put: _named("index_put"),
    indexing.masked_select: _named("masked_select"),
    indexing.masked_scatter: _named("masked_scatter"),
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
        "polar",
        "real",
        "imag",
        "fill",
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
    "empty_strided",
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
    if not any(v.held() for v in values):
        rule = rule_for(target)
        if rule is views.same and isinstance(values[0], Constant):
            return values[0]
        if rule in (views.repeated_view, views.repeated) and UNKNOWN not in values[0].shape:
            return rule(ctx, *args, **kwargs)
        weight = all(v.weight for v in values)
        plain = tuple(Value(shape, weight=weight) for shape in ctx.shapes)
        return plain if len(plain) != 1 else plain[0]
    rule = rule_for(target)
    if any(isinstance(v, indexing.Picked) for v in values):
        if rule in (pointwise, views.same):
            rule = indexing.each
        elif rule not in (indexing.put, indexing.masked_scatter):
            rule = unknown
    elif any(UNKNOWN in v.shape for v in values):
        rule = unknown
    if reason := reason_for(target):
        ctx = replace(ctx, why=f"{ctx.why}: {reason}")
    elif rule is unknown and ctx.example is not None:
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
        shapes = [sizes_of(t) for t in tensors_in(node.meta.get("val"))]
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
