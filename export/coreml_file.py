"""A Core ML package read back from its bytes: what its program holds and does.

A `.mlpackage` is a directory: `Manifest.json`, a model in protobuf, whose ML program ("MIL") is a
list of operations on named values, and `weight.bin` with the large constants. That file begins with
64 bytes (a count, a version); every constant has 64 of its own (a mark, a type, bytes, where they
are, padding bits), on multiples of 64. Read here by code of our own, so that what coremltools wrote
is not checked by what wrote it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchprune.errors import ExportError

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")

_MARK = 0xDEADBEEF
_DTYPES: dict[int, Any] = {
    1: np.bool_,
    2: str,
    10: np.float16,
    11: np.float32,
    12: np.float64,
    21: np.int8,
    22: np.int16,
    23: np.int32,
    24: np.int64,
    31: np.uint8,
    32: np.uint16,
    33: np.uint32,
    34: np.uint64,
    37: np.uint8,  # one bit each in the file
}
"""numpy's types by the numbers of MIL's."""

_BITS = 37
_BLOBS = {1: 10, 2: 11, 3: 31, 4: 21, 6: 22, 7: 32, 9: _BITS, 14: 23, 15: 33}
"""Types in `weight.bin` by their own numbers, as MIL's."""


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        inputs: by parameter, names of values, several where it takes a list, or arrays.
        outputs: names and types of what it gives; a type that no array has is None.
    """

    kind: str
    inputs: dict[str, list[Any]]
    outputs: list[tuple[str, Any]]


@dataclass(frozen=True)
class MLProgram:
    """A program: inputs and states by name with type and shape, its steps, names of its outputs."""

    inputs: dict[str, tuple[Any, tuple[int, ...]]]
    states: dict[str, tuple[Any, tuple[int, ...]]]
    steps: list[Step]
    outputs: list[str]
    version: int


@dataclass(frozen=True)
class Constant:
    """An array that a program computes with, and for a sparse one the mask that the file holds."""

    name: str
    array: Any
    mask: Any


def read_package(path: Path) -> MLProgram:
    """Read a package that holds one ML program.

    Raises:
        ExportError: it is none, or damaged.
    """
    from coremltools import proto

    try:
        model = proto.Model_pb2.Model()
        model.ParseFromString((path / MODEL).read_bytes())
        weights = path / WEIGHTS
        blobs: Any = (
            np.memmap(weights, np.uint8, "r") if weights.is_file() else np.zeros(0, np.uint8)
        )
        function = model.mlProgram.functions["main"]
        block = function.block_specializations[function.opset]
        given = [(v.name, v.type) for v in function.inputs]
        return MLProgram(
            {n: _tensor(t.tensorType) for n, t in given if t.WhichOneof("type") == "tensorType"},
            {
                n: _tensor(t.stateType.wrappedType.tensorType)
                for n, t in given
                if t.WhichOneof("type") == "stateType"
            },
            [_step(operation, blobs) for operation in block.operations],
            list(block.outputs),
            model.specificationVersion,
        )
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"this is no whole package of an ML program: {error}") from error


def constants_of(program: MLProgram) -> Iterator[Constant]:
    """The constants that are no part of another."""
    known: dict[str, list[Any]] = {}
    read = {name for step in program.steps if is_constexpr(step) for name in _names(step)}
    for step in program.steps:
        if step.kind == "const":
            known[step.outputs[0][0]] = [step.inputs["val"][0]]
        elif is_constexpr(step):
            for (name, _), value in zip(step.outputs, unpacked(step, known), strict=True):
                known[name] = [value]
        else:
            continue
        name = step.outputs[0][0]
        if name not in read:
            sparse = step.kind == "constexpr_sparse_to_dense"
            mask = _mask_of(_arrays(step, known), name) if sparse else None
            yield Constant(name, known[name][0], mask)


def is_constexpr(step: Step) -> bool:
    """Whether a step unpacks a constant."""
    return step.kind.startswith("constexpr_")


def unpacked(step: Step, known: Mapping[str, list[Any]]) -> list[Any]:
    """What a step gives that unpacks a constant.

    Raises:
        ExportError: its parts contradict each other, or it is of another kind than those we write.
    """
    given = _arrays(step, known)
    name = step.outputs[0][0]
    if step.kind == "constexpr_sparse_to_dense":
        mask = _mask_of(given, name)
        values = given["nonzero_data"]
        if int(mask.sum()) != values.size:
            raise ExportError(f"{name}: {values.size} values for {int(mask.sum())} set bits")
        dense = np.zeros(mask.shape, values.dtype)
        dense[mask] = values
        return [dense]
    if step.kind == "constexpr_sparse_blockwise_shift_scale":
        mask, codes, scale = given["data_mask"] != 0, given["nonzero_data"], given["scale"]
        scales = np.broadcast_to(scale, mask.shape)[mask]
        return [given["data_mask"], codes.astype(scale.dtype) * scales]
    raise ExportError(f"{name}: {step.kind} is no form that is written here")


def _arrays(step: Step, known: Mapping[str, list[Any]]) -> dict[str, Any]:
    return {
        key: known[values[0]][0] if isinstance(values[0], str) else values[0]
        for key, values in step.inputs.items()
    }


def _mask_of(given: Mapping[str, Any], name: str) -> Any:
    if "shape" not in given:  # iOS 18: one element a weight
        return given["mask"] != 0
    shape = tuple(int(size) for size in given["shape"])
    count, bits = int(np.prod(shape)), np.unpackbits(given["mask"], bitorder="little")
    if given["mask"].size != -(-count // 8) or bits[count:].any():
        raise ExportError(f"{name}: a mask of {given['mask'].size} bytes for {count} weights")
    return bits[:count].astype(bool).reshape(shape)


def _names(step: Step) -> list[str]:
    return [v for values in step.inputs.values() for v in values if isinstance(v, str)]


def _step(operation: Any, blobs: Any) -> Step:
    inputs: dict[str, list[Any]] = {}
    for key, argument in operation.inputs.items():
        inputs[key] = [
            _value(bound.value, blobs) if bound.WhichOneof("binding") == "value" else bound.name
            for bound in argument.arguments
        ]
    for key, value in operation.attributes.items():
        if key != "name":
            inputs[key] = [_value(value, blobs)]
    outputs = [(v.name, _dtype_of(v.type)) for v in operation.outputs]
    if operation.blocks:
        raise ExportError(f"{operation.type}: steps within steps cannot be read here")
    return Step(operation.type, inputs, outputs)


def _tensor(kind: Any) -> tuple[Any, tuple[int, ...]]:
    """numpy's type and the shape; a size that varies is -1."""
    sizes = (d.constant.size if d.HasField("constant") else -1 for d in kind.dimensions)
    return _DTYPES.get(kind.dataType), tuple(sizes)


def _dtype_of(kind: Any) -> Any:
    return _tensor(kind.tensorType)[0] if kind.WhichOneof("type") == "tensorType" else None


def _value(value: Any, blobs: Any) -> Any:
    if value.WhichOneof("value") == "blobFileValue":
        return _blob(value, blobs)
    immediate = value.immediateValue
    if immediate.WhichOneof("value") == "list":
        return np.array([_value(item, blobs).item() for item in immediate.list.values])
    tensor = immediate.tensor
    dtype, shape = _tensor(value.type.tensorType)
    field = tensor.WhichOneof("value")
    held = getattr(tensor, field).values
    if field == "strings":
        return np.array(list(held)).reshape(shape)
    if field == "bytes":
        return np.frombuffer(held, dtype).reshape(shape)
    return np.array(list(held), dtype).reshape(shape)


def _blob(value: Any, blobs: Any) -> Any:
    """An array that lies in `weight.bin`."""
    kind, at = value.type.tensorType, int(value.blobFileValue.offset)
    dtype, shape = _tensor(kind)
    mark, found, size, start, spare = struct.unpack("<IIQQQ", bytes(blobs[at : at + 32]))
    count = int(np.prod(shape))
    bits = _BLOBS.get(found) == _BITS
    wanted = -(-count // 8) if bits else count * np.dtype(dtype).itemsize
    if mark != _MARK or _BLOBS.get(found) != kind.dataType or size != wanted:
        raise ExportError(f"weight.bin at {at}: {size} bytes of type {found}, expected {wanted}")
    held = blobs[start : start + size]
    if held.size != size or (bits and spare != -count % 8):
        raise ExportError(f"weight.bin at {at}: the file ends too early")
    if bits:
        return np.unpackbits(held, count=count, bitorder="little").reshape(shape)
    return held.view(dtype).reshape(shape)
