"""What a graph's nodes hold of its parameters: views and copies, followed to where each value lies.

A piece says for each axis of a tensor which axes of the parameter it runs along. Which nodes only
show or copy values is read off the operators' own schemas, and what they show is what torch says
of a tensor without values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

_aten = torch.ops.aten
_COPIES = (_aten.clone.default, _aten._to_copy.default, _aten._unsafe_view.default)

Axis = tuple[int, int]
"""A size, and the step between neighbours in the parameter, counted row by row; 0 where the same
values are repeated (and the size, which may depend on the inputs, is an example's)."""


@dataclass(frozen=True)
class Piece:
    """What one tensor shows of a parameter.

    Attributes:
        parameter: the placeholder.
        offset: where its first value stands.
        axes: what each of its axes runs along, from the outermost in; () for an axis of size 1.
        through: the nodes from the parameter (left out) to the tensor.
    """

    parameter: Node
    offset: int
    axes: tuple[tuple[Axis, ...], ...]
    through: tuple[Node, ...] = ()

    @staticmethod
    def whole(parameter: Node, shape: Sequence[int]) -> Piece:
        """All of a parameter."""
        axes = [((n, prod(shape[i + 1 :])),) if n > 1 else () for i, n in enumerate(shape)]
        return Piece(parameter, 0, tuple(axes))

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's sizes."""
        return tuple(prod(n for n, _ in axis) for axis in self.axes)

    def strides(self) -> tuple[int, ...] | None:
        """The steps of its axes, where each runs along one of the parameter's."""
        if any(len(runs) > 1 for runs in self.axes):
            return None
        return tuple(runs[0][1] if runs else 1 for runs in self.axes)

    def viewed(self, show: Callable[[Tensor], Any], node: Node) -> list[Piece | None]:
        """What the tensors that an operator gives of this one hold; None: not to be told."""
        plain = torch.empty(self.shape, device="meta")
        given = show(plain)
        return [self._seen(plain, out, node) for out in _listed(given)]

    def _seen(self, plain: Tensor, out: object, node: Node) -> Piece | None:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return None
        through = (*self.through, node)
        if out.untyped_storage()._cdata != plain.untyped_storage()._cdata:
            same = out.shape == plain.shape
            return Piece(self.parameter, self.offset, self.axes, through) if same else None
        return self._strided(out.shape, out.stride(), int(out.storage_offset()), through)

    def _strided(
        self, shape: Sequence[int], strides: Sequence[int], start: int, through: tuple[Node, ...]
    ) -> Piece | None:
        """What axes of these strides show, in a copy of this tensor that lies row by row."""
        own = [axis for axes in self.axes for axis in axes]
        digits: list[int] = []
        for size, _ in reversed(own):
            digits.insert(0, start % size)
            start //= size
        offset = self.offset + sum(d * step for d, (_, step) in zip(digits, own, strict=True))
        found = [_along(own, digits, n, s) for n, s in zip(shape, strides, strict=True)]
        if any(axes is None for axes in found):
            return None
        axes = tuple(tuple(cast("list[Axis]", axes)) for axes in found)
        return Piece(self.parameter, offset, axes, through)


def _along(own: Sequence[Axis], digits: Sequence[int], size: int, stride: int) -> list[Axis] | None:
    """The axes that an axis of this size and stride runs along; None if it leaves them."""
    if size == 1:
        return []
    if stride == 0:
        return [(size, 0)]
    found: list[Axis] = []
    weight = 1
    for (extent, step), digit in zip(reversed(own), reversed(digits), strict=True):
        if size > 1 and stride < weight * extent:
            if stride % weight:
                return None
            skip = stride // weight
            if size * skip <= extent or digit + (size - 1) * skip < extent:
                return [(size, step * skip), *found]
            inner = extent // skip
            if extent % skip or size % inner or digit >= skip:
                return None
            found.insert(0, (inner, step * skip))
            size, stride = size // inner, weight * extent
        weight *= extent
    return found if size == 1 else None


def pieces_in(graph: Graph, parameters: Mapping[Node, Tensor]) -> dict[Node, Piece]:
    """The pieces of parameters that nodes hold, by node, in the graph's order."""
    found: dict[Node, Piece] = {n: Piece.whole(n, tuple(t.shape)) for n, t in parameters.items()}
    several: dict[Node, list[Piece | None]] = {}
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(first, Node):
            continue
        if first in several and isinstance(node.args[1], int):  # getitem
            one = several[first][node.args[1]]
            made = [one and replace(one, through=(*one.through, node))]
        elif first in found and shows(node):
            made = found[first].viewed(partial(_run, node), node)
        else:
            continue
        if isinstance(node.meta.get("val"), Tensor):
            if made[0] is not None:
                found[node] = made[0]
        else:
            several[node] = made
    return found


def shows(node: Node) -> bool:
    """Whether a node gives its first argument's values and no others, perhaps as another dtype."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or len(node.all_input_nodes) < 1:
        return False
    if target in _COPIES:
        return True
    schema = target._schema
    given = [a.alias_info for a in schema.arguments[:1]] + [r.alias_info for r in schema.returns]
    tensors = sum(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes)
    return tensors == 1 and len(given) == 2 and all(a and not a.is_write for a in given)


def _run(node: Node, plain: Tensor) -> Any:
    """What a node gives of another first argument, at its example's sizes."""
    rest = map_arg((node.args[1:], node.kwargs), lambda n: example_of(n.meta["val"]))
    args, kwargs = cast("tuple[tuple[Any, ...], dict[str, Any]]", rest)
    if "device" in kwargs:
        kwargs = kwargs | {"device": plain.device}
    return cast(Any, node.target)(plain, *args, **kwargs)


def example_of(value: Any) -> Any:
    """A size as a number, that of the example it was exported with where it may vary."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


def _listed(given: Any) -> Iterator[object]:
    if isinstance(given, tuple | list):
        yield from given
    else:
        yield given
