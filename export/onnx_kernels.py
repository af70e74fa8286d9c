"""ONNX graphs whose products read packed weights, by operators of our own for ONNX Runtime."""

from __future__ import annotations

import copy
import fnmatch
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from torchprune.errors import ExportError, LoweringError
from torchprune.export.call import Call, run
from torchprune.export.narrow_weights import bfloat16_of
from torchprune.export.packing_pass import PackedWeight
from torchprune.export.promises import promised
from torchprune.export.pt2 import exported, slim
from torchprune.lowering.kernels.build import BuildError, onnx_library
from torchprune.lowering.lower import lower, plan_lowering
from torchprune.lowering.packed_names import weight_names

DOMAIN, PRODUCT, MATRIX = "torchprune", "BitmaskLinear", "BitmaskUnpack"

_ENTRIES = 500
"""About what a file holds of a packed weight beside its numbers, more than of a dense one."""


def copy_library(path: Path) -> Path:
    """
    Raises:
        ExportError: there is none, and none can be compiled.
    """
    try:
        shutil.copyfile(onnx_library(), path)
    except BuildError as error:
        raise ExportError(
            f"the kernels cannot be compiled: {error}; weights='packed' needs none"
        ) from error
    return path


def program_with_kernels(call: Call, min_sparsity: float) -> Any:
    """A call as torch's ONNX program, with packed products.

    Raises:
        ExportError: torch cannot export it.
    """
    program, _, _ = slim(exported(call), call.module, "packed", min_sparsity, _ENTRIES)
    with promised("torch could not write this program as ONNX"), torch.no_grad():
        return torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=call.names[0],
            custom_translation_table=_translations(),
        )


def packed_products(graph: ir.Graph) -> list[PackedWeight]:
    """The weights that operators of ours read, each once."""
    held: dict[tuple[str, ...], tuple[list[Any], int]] = {}
    for node in _ours(graph):
        parts = _parts_of(node)
        names = tuple(str(part.name) for part in parts)
        held[names] = [part.const_value for part in parts], node.attributes.get_int("cols")
    found, counted = [], set[str]()
    for name, (names, (tensors, cols)) in zip(weight_names(held), held.items(), strict=True):
        dtype = tensors[1].dtype
        before = tensors[0].shape[0] * cols * (dtype.itemsize if dtype.is_floating_point() else 4)
        own = {n: int(t.nbytes) for n, t in zip(names, tensors, strict=True) if n not in counted}
        counted.update(own)
        found.append(PackedWeight(name, int(before), sum(own.values())))
    return found


def narrow_values(graph: ir.Graph) -> None:
    """Let products read nonzeros as bfloat16 that all are such numbers, bit for bit, in place."""
    for node in _ours(graph):
        value = _parts_of(node)[1]
        tensor = value.const_value
        if node.op_type != PRODUCT or tensor.dtype != ir.DataType.FLOAT:
            continue
        halves = bfloat16_of(tensor.numpy())
        if halves is None:
            continue
        narrow = ir.Value(name=value.name, const_value=ir.tensor(halves, name=value.name))
        narrow.dtype, narrow.shape = ir.DataType.BFLOAT16, ir.Shape(halves.shape)
        ir.convenience.replace_all_uses_with(value, narrow)
        graph.initializers.pop(str(value.name))
        graph.register_initializer(narrow)


def _ours(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of operators of ours, in branches too."""
    return (n for n in graph.all_nodes() if n.domain == DOMAIN and n.op_type in (PRODUCT, MATRIX))


def _parts_of(node: ir.Node) -> list[Any]:
    """Bits, values, starts and perhaps scales."""
    parts = node.inputs[1:5] if node.op_type == PRODUCT else node.inputs
    return [part for part in parts if part is not None]


def rounded(call: Call, ignore: Sequence[str], min_sparsity: float) -> Call:
    """The same call of a model whose sparse layers hold int8, a scale for each output.

    Args:
        ignore: globs over names of weights that are not rounded.

    Raises:
        ExportError: a glob that fits no weight, or nothing that can be rounded.
    """
    module = copy.deepcopy(call.module)
    names = [y.name for y in plan_lowering(module, "bitmask", min_sparsity=min_sparsity).layers]
    weights = {name: f"{name}.weight" for name in names}
    for glob in ignore:
        if not fnmatch.filter(weights.values(), glob):
            some = ", ".join(list(weights.values())[:4])
            raise ExportError(f"int8_ignore: {glob!r} fits none of {some}…")
    left = [n for n, weight in weights.items() if any(fnmatch.fnmatch(weight, g) for g in ignore)]
    try:
        lower(
            module,
            "bitmask",
            dtype=torch.int8,
            ignore=left or None,
            min_sparsity=min_sparsity,
        )
    except LoweringError as error:
        raise ExportError(f"int8: {error}") from error
    samples = [replace(s, outputs=run(module, s.args, s.kwargs)) for s in call.samples]
    return replace(call, module=module, samples=samples)


@cache
def _translations() -> dict[Any, Callable[..., Any]]:
    """How torch's ONNX exporter writes our operators."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    part, absent = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    floats = ["tensor(float)", "tensor(float16)"]
    bits, values, starts = (
        part(*names)
        for names in (("bits", "tensor(int64)"), ("values", "V"), ("starts", "tensor(int32)"))
    )
    kept = ("V", [*floats, "tensor(bfloat16)", "tensor(int8)"], "nonzeros")
    cols = OpSchema.Attribute("cols", OpSchema.AttrType.INT, "columns of W")

    def operator(name: str, doc: str, inputs: Any, output: Any, types: Any) -> Any:
        schema = OpSchema(
            name,
            DOMAIN,
            1,
            doc=doc,
            inputs=inputs,
            outputs=[output],
            type_constraints=types,
            attributes=[cols],
        )
        return Op(Opset(DOMAIN, 1), name, schema)

    product = operator(
        PRODUCT,
        "y = x @ W.T + bias, with W as a bitmask and its nonzeros.",
        [
            part("x", "T"),
            bits,
            values,
            starts,
            part("scales", "tensor(float)", param_option=absent),
            part("bias", "T", param_option=absent),
        ],
        part("y", "T"),
        [("T", floats, "inputs and outputs"), kept],
    )
    matrix = operator(MATRIX, "W.", [bits, values, starts], part("w", "V"), [kept])

    def bitmask_linear(
        x: Any, bits: Any, values: Any, starts: Any, scales: Any, bias: Any, cols: int
    ) -> Any:
        return product(x, bits, values, starts, scales, bias, cols=cols)

    def bitmask_unpack(bits: Any, values: Any, starts: Any, cols: int) -> Any:
        return matrix(bits, values, starts, cols=cols)

    ops = torch.ops.torchprune
    return {
        ops.bitmask_linear.default: bitmask_linear,
        ops.bitmask_unpack.default: bitmask_unpack,
    }
