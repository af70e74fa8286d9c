"""The weights in an ONNX file, those packed as bits and nonzeros unpacked, by their names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprune.errors import CheckpointError, LoweringError
from torchprune.lowering.bitmask import Bitmask
from torchprune.lowering.packed_names import weight_names
from torchprune.study.proofs.proof import Breaches

_PACKED = re.compile(r"(.+)\.bits")
_PIECE = re.compile(r"(.+)\.(\d+)")
MOST = 1 << 34
"""Elements of the largest weight that is unpacked."""


@dataclass(frozen=True, eq=False)
class GraphWeight:
    """One weight of a graph: its name there, its values, and whether it lay packed."""

    name: str
    value: Tensor
    packed: bool


@dataclass(frozen=True, eq=False)
class GraphFile:
    """What a file says of its weights.

    Attributes:
        constants: by name, as the file has them.
        products: of operators of ours: the names of bits, values, starts and perhaps scales, and
            how many columns there are.
    """

    constants: Mapping[str, Any]
    products: Mapping[tuple[str, ...], int]


def read_graph(path: Path) -> GraphFile:
    """The constants of a graph, and which of them its products read packed.

    Raises:
        CheckpointError: it is no ONNX file, or damaged.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=True)
    except Exception as error:  # protobuf and onnx have errors of many kinds
        raise CheckpointError(f"{path.name}: no ONNX file, or damaged ({error!s:.200})") from None
    products = {}
    for node in _nodes_of(model.graph):
        first = {"BitmaskLinear": 1, "BitmaskUnpack": 0}.get(node.op_type)
        if node.domain == "torchprune" and first is not None and len(node.input) > first + 2:
            (cols,) = [a.i for a in node.attribute if a.name == "cols"] or [-1]
            products[tuple(n for n in node.input[first : first + 4] if n)] = cols
    return GraphFile({tensor.name: tensor for tensor in model.graph.initializer}, products)


def _nodes_of(graph: Any) -> Iterator[Any]:
    """All nodes, those of branches too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes_of(attribute.g)


def weights_in(graph: GraphFile) -> Iterator[GraphWeight]:
    """Every weight of two or more axes.

    Raises:
        CheckpointError: bits and values of one disagree.
    """
    read: set[str] = set()
    for name, (names, cols) in zip(
        weight_names(graph.products), graph.products.items(), strict=True
    ):
        read.update(names)
        yield GraphWeight(name, _multiplied(name, names, cols, graph.constants), True)
    constants = {n: constant for n, constant in graph.constants.items() if n not in read}
    packed: dict[str, list[str]] = {}
    for name in constants:
        if (found := _PACKED.fullmatch(name)) and f"{found[1]}.values" in constants:
            stem = found[1]
            piece = _PIECE.fullmatch(stem)
            whole = piece[1] if piece and f"{piece[1]}.shape" in constants else stem
            packed.setdefault(whole, []).append(stem)
    parts = {f"{stem}{end}" for stems in packed.values() for stem in stems for end in _ENDS}
    for whole, stems in packed.items():
        yield GraphWeight(whole, _unpacked(whole, stems, constants), True)
    for name, constant in constants.items():
        if name not in parts and len(constant.dims) > 1 and not name.startswith("torchprune."):
            yield GraphWeight(name, _array(constant), False)


_ENDS = (".bits", ".values")


def _multiplied(name: str, parts: Sequence[str], cols: int, constants: Mapping[str, Any]) -> Tensor:
    """The matrix of bits, values, starts and perhaps scales; of int8 its codes."""
    absent = [part for part in parts if part not in constants]
    if absent or len(parts) < 3:
        raise CheckpointError(f"{name}: {(absent or ['a part'])[0]} is no constant of the graph")
    bits, values, starts = (_array(constants[part]) for part in parts[:3])
    packed = Bitmask(bits, values, starts, None, cols)
    try:
        packed.check(name, rows=len(bits))
        return packed.unpack()
    except (LoweringError, RuntimeError, IndexError) as error:
        raise CheckpointError(str(error)) from error


def _array(constant: Any) -> Tensor:
    """A constant; bfloat16, which graphs cast to float32, as float32."""
    import numpy as np
    from onnx import TensorProto, numpy_helper

    try:
        array = np.ascontiguousarray(numpy_helper.to_array(constant))
        if constant.data_type == TensorProto.BFLOAT16:
            array = array.astype(np.float32)
        return torch.from_numpy(array.copy())
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{constant.name}: cannot be read ({error!s:.200})") from None


def _unpacked(whole: str, stems: list[str], constants: Mapping[str, Any]) -> Tensor:
    if f"{whole}.shape" not in constants:
        raise CheckpointError(f"{whole}: its shape is absent")
    shape = [int(n) for n in _array(constants[f"{whole}.shape"]).tolist()]
    size = math.prod(shape)
    if min(shape, default=0) < 0 or size > MOST:
        raise CheckpointError(f"{whole}: a shape of {shape!s:.80} is no weight's")

    def number(stem: str) -> int:
        return int(stem.rpartition(".")[2]) if len(stems) > 1 else 0

    flat = [_piece(stem, constants) for stem in sorted(stems, key=number)]
    value = torch.cat(flat)
    if not size <= value.numel() < size + 8:
        raise CheckpointError(f"{whole}: bits of {value.numel()} weights, expected {size}")
    return value[:size].reshape(shape)


def _piece(stem: str, constants: Mapping[str, Any]) -> Tensor:
    bits = _array(constants[f"{stem}.bits"])
    values = _array(constants[f"{stem}.values"])
    if bits.dtype != torch.uint8 or values.dim() != 1:
        raise CheckpointError(f"{stem}: bits {bits.dtype} and values {tuple(values.shape)}")
    kept = ((bits.reshape(-1, 1) >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1).bool()
    count = int(kept.sum())
    if len(values) == count + 1 and not bool(values[0]):  # as files before 2026-12 have them
        values = values[1:]
    if count != len(values):
        raise CheckpointError(f"{stem}: {count} bits set but {len(values)} values")
    out = torch.zeros(len(kept), dtype=values.dtype)
    out[kept] = values
    return out


def owner_of(name: str, keys: Mapping[str, object]) -> str | None:
    """Which of a model's tensors a graph's weight is, by the longest name that ends its own."""
    stem = name.removesuffix("_quantized")
    parts = stem.split(".")
    for at in range(len(parts)):
        if (key := ".".join(parts[at:])) in keys:
            return key
    return None


def compare_weight(one: GraphWeight, key: str, weight: Tensor, found: Breaches) -> None:
    """Note where a graph's weight differs from the folded one; products may hold it turned."""
    value = one.value
    if value.dtype in (torch.int8, torch.uint8):
        ways = [w for w in _ways(weight) if w.shape == value.shape]
        others = [int(((w == 0) & (value != 0)).sum()) for w in ways]
        if value.dtype == torch.int8 and others and min(others):
            found.add(key, "code 0 at pruned weights in the graph", f"{min(others):,} others")
        return
    fits = [w.to(value.dtype) for w in _ways(weight) if w.shape == value.shape]
    if not fits:
        found.add(key, f"a weight {tuple(weight.shape)} in the graph", tuple(value.shape))
        return
    wrong = [(int((w != value).sum()), w) for w in fits]
    least, closest = min(wrong, key=lambda pair: pair[0])
    if not least:
        return
    revived = int(((closest == 0) & (value != 0)).sum())
    if revived:
        found.add(key, "zeros in the graph where weights are pruned", f"{revived:,} are not zero")
    if least - revived:
        how = "unpacked" if one.packed else "stored"
        found.add(key, f"the folded weight, {how} in the graph", f"{least - revived:,} differ")


def _ways(weight: Tensor) -> list[Tensor]:
    if weight.dim() == 2:
        return [weight, weight.T]
    if weight.dim() == 3:
        return [weight, weight.transpose(1, 2)]
    return [weight]
