"""Products of two tensors as a graph computes them, by what happens to each of their axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any, cast

import torch
from torch.fx import Node

from torchprune.calibration.equations import Terms, letters_of, terms_of

_aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """Two nodes that are multiplied, and the letters of their axes and of the result's.

    A letter that the result does not have is summed over. Of two stacks of matrices the one that
    has fewer axes has letters for the missing ones in front, which are of size 1.

    Attributes:
        weight_at: which of the two is the weight if both could be, or None.
    """

    sides: tuple[Node, Node]
    terms: Terms
    weight_at: int | None = None


def contraction_of(node: Node) -> Contraction | None:
    """A node as a product of two tensors, or None. What is added to the product is left out."""
    read = _READERS.get(cast(Any, node.target)) if node.op == "call_function" else None
    return None if read is None else read(node)


def _rank(node: Node) -> int:
    return int(node.meta["val"].dim())


def _linear(node: Node) -> Contraction:
    x, weight = cast("tuple[Node, Node]", node.args[:2])
    lead = ascii_letters[: _rank(x) - 1]
    rows = "R" if _rank(weight) == 2 else ""
    return Contraction((x, weight), Terms((lead + "C", rows + "C"), lead + rows), 1)


def _matmul(node: Node) -> Contraction:
    sides = cast("tuple[Node, Node]", node.args[:2])
    a, b = map(_rank, sides)
    stack = ascii_letters[: max(a, b, 2) - 2]
    first, second = stack + "R" * (a > 1) + "I", stack + "I" + "C" * (b > 1)
    result = stack + "R" * (a > 1) + "C" * (b > 1)
    return Contraction(sides, Terms((first, second), result))


def _product(first: str, second: str, result: str, skipped: int = 0) -> _Reader:
    """A product whose axes are always the same, after so many other arguments."""

    def read(node: Node) -> Contraction:
        sides = cast("tuple[Node, Node]", node.args[skipped : skipped + 2])
        return Contraction(sides, Terms((first, second), result))

    return read


def _inner(node: Node) -> Contraction:
    sides = cast("tuple[Node, Node]", node.args[:2])
    a, b = map(_rank, sides)
    return Contraction(sides, letters_of(a, b, ([a - 1], [b - 1])))


def _tensordot(node: Node) -> Contraction:
    sides = cast("tuple[Node, Node]", node.args[:2])
    dims = cast("tuple[Sequence[int], Sequence[int]]", node.args[2:4])
    a, b = map(_rank, sides)
    return Contraction(sides, letters_of(a, b, dims))


def _einsum(node: Node) -> Contraction | None:
    sides = tuple(cast("Sequence[Node]", node.args[1]))
    terms = terms_of(cast(str, node.args[0]), [_rank(side) for side in sides])
    return None if terms is None else Contraction(cast("tuple[Node, Node]", sides), terms)


_Reader = Callable[[Node], "Contraction | None"]

_READERS: dict[Any, _Reader] = {
    _aten.linear.default: _linear,
    _aten.matmul.default: _matmul,
    _aten.inner.default: _inner,
    _aten.tensordot.default: _tensordot,
    _aten.einsum.default: _einsum,
    _aten.mm.default: _product("ij", "jk", "ik"),
    _aten.addmm.default: _product("ij", "jk", "ik", 1),
    _aten.bmm.default: _product("gij", "gjk", "gik"),
    _aten.baddbmm.default: _product("gij", "gjk", "gik", 1),
    _aten.addbmm.default: _product("gij", "gjk", "ik", 1),
    _aten.mv.default: _product("ij", "j", "i"),
    _aten.addmv.default: _product("ij", "j", "i", 1),
    _aten.dot.default: _product("i", "i", ""),
}
