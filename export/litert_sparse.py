"""Weights of a LiteRT flatbuffer as their nonzeros and where those are.

A weight with enough zeros becomes a sparse tensor, dense along all axes but the last, which is
compressed as in CSR, and `DENSIFY`, which makes the dense one that the graph reads:

    segments[row], segments[row + 1]   where a row's nonzeros are, a row for all axes but the last
    indices                            the place of each on the last axis

Interpreters unpack it when they load the file; XNNPACK takes from it that it may leave zeros out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

_IDENTIFIER = b"TFL3"


@dataclass(frozen=True)
class SparseWeight:
    """One weight that was packed.

    Attributes:
        name: of its tensor in the graph.
        dense: the weight as the graph reads it: outputs first, inputs last.
        before, after: its bytes.
    """

    name: str
    dense: Any
    before: int
    after: int


def read_model(content: bytes) -> Any:
    """A flatbuffer as objects."""
    return schema.ModelT.InitFromPackedBuf(content, 0)


def written_model(model: Any) -> bytes:
    """Objects as a flatbuffer."""
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())


def skippable_share(model: Any) -> float:
    """Share of zeros among the weights that XNNPACK counts before it leaves any out: those of 1x1
    convolutions and fully connected layers."""
    zeros = total = 0
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex].builtinCode
            if code not in (schema.BuiltinOperator.CONV_2D, schema.BuiltinOperator.FULLY_CONNECTED):
                continue
            weight = _weight(model, graph.tensors[operator.inputs[1]])
            if weight is not None and (weight.ndim == 2 or weight.shape[1:3] == (1, 1)):
                zeros, total = zeros + int((weight == 0).sum()), total + weight.size
    return zeros / total if total else 0.0


def pack_weights(model: Any, min_sparsity: float) -> list[SparseWeight]:
    """Pack the float32 weights with at least this share of zeros, where it makes them smaller.

    The law: `DENSIFY` gives the weight, bit for bit, but that -0.0 becomes 0.0.
    """
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.DENSIFY
    code.version = 1
    place, found = len(model.operatorCodes), []
    for graph in model.subgraphs:
        read, new = [int(at) for operator in graph.operators for at in operator.inputs], []
        for at in dict.fromkeys(read):
            packed = None if at < 0 else _packed(model, graph.tensors[at], min_sparsity)
            if packed is None:
                continue
            tensor, weight, size = packed
            graph.tensors.append(tensor)
            graph.tensors[at].buffer = 0  # by convention the empty one
            new.append(_densify(place, len(graph.tensors) - 1, at))
            found.append(SparseWeight(_text(tensor.name), weight, weight.nbytes, size))
        graph.operators = [*new, *graph.operators]
    if found:
        model.operatorCodes.append(code)
        _drop_unread(model)
    return found


def _packed(model: Any, tensor: Any, min_sparsity: float) -> tuple[Any, Any, int] | None:
    """A sparse tensor of the same weight, the weight, and the bytes it takes; None if it stays."""
    weight = _weight(model, tensor)
    if weight is None:
        return None
    rows = weight.reshape(-1, weight.shape[-1])
    kept = rows != 0
    if np.count_nonzero(kept) > (1 - min_sparsity) * kept.size:
        return None
    segments = np.concatenate([[0], kept.sum(1).cumsum()])
    indices, values = kept.nonzero()[1], rows[kept]
    size = sum(_narrow(part).nbytes for part in (segments, indices)) + values.nbytes
    if size >= weight.nbytes:
        return None
    sparse = schema.TensorT()
    sparse.shape, sparse.type, sparse.name = tensor.shape, tensor.type, tensor.name
    sparse.shapeSignature, sparse.hasRank = tensor.shapeSignature, tensor.hasRank
    sparse.sparsity = _parameters(weight.shape, segments, indices)
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(values.tobytes(), np.uint8)
    sparse.buffer = len(model.buffers)
    model.buffers.append(buffer)
    return sparse, weight, size


def _weight(model: Any, tensor: Any) -> Any:
    """The numbers of a dense float32 constant of two axes or more, or None if it is none."""
    held = model.buffers[tensor.buffer].data
    if held is None or not len(held) or tensor.type != schema.TensorType.FLOAT32:
        return None
    if tensor.sparsity is not None or tensor.shape is None or len(tensor.shape) < 2:
        return None
    flat = np.frombuffer(np.asarray(held, np.uint8).tobytes(), np.float32)
    return flat.reshape([int(size) for size in tensor.shape])


def _parameters(shape: tuple[int, ...], segments: Any, indices: Any) -> Any:
    made = schema.SparsityParametersT()
    made.traversalOrder = list(range(len(shape)))
    made.dimMetadata = []
    for size in shape[:-1]:
        dense = schema.DimensionMetadataT()
        dense.format, dense.denseSize = schema.DimensionType.DENSE, size
        made.dimMetadata.append(dense)
    last = schema.DimensionMetadataT()
    last.format = schema.DimensionType.SPARSE_CSR
    last.arraySegmentsType, last.arraySegments = _vector(segments)
    last.arrayIndicesType, last.arrayIndices = _vector(indices)
    made.dimMetadata.append(last)
    return made


def _vector(numbers: Any) -> tuple[int, Any]:
    """Whole numbers in the narrowest vector that holds them, and what kind it is."""
    narrow = _narrow(numbers)
    name = {1: "Uint8Vector", 2: "Uint16Vector", 4: "Int32Vector"}[narrow.itemsize]
    made = getattr(schema, f"{name}T")()
    made.values = narrow
    return getattr(schema.SparseIndexVector, name), made


def _narrow(numbers: Any) -> Any:
    most = int(numbers.max(initial=0))
    return numbers.astype(np.uint8 if most < 1 << 8 else np.uint16 if most < 1 << 16 else np.int32)


def _densify(code: int, source: int, target: int) -> Any:
    made = schema.OperatorT()
    made.opcodeIndex = code
    made.inputs, made.outputs = np.array([source], np.int32), np.array([target], np.int32)
    return made


def _drop_unread(model: Any) -> None:
    """Empty the buffers that no tensor and no metadata names any more."""
    read = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    read |= {entry.buffer for entry in model.metadata or ()}
    for at, buffer in enumerate(model.buffers):
        if at not in read:
            buffer.data = None


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def name_ends(model: Any, inputs: list[str], outputs: list[str] | None) -> None:
    """Name a signature's inputs and outputs, which are `args_N` and `output_N`, by their places."""
    for signature in model.signatureDefs or ():
        for maps, begin, names in (
            (signature.inputs, "args_", inputs),
            (signature.outputs, "output_", outputs),
        ):
            for entry in maps if names is not None else ():
                entry.name = names[int(_text(entry.name).removeprefix(begin))]
