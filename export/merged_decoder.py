"""A decoder's first step and those after it as one graph, with the weights of both once.

optimum and transformers.js call it `decoder_model_merged` and tell it by `use_cache_branch` which
of the two to take:

    If(use_cache_branch, then=step with a past, else=first step)

Both branches read the graph's inputs and weights. Where one has the inputs of the other too, what
is given for these is not read. Keys and values of the source, which a step with a past does not
make, are given back as they came.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from itertools import count
from typing import Any

import onnx_ir as ir

from torchprune.export.encoder_decoder import MERGED, SWITCH
from torchprune.export.written import letter_of

_LETTERS = "[a-z]+"

_PAST, _PRESENT = "past_key_values.", "present."


def merge(first: ir.Model, after: ir.Model) -> ir.Model:
    """One graph of both; they are used up.

    Args:
        first: gives `logits` and all of `present.*`.
        after: reads `past_key_values.*`, and gives `logits` and some of `present.*`.
    """
    inputs: dict[str, ir.Value] = {}
    for graph in (first.graph, after.graph):
        for value in graph.inputs:
            inputs.setdefault(str(value.name), _like(value, str(value.name)))
    weights = _Weights()
    names = [str(value.name) for value in first.graph.outputs]
    longer = {str(value.name): value for value in (*first.graph.outputs, *after.graph.outputs)}
    shapes = [_like(longer[name], name) for name in names]
    branches = {
        "then_branch": _branch(after.graph, "with_past", inputs, weights, names),
        "else_branch": _branch(first.graph, "no_past", inputs, weights, names),
    }
    switch = ir.Value(name=SWITCH, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    chosen = ir.Node("", "If", [switch], _graphs(branches), outputs=shapes, name="merged")
    return ir.Model(
        ir.Graph(
            [*inputs.values(), switch],
            shapes,
            nodes=[chosen],
            initializers=weights.held,
            opset_imports=first.graph.opset_imports | after.graph.opset_imports,
            name=MERGED,
        ),
        ir_version=max(first.ir_version, after.ir_version),
        functions=[*first.functions.values(), *after.functions.values()],
    )


class _Weights:
    """Weights of several graphs, equal ones once."""

    def __init__(self) -> None:
        self.held: list[ir.Value] = []
        self._by_content: dict[Any, ir.Value] = {}
        self._names: set[str] = set()

    def of(self, value: ir.Value) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None
        content = hashlib.sha256(tensor.tobytes()).digest()
        key = (content, tensor.dtype, tuple(tensor.shape))
        if key not in self._by_content:
            name = str(value.name)
            while name in self._names:
                name += "_2"
            made = ir.Value(name=name, const_value=tensor, type=value.type, shape=value.shape)
            made.dtype, made.shape = tensor.dtype, ir.Shape(tensor.shape)
            self._names.add(name)
            self._by_content[key] = made
            self.held.append(made)
        return self._by_content[key]


def _branch(
    graph: ir.Graph,
    name: str,
    inputs: Mapping[str, ir.Value],
    weights: _Weights,
    outputs: list[str],
) -> ir.Graph:
    """A graph that reads another's inputs and weights, and gives outputs of these names."""
    given = {str(value.name): value for value in graph.outputs}
    for value in graph.inputs:
        ir.convenience.replace_all_uses_with(value, inputs[str(value.name)])
    for value in list(graph.initializers.values()):
        ir.convenience.replace_all_uses_with(value, weights.of(value))
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    found = []
    for output in outputs:
        made = given.get(output)
        if made is None:
            source = inputs[output.replace(_PRESENT, _PAST, 1)]
            node = ir.node("Identity", [source])
            nodes.append(node)
            made = node.outputs[0]
            made.name, made.type, made.shape = output, source.type, source.shape
        found.append(made)
    for at, node in enumerate(nodes):  # what is named in a branch is named nowhere else
        node.name = f"{name}/{node.name or at}"
        for value in node.outputs:
            value.name = f"{name}/{value.name}" if value.name else None
    return ir.Graph([], found, nodes=nodes, name=name)


def _graphs(branches: Mapping[str, ir.Graph]) -> list[ir.Attr]:
    return [ir.AttrGraph(name, graph) for name, graph in branches.items()]


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, type=value.type, shape=value.shape)


def same_letters(first: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of the sizes of both, in the letters of the second.

    Args:
        first, after: see `written.sizes_of`.
    """
    one, two = first["sizes"], after["sizes"]
    known = {
        x: y
        for name in one.keys() & two.keys()
        for x, y in zip(one[name], two[name], strict=True)
        if isinstance(x, str) and isinstance(y, str)
    }
    taken = set(re.findall(_LETTERS, str(list(two.values()))))
    fresh = (letter for letter in map(letter_of, count()) if letter not in taken)

    def named(size: Any) -> Any:
        def other(found: re.Match[str]) -> str:
            if found[0] not in known:
                known[found[0]] = next(fresh)
            return known[found[0]]

        return re.sub(_LETTERS, other, size) if isinstance(size, str) else size

    sizes = {name: tuple(map(named, some)) for name, some in one.items()} | two
    bounds = {named(x): bound for x, bound in first["bounds"].items()} | after["bounds"]
    unmoved = list(dict.fromkeys([*first["unmoved"], *after["unmoved"]]))
    return {"sizes": sizes, "bounds": bounds, "unmoved": unmoved}
