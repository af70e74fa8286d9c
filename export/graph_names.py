"""Names of a graph's outputs and sizes: those that the model gives them, and usual ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def output_names(outputs: Any) -> list[str] | None:
    """Names of the tensors in what a model returns, in order: keys and fields, and places in lists.

    A tensor alone is "output", those of a plain tuple "output.0", "output.1". None where something
    in it has no names to be read.

    >>> import torch
    >>> output_names({"logits": torch.ones(1), "states": (torch.ones(1), torch.ones(1))})
    ['logits', 'states.0', 'states.1']
    """
    try:
        found: list[Any] = pytree.tree_flatten_with_path(outputs)[0]
    except (ValueError, RuntimeError, NotImplementedError):
        return None
    tensors = [path for path, leaf in found if isinstance(leaf, Tensor)]
    return [".".join(map(_part, path)) if _named(path) else _place(path) for path in tensors]


def _named(path: Sequence[Any]) -> bool:
    return bool(path) and not isinstance(path[0], pytree.SequenceKey)


def _place(path: Sequence[Any]) -> str:
    return ".".join(["output", *map(_part, path)])


def _part(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def name_outputs(graph: Any, names: Sequence[str] | None) -> None:
    """Give an `onnx_ir` graph's outputs their names, in place.

    An output that is an input, a weight or another output too gets a node of its own; a name that
    an input or a weight has already gets "_out" behind it.
    """
    if names is None or len(names) != len(graph.outputs):
        return
    import onnx_ir as ir

    taken = {value.name for value in graph.inputs} | set(graph.initializers)
    wanted: list[str] = []
    for name in names:
        while name in taken or name in wanted:
            name = f"{name}_out"
        wanted.append(name)
    seen: set[int] = set()
    for place, value in enumerate(graph.outputs):
        if value.producer() is None or id(value) in seen:
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[place] = node.outputs[0]
        seen.add(id(graph.outputs[place]))
    for node in graph:
        for value in node.outputs:
            if value.name in wanted and id(value) not in seen:
                value.name = f"{value.name}_inner"
    for place, value in enumerate(graph.outputs):  # first aside: they may have each other's names
        value.name = f"torchprune output {place}"
    for value, name in zip(graph.outputs, wanted, strict=True):
        value.name = name


def name_sizes(graph: Any, names: Sequence[Mapping[int, str]]) -> None:
    """Give the sizes of an `onnx_ir` graph that vary their names, in place, everywhere.

    Args:
        names: for each input, what its axes count; sums of these are named alike.
    """
    import onnx_ir as ir

    known: dict[str, str] = {}
    for value, axes in zip(graph.inputs, names, strict=False):
        for axis, name in axes.items():
            size = value.shape[axis]
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                known.setdefault(str(size.value), name)

    def named(size: Any) -> Any:
        said = None if isinstance(size, int) else size.value
        if said is None:
            return size
        return re.sub(r"[A-Za-z_]\w*", lambda found: known.get(found[0], found[0]), str(said))

    for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
        if known and value.shape is not None:
            value.shape = ir.Shape([named(size) for size in value.shape])
