"""Float32 initialisers whose values are all bfloat16 numbers, in half of their bytes.

Behind each stands a `Cast` to float32. Its input is constant, so a runtime that folds constants
does it once, at load, and then runs the float32 graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from torchprune.export.packing_pass import LARGEST

CAST = 100
"""Most bytes of a `Cast` in a file, but for the name of what it reads."""


def narrow_initializers(model: ir.Model) -> list[str]:
    """Store float32 initialisers as bfloat16 that are exact and smaller so, in place.

    Returns:
        their names, which they keep.

    The law: what the `Cast` gives is the initialiser, bit for bit. One that holds a NaN stays
    float32, since runtimes cast every NaN to the same.
    """
    graph, casts, narrowed = model.graph, [], []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or value.is_graph_output():
            continue
        if not 2 * (CAST + len(name)) < tensor.nbytes <= LARGEST:
            continue  # one that is larger would be cast in every run
        halves = bfloat16_of(tensor.numpy())
        if halves is None:
            continue
        stored = ir.Value(name=name, const_value=ir.tensor(halves, name=name))
        stored.dtype, stored.shape = ir.DataType.BFLOAT16, ir.Shape(halves.shape)
        casts.append(ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}))
        ir.convenience.replace_all_uses_with(value, casts[-1].outputs[0])
        graph.initializers.pop(name)
        graph.register_initializer(stored)
        narrowed.append(name)
    if casts:
        graph.insert_before(graph[0], casts)
    return narrowed


def bfloat16_of(array: Any) -> Any:
    """The same numbers in bfloat16, bit for bit; None where one is none, or NaN.

    Args:
        array: float32, of any shape.
    """
    bits = np.ascontiguousarray(array).view(np.uint32)
    if (bits & 0xFFFF).any() or np.isnan(array).any():
        return None
    return (bits >> 16).astype(np.uint16).view(ir.DataType.BFLOAT16.numpy())
