"""Nodes of a graph that compute the very same: a mask written twice is one mask."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree


class Numbering:
    """The nodes of one graph, asked in order."""

    def __init__(self, graph: Graph) -> None:
        self._first: dict[Any, Node] = {}
        self._same: dict[Node, Node] = {}
        self._pure = not any(_writes(node) for node in graph.nodes)

    def first_like(self, node: Node) -> Node:
        """The first node that computes what this one does; itself if none before it."""
        tags = getattr(node.target, "tags", ())
        if not self._pure or torch.Tag.nondeterministic_seeded in tags:
            return node
        leaves, tree = pytree.tree_flatten((node.args, node.kwargs))
        given = tuple(
            self._same.get(leaf, leaf) if isinstance(leaf, Node) else (type(leaf), repr(leaf))
            for leaf in leaves
        )
        first = self._first.setdefault((node.target, given, tree), node)
        self._same[node] = first
        return first


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
