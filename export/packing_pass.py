"""Initialisers as bits and nonzeros, which stock ONNX operators unpack when a session loads.

A weight W of n elements becomes `bits`, one a weight, least significant first as
`torchprune.masking.packing` orders them, and `values`, a zero and then its nonzeros, row-major:

    before = CumSum(Gather(counts, bits))              one number a byte: nonzeros before its bits
    place  = Max(Gather(places, bits) + before, 0)     one a weight: where its value is, or 0
    weight = Reshape(Gather(values, place))

`counts` and `places` are tables over the 256 bytes: how many bits of one are set, and for each of
its eight bits how many are set up to it, or a number far below zero if it is not. All inputs are
constant, so a runtime that folds constants does this once, at load, and then runs the dense graph.
Large weights are unpacked in pieces: folding holds a few int32 numbers for every weight of a piece,
and runtimes refuse to fold what takes a gigabyte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

PIECE = 1 << 23
"""Weights unpacked by one chain of operators; whole bytes of bits."""

SMALLEST = 1024
"""Weights below which packing saves nothing worth a chain of operators."""

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8)

_BITS = np.arange(256)[:, None] >> np.arange(8) & 1

_TABLES = {
    "counts": _BITS.sum(1).astype(np.int32),
    "places": np.where(_BITS, _BITS.cumsum(1), -(1 << 30)).astype(np.int32),
    "zero": np.array(0, np.int32),
}


@dataclass(frozen=True)
class PackedWeight:
    """One initialiser that was packed: its size before and after, in bytes."""

    name: str
    before: int
    after: int


def pack_initializers(model: ir.Model, min_sparsity: float) -> list[PackedWeight]:
    """Pack every float or int8 initialiser with at least this share of zeros, in place.

    The law: what the operators give is the weight, bit for bit, but that -0.0 becomes 0.0.
    """
    graph, packed = model.graph, []
    shared = _Shared(graph)
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _DTYPES or tensor.size < SMALLEST:
            continue
        if len(tensor.shape) < 2:  # scales, zero points, norms
            continue
        weight = tensor.numpy()
        if np.count_nonzero(weight) > (1 - min_sparsity) * weight.size:
            continue
        nodes, after = _unpacked(value.name, weight, graph, shared)
        whole = nodes[-1].outputs[0]
        whole.dtype, whole.shape = value.dtype, value.shape
        ir.convenience.replace_all_uses_with(value, whole)
        graph.initializers.pop(value.name)
        graph.insert_before(graph[0], nodes)
        packed.append(PackedWeight(str(value.name), weight.nbytes, after))
    return packed


class _Shared:
    """Constants that all chains use, added to the graph when first asked for."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._found: dict[str, ir.Value] = {}

    def get(self, name: str, array: Any) -> ir.Value:
        if name not in self._found:
            self._found[name] = _constant(self._graph, f"torchprune.{name}", array)
        return self._found[name]


def _constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
    )
    graph.register_initializer(value)
    return value


def _unpacked(
    name: str | None, weight: Any, graph: ir.Graph, shared: _Shared
) -> tuple[list[ir.Node], int]:
    """The nodes that make a weight, the last of which gives it, and the bytes they read."""
    flat, nodes, pieces, size = weight.reshape(-1), [], [], 0
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        label = name if flat.size <= PIECE else f"{name}.{start // PIECE}"
        made, read = _piece(str(label), piece, graph, shared)
        nodes += made
        pieces.append(made[-1].outputs[0])
        size += read
    if len(pieces) > 1:
        nodes.append(ir.node("Concat", pieces, {"axis": 0}))
    if flat.size % 8:
        line, begin, end = (
            shared.get(f"{key}.{at}", np.array([at], np.int64))
            for key, at in (("line", -1), ("start", 0), ("end", flat.size))
        )
        nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], line]))
        nodes.append(ir.node("Slice", [nodes[-1].outputs[0], begin, end]))
    shape = _constant(graph, f"{name}.shape", np.array(weight.shape, np.int64))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape]))
    return nodes, size


def _piece(name: str, flat: Any, graph: ir.Graph, shared: _Shared) -> tuple[list[ir.Node], int]:
    kept = flat != 0
    packed = np.packbits(kept, bitorder="little")
    nonzeros = np.concatenate([np.zeros(1, flat.dtype), flat[kept]])
    bits = _constant(graph, f"{name}.bits", packed)
    values = _constant(graph, f"{name}.values", nonzeros)
    nodes: list[ir.Node] = []

    def then(operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(operator, inputs, attributes))
        return nodes[-1].outputs[0]

    counts, places, zero = (shared.get(key, table) for key, table in _TABLES.items())
    axis = shared.get("axis", np.array(0, np.int64))
    column = shared.get("column", np.array([-1, 1], np.int64))
    byte = then("Cast", bits, to=ir.DataType.INT32)
    before = then("CumSum", then("Gather", counts, byte), axis, exclusive=1)
    signed = then("Add", then("Gather", places, byte), then("Reshape", before, column))
    then("Gather", values, then("Max", signed, zero))
    return nodes, packed.nbytes + nonzeros.nbytes
