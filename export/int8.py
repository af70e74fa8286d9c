"""int8 on top, by ONNX Runtime's own quantizer: products in whole numbers, zeros still zero."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from torchprune.errors import ExportError
from torchprune.export.simplify import turn_weights


def quantize(model: ir.Model, folder: Path, ignore: Sequence[str], external: bool) -> ir.Model:
    """The model with int8 weights, a scale for each column of a product, and dynamic activations.

    Args:
        model: with its weights as initialisers; every `Gemm` in it becomes a `MatMul`.
        folder: for files in between; the result may read from them.
        ignore: globs over names of weights that stay floating point.
        external: keep weights in files of their own, as models of 2 GiB and more must.

    Raises:
        ExportError: a glob that fits no weight, nothing to quantize, or a zero that did not stay.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    _without_gemm(model.graph)
    weights = _weights_of(model.graph)
    left = {name for name in weights if any(fnmatch.fnmatch(name, glob) for glob in ignore)}
    for glob in ignore:
        if not fnmatch.filter(weights, glob):
            raise ExportError(f"int8_ignore: {glob!r} fits none of {', '.join(list(weights)[:4])}…")
    if not set(weights) - left:
        raise ExportError("int8: there is no product with a weight to quantize")
    plain, made = folder / "plain.onnx", folder / "int8.onnx"
    ir.save(model, plain, external_data="plain.data" if external else None)
    with contextlib.redirect_stdout(io.StringIO()), _silenced():  # it prints whole graphs
        quantize_dynamic(
            plain,
            made,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[name for key in left for name in weights[key]],
            use_external_data_format=external,
            extra_options={"WeightSymmetric": True},
        )
    quantized = ir.load(made)
    _check_zeros(model.graph, quantized.graph, set(weights) - left)
    return quantized


def _without_gemm(graph: ir.Graph) -> None:
    """Products of matrices plus a bias, as the quantizer knows them: `MatMul` and `Add`."""
    for node in list(graph):
        usual = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        given = {key: attribute.value for key, attribute in node.attributes.items()}
        if node.op_type != "Gemm" or any(given.get(k, v) != v for k, v in usual.items()):
            continue
        x, weight, *bias = node.inputs
        made: list[ir.Node] = []
        if given.get("transB", 0):
            made.append(ir.node("Transpose", [weight], {"perm": [1, 0]}))
            weight = made[-1].outputs[0]
        made.append(ir.node("MatMul", [x, weight]))
        if bias and bias[0] is not None:
            made.append(ir.node("Add", [made[-1].outputs[0], bias[0]]))
        old, new = node.outputs[0], made[-1].outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
    turn_weights(graph)


def _weights_of(graph: ir.Graph) -> dict[str, list[str]]:
    """Weights of products by name, with the names of the nodes that multiply by them."""
    found: dict[str, list[str]] = {}
    for node in graph:
        value = node.inputs[1] if node.op_type == "MatMul" else None
        if value is not None and value.is_initializer() and value.const_value is not None:
            found.setdefault(str(value.name), []).append(str(node.name))
    return found


def _check_zeros(before: ir.Graph, after: ir.Graph, names: set[str]) -> None:
    for name in names:
        value = after.initializers.get(f"{name}_quantized")
        if value is None or value.const_value is None:
            raise ExportError(f"int8: ONNX Runtime did not quantize {name}; name it in int8_ignore")
        original = before.initializers[name].const_value
        assert original is not None
        if np.any(value.const_value.numpy()[original.numpy() == 0]):
            raise ExportError(f"int8: zeros of {name} did not stay zero")


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
