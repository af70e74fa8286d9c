"""Weights of a large model unpacked one part after another, so that a runtime can forget between.

ONNX Runtime folds all that it can in one sweep, keeps every number in between until the sweep ends,
and then looks whether there is more to fold, up to ten times. So a graph whose weights all unpack
at once takes many times its size. Here each stage but the first reads an `open`, a constant that a
sweep can know only after the one before:

    open = Shape(Scan(Expand(one, Abs(open before))))

`Scan` takes one number and gives it back. A sweep folds what feeds it, but no node with a graph of
its own; only between sweeps does the runtime look what shape that gives, which makes `Shape` a
constant. It is [1] always: whoever does not fold computes the same, in any order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

STAGES = 8
"""Sweeps that unpack; of ten, so that two are left for what the runtime does with the weights."""

SMALLEST = 1 << 22
"""Weights of a model below which one stage does."""

_NEXT = 0.85
"""A stage's share of the one before: unpacked weights pile up, and leave room for fewer at once."""


class Stages:
    """When each of a model's weights is unpacked.

    Args:
        total: weights that will be.
    """

    def __init__(self, graph: ir.Graph, total: int) -> None:
        self._graph = graph
        self._opens: list[ir.Value | None] = [None]
        shares = _NEXT ** np.arange(STAGES if total >= SMALLEST else 1)
        self._ends = (shares.cumsum() / shares.sum() * total)[:-1]

    def open(self, done: int, nodes: list[ir.Node]) -> ir.Value | None:
        """What weights read that are unpacked after `done` others; None is the first stage.

        Args:
            nodes: those that make it are added here, where it is new.
        """
        stage = int(np.searchsorted(self._ends, done, side="right"))
        while len(self._opens) <= stage:
            self._opens.append(self._next(nodes))
        return self._opens[stage]

    def _next(self, nodes: list[ir.Node]) -> ir.Value:
        before = self._opens[-1]
        if before is None:
            before = constant(self._graph, "torchprune.start", np.ones(1, np.int64))
            constant(self._graph, "torchprune.one", np.ones(1, np.float32))
        one = self._graph.initializers["torchprune.one"]
        shape = then(nodes, "Abs", before)
        scanned = then(
            nodes,
            "Scan",
            then(nodes, "Expand", one, shape),
            body=_same(f"torchprune.stage{len(self._opens)}"),
            num_scan_inputs=1,
        )
        return then(nodes, "Shape", scanned)


def _same(name: str) -> ir.Graph:
    """A number, given back."""
    number = ir.Value(name=f"{name}.in", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
    node = ir.node("Identity", [number])
    out = node.outputs[0]
    out.name, out.type, out.shape = f"{name}.out", number.type, number.shape
    return ir.Graph([number], [out], nodes=[node], name=name)


def then(nodes: list[ir.Node], operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
    """What a new node gives, put behind the others."""
    nodes.append(ir.node(operator, inputs, attributes))
    return nodes[-1].outputs[0]


def constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """An array as an initialiser of a graph."""
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.Value(name=name, const_value=tensor)  # of a type and shape that the array tells
    graph.register_initializer(value)
    return value
