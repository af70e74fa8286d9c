"""What the operators of an ML program compute, by Apple's description of them, in torch.

Each is a function of an operator's inputs by name: tensors, integers as int64, strings, lists of
tensors; floating point comes as float32, whatever the program's type, and is rounded to that by
the caller. An input that a program leaves out has the default of the description.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Given = dict[str, Any]
"""An operator's inputs by name."""

STEPS: dict[str, Callable[[Given], Any]] = {}
"""By name of the operator."""


def step(*names: str) -> Callable[[Callable[[Given], Any]], Callable[[Given], Any]]:
    """Register a function under the names of operators."""

    def put(function: Callable[[Given], Any]) -> Callable[[Given], Any]:
        STEPS.update(dict.fromkeys(names, function))
        return function

    return put


def ints(value: Any) -> list[int]:
    """Sizes or axes as a list."""
    return [int(v) for v in torch.as_tensor(value).reshape(-1)]


def _each(function: Callable[..., Any], *names: str) -> Callable[[Given], Any]:
    return lambda g: function(*(g[name] for name in names))


def _number(given: Given, name: str, usual: float) -> Any:
    value = given.get(name, usual)
    return float(value) if not isinstance(value, Tensor) or value.numel() == 1 else value


_UNARY = (
    "abs acos asin atan atanh ceil cos cosh erf exp exp2 floor logical_not relu relu6 round sign"
    " sin sinh sqrt square tan tanh sigmoid"
)
for _name in _UNARY.split():
    _at: Any = getattr(torch, _name, None) or getattr(F, _name)
    STEPS[_name] = _each(_at, "x")
for _name, _at in {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "mod": torch.remainder,
    "pow": torch.pow,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "less": torch.lt,
    "less_equal": torch.le,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    # of integers it is cut off towards zero
    "real_div": lambda x, y: (
        x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")
    ),
}.items():
    STEPS[_name] = _each(_at, "x", "y")
STEPS["identity"] = _each(lambda x: x, "x")
STEPS["cast"] = _each(lambda x: x, "x")  # to the type of its output, by the caller
STEPS["silu"] = _each(F.silu, "x")
STEPS["softplus"] = _each(F.softplus, "x")
STEPS["softsign"] = _each(F.softsign, "x")
STEPS["select"] = _each(lambda c, a, b: torch.where(c.bool(), a, b), "cond", "a", "b")


@step("log")
def _log(g: Given) -> Tensor:
    return torch.log(g["x"] + _number(g, "epsilon", 1e-45))


@step("rsqrt")
def _rsqrt(g: Given) -> Tensor:
    return torch.rsqrt(g["x"] + _number(g, "epsilon", 1e-12))


@step("inverse")
def _inverse(g: Given) -> Tensor:
    return 1 / (g["x"] + _number(g, "epsilon", 1e-4))


@step("clip")
def _clip(g: Given) -> Tensor:
    return torch.clamp(g["x"], _number(g, "alpha", 0), _number(g, "beta", 1))


@step("leaky_relu")
def _leaky_relu(g: Given) -> Tensor:
    return F.leaky_relu(g["x"], _number(g, "alpha", 0.01))


@step("elu")
def _elu(g: Given) -> Tensor:
    return F.elu(g["x"], _number(g, "alpha", 1.0))


@step("clamped_relu")
def _clamped_relu(g: Given) -> Tensor:
    return F.leaky_relu(g["x"], _number(g, "alpha", 0)).clamp(max=_number(g, "beta", math.inf))


@step("threshold")
def _threshold(g: Given) -> Tensor:
    return g["x"].clamp(min=_number(g, "alpha", 0))


@step("thresholded_relu")
def _thresholded_relu(g: Given) -> Tensor:
    return torch.where(g["x"] >= _number(g, "alpha", 1), g["x"], 0)


@step("linear_activation")
def _linear_activation(g: Given) -> Tensor:
    return _number(g, "alpha", 1) * g["x"] + _number(g, "beta", 0)


@step("scaled_tanh")
def _scaled_tanh(g: Given) -> Tensor:
    return _number(g, "alpha", 1) * torch.tanh(g["x"] * _number(g, "beta", 1))


@step("sigmoid_hard")
def _sigmoid_hard(g: Given) -> Tensor:
    return (_number(g, "alpha", 0.2) * g["x"] + _number(g, "beta", 0.5)).clamp(0, 1)


@step("prelu")
def _prelu(g: Given) -> Tensor:
    return F.prelu(g["x"], g["alpha"])


@step("gelu")
def _gelu(g: Given) -> Tensor:
    mode = str(g.get("mode", "EXACT"))
    if mode == "SIGMOID_APPROXIMATION":
        return torch.sigmoid(1.702 * g["x"]) * g["x"]
    return F.gelu(g["x"], approximate="none" if mode == "EXACT" else "tanh")


@step("softmax")
def _softmax(g: Given) -> Tensor:
    return torch.softmax(g["x"], int(g.get("axis", -1)))


# -- products --------------------------------------------------------------------------------------


@step("linear")
def _linear(g: Given) -> Tensor:
    return F.linear(g["x"], g["weight"], g.get("bias"))


@step("matmul")
def _matmul(g: Given) -> Tensor:
    x, y = g["x"], g["y"]
    x = x.mT if bool(g.get("transpose_x", False)) else x
    return torch.matmul(x, y.mT if bool(g.get("transpose_y", False)) else y)


@step("einsum")
def _einsum(g: Given) -> Tensor:
    return torch.einsum(str(g["equation"]), *g["values"])


@step("scaled_dot_product_attention")
def _attention(g: Given) -> Tensor:
    mask = g.get("attn_mask")
    scores = g["query"] @ g["key"].mT / math.sqrt(g["query"].shape[-1])
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1) @ g["value"]


def _padding(g: Given, sizes: list[int], kernel: list[int], stride: list[int]) -> list[int]:
    """Before and after of every spatial axis."""
    kind = str(g.get("pad_type", "valid"))
    if kind == "custom":
        return ints(g["pad"])
    if kind == "valid":
        return [0] * (2 * len(sizes))
    made = []
    for size, k, s in zip(sizes, kernel, stride, strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        less, more = total // 2, total - total // 2
        made += [more, less] if kind == "same_lower" else [less, more]
    return made


def _for_torch(pairs: list[int]) -> list[int]:
    """torch wants the last axis first."""
    return [p for at in range(len(pairs) - 2, -1, -2) for p in pairs[at : at + 2]]


@step("conv")
def _conv(g: Given) -> Tensor:
    x, weight = g["x"], g["weight"]
    rank = x.dim() - 2
    stride, dilation = (ints(g.get(key, [1] * rank)) for key in ("strides", "dilations"))
    reach = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    pad = _padding(g, list(x.shape[2:]), reach, stride)
    run: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    groups = int(g.get("groups", 1))
    return run(F.pad(x, _for_torch(pad)), weight, g.get("bias"), stride, 0, dilation, groups)


@step("conv_transpose")
def _conv_transpose(g: Given) -> Tensor:
    x, weight = g["x"], g["weight"]
    rank = x.dim() - 2
    stride, dilation = (ints(g.get(key, [1] * rank)) for key in ("strides", "dilations"))
    run: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    groups = int(g.get("groups", 1))
    whole = run(x, weight, g.get("bias"), stride, 0, 0, groups, dilation)
    pad = ints(g["pad"]) if str(g.get("pad_type", "valid")) == "custom" else [0] * (2 * rank)
    wanted = ints(g["output_shape"])[2:] if "output_shape" in g else None
    for axis in range(rank):
        size = whole.shape[2 + axis]
        last = size - pad[2 * axis + 1] if wanted is None else pad[2 * axis] + wanted[axis]
        if last > size:
            whole = F.pad(
                whole,
                _for_torch([0] * (2 * axis) + [0, last - size] + [0] * (2 * (rank - axis - 1))),
            )
        whole = whole.narrow(2 + axis, pad[2 * axis], last - pad[2 * axis])
    return whole


def _pooled(g: Given, fill: float) -> tuple[Tensor, list[int], list[int]]:
    """The input padded as a pool reads it, its windows and steps."""
    x = g["x"]
    kernel = ints(g["kernel_sizes"])
    stride = ints(g.get("strides", [1] * len(kernel)))
    sizes = list(x.shape[2:])
    pad = _padding(g, sizes, kernel, stride)
    if bool(g.get("ceil_mode", False)):
        for at, (size, k, s) in enumerate(zip(sizes, kernel, stride, strict=True)):
            short = -(size + pad[2 * at] + pad[2 * at + 1] - k) % s
            if (
                short
                and (size + sum(pad[2 * at : 2 * at + 2]) - k) // s * s + s < size + pad[2 * at]
            ):
                pad[2 * at + 1] += short
    return F.pad(x, _for_torch(pad), value=fill), kernel, stride


@step("max_pool")
def _max_pool(g: Given) -> Tensor:
    x, kernel, stride = _pooled(g, -math.inf)
    run: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return run(x, kernel, stride)


@step("avg_pool")
def _avg_pool(g: Given) -> Tensor:
    x, kernel, stride = _pooled(g, 0.0)
    run: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    made = run(x, kernel, stride)
    if bool(g.get("exclude_padding_from_average", False)):
        ones, *_ = _pooled({**g, "x": torch.ones_like(g["x"])}, 0.0)
        made = made / run(ones, kernel, stride)
    return made


# -- norms -----------------------------------------------------------------------------------------


def _along(x: Tensor, value: Any, usual: float) -> Any:
    """A number a channel, on axis 1."""
    return usual if value is None else value.reshape(-1, *[1] * (x.dim() - 2))


@step("batch_norm")
def _batch_norm(g: Given) -> Tensor:
    x = g["x"]
    spread = torch.rsqrt(g["variance"] + _number(g, "epsilon", 1e-5))
    normal = (x - _along(x, g["mean"], 0)) * _along(x, spread, 1)
    return normal * _along(x, g.get("gamma"), 1) + _along(x, g.get("beta"), 0)


@step("instance_norm")
def _instance_norm(g: Given) -> Tensor:
    x, axes = g["x"], tuple(range(2, g["x"].dim()))
    spread = torch.rsqrt(x.var(axes, False, keepdim=True) + _number(g, "epsilon", 1e-5))
    normal = (x - x.mean(axes, keepdim=True)) * spread
    return normal * _along(x, g.get("gamma"), 1) + _along(x, g.get("beta"), 0)


@step("layer_norm")
def _layer_norm(g: Given) -> Tensor:
    x = g["x"]
    axes = [a % x.dim() for a in ints(g.get("axes", range(x.dim())))]
    spread = torch.rsqrt(x.var(axes, False, keepdim=True) + _number(g, "epsilon", 1e-5))
    normal = (x - x.mean(axes, keepdim=True)) * spread
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    gamma, beta = (None if g.get(k) is None else g[k].reshape(shape) for k in ("gamma", "beta"))
    normal = normal if gamma is None else normal * gamma
    return normal if beta is None else normal + beta


@step("l2_norm")
def _l2_norm(g: Given) -> Tensor:
    square = g["x"].square().sum((-3, -2, -1), keepdim=True)
    return g["x"] / torch.sqrt(square + _number(g, "epsilon", 1e-6))
