"""Linear layers as a graph computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Graph, Node

_aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """`node` is `x` times a weight, plus `bias`.

    Attributes:
        weight: the node that holds the matrix.
        through: what stands between it and the product, from the weight on: a transposition, and
            for `bmm` its repetition for every item of the batch.
        turned: whether the matrix is (in, out), as transformers' Conv1D has it.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    through: tuple[Node, ...] = ()
    turned: bool = False


def products_in(graph: Graph) -> dict[Node, list[Product]]:
    """The linear layers of a graph by the node that holds their weight, in the graph's order."""
    found: dict[Node, list[Product]] = {}
    for node in graph.nodes:
        if (product := product_of(node)) is not None:
            found.setdefault(product.weight, []).append(product)
    return found


def product_of(node: Node) -> Product | None:
    """A node as a linear layer: `linear`, or `mm`, `addmm` or `bmm`, which it is decomposed to."""
    if node.op != "call_function" or node.kwargs:  # alpha or beta
        return None
    args = cast("tuple[Node, ...]", node.args)
    if node.target is _aten.linear.default:
        return Product(node, args[0], args[1], args[2] if len(args) > 2 else None)
    bias: Node | None = None
    repeats: list[Node] = []
    if node.target is _aten.mm.default:
        x, matrix = args
    elif node.target is _aten.addmm.default and args[0].meta["val"].dim() == 1:
        bias, x, matrix = args
    elif node.target is _aten.bmm.default:
        x, (matrix, *repeats) = args[0], _unrepeated(args[1])
    else:
        return None
    if _is_transposition(matrix):
        weight = cast(Node, matrix.args[0])
        return Product(node, x, weight, bias, (matrix, *repeats))
    return Product(node, x, matrix, bias, tuple(repeats), turned=True)


def _unrepeated(node: Node) -> list[Node]:
    """The matrix that a stack repeats, and how it does; the stack alone if it is something else."""
    path = [node]
    while path[0].target in (_aten.view.default, _aten.expand.default):
        inner = cast(Node, path[0].args[0])
        shape = inner.meta["val"].shape
        if len(shape) < 2 or shape[-2:] != path[0].meta["val"].shape[-2:]:
            return [node]
        path.insert(0, inner)
        if len(shape) == 2:
            return path
    return [node]


def _is_transposition(node: Node) -> bool:
    """Whether a node is a matrix, turned."""
    if node.target is _aten.permute.default:
        return list(cast("list[int]", node.args[1])) in ([1, 0], [-1, -2], [-1, 0], [1, -2])
    return node.target is _aten.t.default
