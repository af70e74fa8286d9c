"""Initialisers as bits and nonzeros, which stock ONNX operators unpack when a session loads.

A weight W of n elements becomes `bits`, one a weight, least significant first as
`torchprune.masking.packing` orders them, and `values`, its nonzeros, row-major:

    mask   = Reshape(Gather(table, Cast(bits)))         one byte a weight: whether it is not zero
    places = Compress(count, mask)                      where its nonzeros are
    weight = Reshape(ScatterElements(zeros, places, values))

The values of a bfloat16 weight, of which a `Cast` makes float32, have that `Cast` behind them.
`table` has the eight bits of each of the 256 bytes, `count` the numbers from zero on, `zeros` as
many zeros as the weight has elements. All inputs are constant, so a runtime that folds constants
does this once, at load, and then runs the dense graph. ONNX Runtime folds only what it knows the
size of beforehand, so the file says how many places there are.

Folding holds about nine bytes for every weight beside the result: large weights are unpacked in
pieces, large models in stages, see `unpacking_stages`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from torchprune.export.unpacking_stages import Stages, constant, then

PIECE = 1 << 23
"""Weights unpacked by one chain of operators; whole bytes of bits."""

LARGEST = 1 << 30
"""Bytes of a weight above which it stays dense: ONNX Runtime folds nothing that is larger."""

CHAIN, SHARED = 600, 2500
"""Most bytes of the operators and names of one piece, but for six times its name; and of what all
pieces share."""

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8)

_NARROW = ir.DataType.BFLOAT16.numpy()

_TABLE = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(bool)


@dataclass(frozen=True)
class PackedWeight:
    """One initialiser that was packed: bytes of its numbers before and after."""

    name: str
    before: int
    after: int


def pack_initializers(model: ir.Model, min_sparsity: float) -> list[PackedWeight]:
    """Pack the float and int8 initialisers that are smaller so, in place.

    Those are weights, of two axes or more, with at least `min_sparsity` zeros, whose bits,
    nonzeros and operators take fewer bytes than they do; none where all together save less than
    what they share.

    The law: what the operators give is the weight, bit for bit, but that -0.0 becomes 0.0.
    """
    graph, packed, saved = model.graph, [], 0
    chosen: list[ir.Value] = []
    for value in graph.initializers.values():
        gain = _saved(value, min_sparsity)
        if gain > 0:
            chosen.append(value)
            saved += gain
    if saved <= SHARED:
        return []
    chains = _Chains(graph, chosen)
    for value in chosen:
        tensor, read = value.const_value, _read_of(value)
        assert tensor is not None
        assert read is not None
        nodes, after = chains.unpacked(str(value.name), tensor.numpy())
        whole = nodes[-1].outputs[0]
        whole.dtype = value.dtype if read is value else ir.DataType.FLOAT
        whole.shape = value.shape
        ir.convenience.replace_all_uses_with(read, whole)
        if (cast := read.producer()) is not None:
            graph.remove(cast, safe=True)
        graph.initializers.pop(str(value.name))
        chains.nodes += nodes
        packed.append(PackedWeight(str(value.name), tensor.nbytes, after))
    graph.insert_before(graph[0], chains.nodes)
    return packed


def _saved(value: ir.Value, min_sparsity: float) -> int:
    """Bytes that packing a value saves in the file, at least; 0 for what is not to be packed."""
    tensor = value.const_value
    if tensor is None or _read_of(value) is None or len(tensor.shape) < 2:
        return 0  # no weight: scales, zero points, norms
    size, least = int(tensor.size), -(-int(tensor.size) // 8)
    if not least + CHAIN < tensor.nbytes <= LARGEST:
        return 0
    nonzeros = int(np.count_nonzero(tensor.numpy()))
    if nonzeros > (1 - min_sparsity) * size:
        return 0
    operators = -(-size // PIECE) * (CHAIN + 6 * len(str(value.name)))
    return tensor.nbytes - least - nonzeros * tensor.dtype.itemsize - operators


def _read_of(value: ir.Value) -> ir.Value | None:
    """What a graph reads of a weight: itself, or float32 that a `Cast` makes of bfloat16; None of
    what is not to be packed."""
    dtype = None if value.const_value is None else value.const_value.dtype
    if dtype != ir.DataType.BFLOAT16:
        return value if dtype in _DTYPES else None
    users = value.consumers()
    if len(users) != 1 or users[0].op_type != "Cast" or value.is_graph_output():
        return None
    to_float = users[0].attributes.get_int("to", 0) == ir.DataType.FLOAT
    return users[0].outputs[0] if to_float else None


class _Chains:
    """The operators that unpack some weights of a graph, and the constants that they share."""

    def __init__(self, graph: ir.Graph, weights: list[ir.Value]) -> None:
        self._graph = graph
        self.nodes: list[ir.Node] = []
        sizes = [int(value.const_value.size) for value in weights if value.const_value is not None]
        self._stages, self._done = Stages(graph, sum(sizes)), 0
        self._zeros: dict[Any, ir.Value] = {}
        longest = 8 * -(-min(max(sizes), PIECE) // 8)
        self._table = constant(graph, "torchprune.table", _TABLE)
        self._line = constant(graph, "torchprune.line", np.array([-1], np.int64))
        bounds = [np.array(n, np.int32) for n in (0, longest, 1)]
        names = [f"torchprune.{name}" for name in ("first", "end", "step")]
        self._count = then(
            self.nodes, "Range", *(constant(graph, *one) for one in zip(names, bounds, strict=True))
        )

    def unpacked(self, name: str, weight: Any) -> tuple[list[ir.Node], int]:
        """The nodes that make a weight, the last of which gives it, and the bytes they read."""
        nodes: list[ir.Node] = []
        flat, found, size = weight.reshape(-1), [], 0
        for at, piece in enumerate(_cut(flat)):
            label = name if flat.size <= PIECE else f"{name}.{at}"
            made, read = self._piece(label, piece, nodes)
            found.append(made)
            size += read
        whole = found[0] if len(found) == 1 else then(nodes, "Concat", *found, axis=0)
        shape = constant(self._graph, f"{name}.shape", np.array(weight.shape, np.int64))
        then(nodes, "Reshape", whole, shape)
        return nodes, size

    def _piece(self, name: str, flat: Any, nodes: list[ir.Node]) -> tuple[ir.Value, int]:
        kept = flat != 0
        packed, nonzeros = np.packbits(kept, bitorder="little"), flat[kept]
        bits = constant(self._graph, f"{name}.bits", packed)
        values = constant(self._graph, f"{name}.values", nonzeros)
        if flat.dtype == _NARROW:
            values = then(nodes, "Cast", values, to=ir.DataType.FLOAT)
        gate = self._stages.open(self._done, nodes)
        self._done += flat.size
        zeros = self._zeros_of(flat, gate, nodes)
        known = bits if gate is None else then(nodes, "Expand", bits, gate)
        byte = then(nodes, "Cast", known, to=ir.DataType.INT32)
        mask = then(nodes, "Reshape", then(nodes, "Gather", self._table, byte), self._line)
        places = then(nodes, "Compress", self._count, mask)
        places.dtype, places.shape = ir.DataType.INT32, ir.Shape([nonzeros.size])
        made = then(nodes, "ScatterElements", zeros, places, values, axis=0)
        return made, packed.nbytes + nonzeros.nbytes

    def _zeros_of(self, flat: Any, gate: ir.Value | None, nodes: list[ir.Node]) -> ir.Value:
        """As many zeros as a piece has weights, for all pieces like it in its stage."""
        dtype = np.dtype(np.float32) if flat.dtype == _NARROW else flat.dtype
        key = flat.size, dtype, gate
        if key not in self._zeros:
            name = f"torchprune.size.{flat.size}"
            size = self._graph.initializers.get(name)
            if size is None:
                size = constant(self._graph, name, np.array([flat.size], np.int64))
            many = size if gate is None else then(nodes, "Mul", size, gate)
            zero = ir.tensor(np.zeros(1, dtype))
            self._zeros[key] = then(nodes, "ConstantOfShape", many, value=zero)
        return self._zeros[key]


def _cut(flat: Any) -> Iterator[Any]:
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE]
