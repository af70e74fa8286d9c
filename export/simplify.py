"""An exported ONNX graph without what is constant, said twice, or said of this machine."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common


def simplify(model: ir.Model) -> None:
    """Fold constants, turn weights instead of transposing them, drop stack traces; in place."""
    turn_weights(model.graph)  # first, so that they keep their names
    onnxscript.optimizer.fold_constants(model)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.DeduplicateInitializersPass(),
    ):
        step(model)
    _strip(model)


def turn_weights(graph: ir.Graph) -> None:
    """Give a product its weight the way it wants it: no transposition is left for the runtime."""
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Transpose" else None
        if value is None or value.const_value is None or not value.is_initializer():
            continue
        order = node.attributes.get_ints("perm", None)
        if len(list(value.uses())) > 1 or value.is_graph_output():
            continue
        turned = np.ascontiguousarray(np.transpose(value.const_value.numpy(), order))
        tensor = ir.tensor(turned, name=value.name)
        new = ir.Value(
            name=tensor.name,
            const_value=tensor,
            type=ir.TensorType(tensor.dtype),
            shape=tensor.shape,
        )
        ir.convenience.replace_all_uses_with(node.outputs[0], new)
        graph.remove(node, safe=True)
        graph.initializers.pop(str(value.name))
        graph.register_initializer(new)


def _strip(model: ir.Model) -> None:
    """Leave out the exporter's stack traces: most of a small file, and paths of this machine."""
    graphs = [model.graph, *model.functions.values()]
    for item in (model, *graphs, *(node for graph in graphs for node in graph)):
        item.metadata_props.clear()
        item.doc_string = None
    for graph in graphs:
        for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
            value.metadata_props.clear()
            value.doc_string = None
