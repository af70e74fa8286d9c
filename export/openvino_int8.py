"""int8 for OpenVINO: weights and activations in eight bits, zeros still zero, and where it leaves
zeros out.

OpenVINO takes eight bits where a graph says `FakeQuantize` on both sides of a product. Weights are
symmetric, one scale for each output; activations have one range each, seen on the example.

Of sparse weights its CPU plugin knows one use, "sparse weights decompression": int8 weights whose
sides are multiples of 64, at least so many of them zero as a property says that is set when the
graph is compiled (`CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE`; no file can say it), on processors with
AMX. Then nonzeros are read from memory and unpacked on the way.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchprune.errors import ExportError

RATE = 0.4
"""The share of zeros from which sparse weights are asked for: some less than 2:4's half."""

SPARSE = {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": RATE}
"""What a graph is compiled with to that end."""

_SCALED = "{}/int8"
"""What a weight's bytes times their scales are called."""

COARSE = 0.3
"""What a step of eight bits may be, of the root mean square of what is rounded: beyond, outliers
would leave little but themselves."""

_SIDE = 64
"""What the sides of such a weight must be multiples of."""

_OUTPUTS = {"MatMul": (0,), "Convolution": (0,), "GroupConvolution": (0, 1)}
"""Which axes of a weight are those of outputs, by the type of what multiplies by it."""


@dataclass(frozen=True)
class Quantized:
    """A product in eight bits.

    Attributes:
        name: of its weight.
        sides: of the weight.
        zeros: share of it that is zero.
        fit: whether OpenVINO can leave its zeros out, on a processor that lets it.
    """

    name: str
    sides: tuple[int, ...]
    zeros: float
    fit: bool


def quantize(
    model: Any, runs: Iterable[Sequence[np.ndarray]], ignore: Sequence[str]
) -> tuple[list[Quantized], list[str]]:
    """Put weights and activations of all products with a weight into eight bits, in place.

    Args:
        model: an `openvino.Model` in float32, as it was read, where weights have their names.
        runs: inputs to read activations' ranges from.
        ignore: globs over names of weights that stay floating point.

    Returns:
        what was quantized, and the names of weights that were not, as what they multiply has such
        outliers that steps of their range are too coarse for the rest.

    Raises:
        ExportError: a glob that fits no weight, nothing to quantize, no run, or a zero that did not
            stay.
    """
    from openvino import opset13 as ops
    from openvino._offline_transformations import (
        apply_moc_transformations,
        compress_quantize_weights_transformation,
    )

    products = _products(model)
    names = [_weight(node).get_friendly_name() for node in products]
    for glob in ignore:
        if not fnmatch.filter(names, glob):
            raise ExportError(f"int8_ignore: {glob!r} fits none of {', '.join(names[:4])}…")
    chosen = [
        node
        for node, name in zip(products, names, strict=True)
        if not any(fnmatch.fnmatch(name, glob) for glob in ignore)
    ]
    if not chosen:
        raise ExportError("int8: there is no product with a weight to quantize")
    ranges = _ranges(model, runs)
    coarse = {key for key, seen in ranges.items() if seen.step > COARSE * seen.usual}
    fine = [node for node in chosen if _key(node.input(0).get_source_output()) not in coarse]
    left = [_weight(node).get_friendly_name() for node in chosen if node not in fine]
    if not fine:
        raise ExportError(
            "int8: what every product reads has outliers, beside which eight bits leave nothing"
        )
    rounded: dict[Any, Any] = {}
    weights: dict[str, np.ndarray] = {}
    for node in fine:
        source = node.input(0).get_source_output()
        key = _key(source)
        if key not in rounded:
            low, high = (ops.constant(np.float32(x)) for x in (ranges[key].low, ranges[key].high))
            rounded[key] = ops.fake_quantize(source, low, high, low, high, 256).output(0)
        node.input(0).replace_source_output(rounded[key])
        held = node.input(1).get_source_output()
        if (name := _weight(node).get_friendly_name()) not in weights:
            weights[name] = _weight(node).data.copy()
            scale = _scale(node, weights[name])
            low, high = ops.constant(-scale), ops.constant(scale)
            made = ops.fake_quantize(held, low, high, low, high, 255)
            made.set_friendly_name(_SCALED.format(name))
            rounded[_key(held)] = made.output(0)
        node.input(1).replace_source_output(rounded[_key(held)])
    apply_moc_transformations(model, cf=False)
    compress_quantize_weights_transformation(model)
    _check_zeros(model, weights)
    return [_told(name, weight) for name, weight in weights.items()], left


def _products(model: Any) -> list[Any]:
    """What multiplies by a weight, in the graph's order."""
    return [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() in _OUTPUTS
        and _weight(node).get_type_name() == "Constant"
        and _weight(node).get_element_type().get_type_name() == "f32"
        and (node.get_type_name() != "MatMul" or len(_weight(node).shape) == 2)
    ]


def _weight(node: Any) -> Any:
    return node.input(1).get_source_output().get_node()


def _key(output: Any) -> tuple[str, int]:
    return output.get_node().get_name(), output.get_index()


def _scale(node: Any, weight: np.ndarray) -> np.ndarray:
    """(outputs.., 1..) float32: the largest weight of each output; 1 where all are zero."""
    axes: tuple[int, ...] = _OUTPUTS[node.get_type_name()]
    if node.get_type_name() == "MatMul" and not node.get_attributes()["transpose_b"]:
        axes = (1,)
    others = tuple(axis for axis in range(weight.ndim) if axis not in axes)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    return np.where(largest > 0, largest, 1).astype(np.float32)


@dataclass(frozen=True)
class _Seen:
    """What a product reads: least and largest, zero among them, and the root mean square."""

    low: float
    high: float
    usual: float

    @property
    def step(self) -> float:
        """Of eight bits over the range."""
        return (self.high - self.low) / 255


def _ranges(model: Any, runs: Iterable[Sequence[np.ndarray]]) -> dict[tuple[str, int], _Seen]:
    """What each product reads."""
    import openvino
    from openvino import opset13 as ops

    sources = {_key(s): s for n in _products(model) for s in [n.input(0).get_source_output()]}
    ends = []
    for source in sources.values():
        axes = np.arange(len(source.get_partial_shape()))
        ends += [
            ops.reduce_min(source, axes, keep_dims=False),
            ops.reduce_max(source, axes, keep_dims=False),
            ops.reduce_mean(ops.multiply(source, source), axes, keep_dims=False),
        ]
    watched = openvino.Model([ops.result(end) for end in ends], model.get_parameters(), "ranges")
    compiled = openvino.Core().compile_model(watched, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    seen = np.array([[float(x) for x in compiled(list(run)).to_tuple()] for run in runs])
    if not len(seen):
        raise ExportError("int8: there is no batch in data to read ranges from")
    found = {}
    for index, key in enumerate(sources):
        some = seen[:, 3 * index : 3 * index + 3]
        low, high = min(0.0, float(some[:, 0].min())), max(0.0, float(some[:, 1].max()))
        if high <= low:  # zeros alone
            high = 1.0
            some = np.ones_like(some)
        found[key] = _Seen(low, high, float(np.sqrt(some[:, 2].mean())))
    return found


def _check_zeros(model: Any, weights: dict[str, np.ndarray]) -> None:
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    for name, weight in weights.items():
        node = nodes.get(_SCALED.format(name))
        while node is not None and node.get_type_name() in ("Multiply", "Convert"):
            node = node.input(0).get_source_output().get_node()
        if node is None or node.get_type_name() != "Constant" or node.data.dtype != np.int8:
            raise ExportError(f"int8: OpenVINO did not quantize {name}; name it in int8_ignore")
        turned = [x for x in (node.data, node.data.T) if x.shape == weight.shape]
        if all(np.any(x[weight == 0]) for x in turned):
            raise ExportError(f"int8: zeros of {name} did not stay zero")


def _told(name: str, weight: np.ndarray) -> Quantized:
    zeros = float((weight == 0).mean())
    whole = weight.ndim == 2 and not any(side % _SIDE for side in weight.shape)
    return Quantized(name, weight.shape, zeros, whole and zeros >= RATE)
