"""Where a graph multiplies by its parameters: which part of one is read, and by which rows.

A read is a node that multiplies by a parameter, or by what is a view or a copy of a part of it. Its
rows are computed from what the node is given when the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from torchprune.calibration import recurrent
from torchprune.calibration.operations import READERS, Product
from torchprune.masking.parts import Axis, Part, Role
from torchprune.passes.contractions import Contraction, contraction_of
from torchprune.passes.pieces import Piece, pieces_in

_aten = torch.ops.aten

Values = Mapping[Node, Any]
"""What nodes gave for one batch."""


@dataclass(frozen=True, eq=False)
class Read:
    """One product with a part of a parameter.

    Attributes:
        node: the product.
        piece: what it multiplies by.
        part: the axes of that, and what they stand for.
        needs: the nodes whose values `rows` wants.
        rows: one (rows, cols) matrix for each of the part's groups.
        source: equal for reads of the same rows.
        x: a node with a row for every place of its axes but the last, in their order, or None.
        function: torch's own that it is, where that is no plain product.
        feeds_back: whether what it gives comes back to it a step later.
    """

    node: Node
    piece: Piece
    part: Part
    rows: Callable[[Values], list[Tensor]]
    source: Hashable
    x: Node | None = None
    function: Any = None
    feeds_back: bool = False


def reads_in(graph: Graph, parameters: Mapping[Node, Tensor]) -> dict[Node, list[Read]]:
    """All products with parameters, by the parameter's placeholder, in the graph's order."""
    pieces = pieces_in(graph, parameters)
    found: dict[Node, list[Read]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for read in _reads_of(node, pieces):
                found.setdefault(read.piece.parameter, []).append(read)
    return found


def _reads_of(node: Node, pieces: Mapping[Node, Piece]) -> list[Read]:
    if node.target in _RECURRENT:
        return _recurrent(node, pieces)
    contraction = contraction_of(node)
    made = (
        _functional(node, pieces) if contraction is None else _contracted(node, contraction, pieces)
    )
    return [] if made is None else [made]


# -- contractions ----------------------------------------------------------------------------------


def _contracted(node: Node, contraction: Contraction, pieces: Mapping[Node, Piece]) -> Read | None:
    held = [at for at, side in enumerate(contraction.sides) if side in pieces]
    if contraction.weight_at in held:
        at = contraction.weight_at
    elif len(held) == 1:
        at = held[0]
    else:
        return None
    piece, x = pieces[contraction.sides[at]], contraction.sides[1 - at]
    mine, theirs = contraction.terms.inputs[at], contraction.terms.inputs[1 - at]
    own = mine[len(mine) - len(piece.axes) :]
    axes: list[Axis] = []
    cuts: list[tuple[str, _Cut]] = []
    for letter, runs in zip(own, piece.axes, strict=True):
        role: Role = "row"
        if letter in theirs:
            role = "group" if letter in contraction.terms.output else "col"
        axes += [Axis(size, step, role) for size, step in runs or ((1, 1),) if step]
        cuts.append((letter, tuple((size, role if step else None) for size, step in runs)))
    if not any(axis.role == "col" for axis in axes):
        return None  # value by value: nothing is summed
    source, part = (x, theirs, tuple(cuts)), Part(piece.offset, tuple(axes))
    cols = [letter for letter in own if letter in theirs]
    by_token = x if cols == [theirs[-1]] else None
    return Read(node, piece, part, lambda values: _rows(values[x], theirs, cuts), source, by_token)


_Cut = tuple[tuple[int, "Role | None"], ...]
"""The sizes that an axis is cut into, and what they stand for in the weight; None: in no one."""


def _rows(x: Tensor, letters: str, cuts: Sequence[tuple[str, _Cut]]) -> list[Tensor]:
    """x, with axes of these letters, as one (rows, cols) matrix a group."""
    x = x[(None,) * (len(letters) - x.dim())]
    known, sizes, places = dict(cuts), list[int](), dict[tuple[str, int], int]()
    wide = list(x.shape)
    for at, letter in enumerate(letters):
        cut = known.get(letter, ())
        fixed = prod(size for size, role in cut if role)
        wide[at] = max(wide[at], fixed)  # one value meets all of the weight's
        for number, (size, role) in enumerate(cut or ((wide[at], None),)):
            places[letter, number] = len(sizes)
            sizes.append(size if role else wide[at] // fixed)
    x = x.expand(wide).reshape(sizes)
    order: dict[Role, list[int]] = {"group": [], "row": [], "col": []}
    for letter, cut in cuts:
        for number, (_, role) in enumerate(cut):
            if role and (letter, number) in places:
                order[role].append(places[letter, number])
    taken = {*order["group"], *order["col"]}
    rest = [axis for axis in range(len(sizes)) if axis not in taken]
    groups, cols = (prod(sizes[axis] for axis in order[role]) for role in ("group", "col"))
    matrices = x.permute(*order["group"], *rest, *order["col"])
    return list(matrices.reshape(groups, prod(sizes[axis] for axis in rest), cols).unbind(0))


# -- other functions of an input and a weight ------------------------------------------------------


def _functional(node: Node, pieces: Mapping[Node, Piece]) -> Read | None:
    """A read of a function that `calibration.operations` knows."""
    found = _function_of(node)
    if found is None:
        return None
    function, args, at = found
    piece = pieces.get(cast(Node, args[at]))
    steps = None if piece is None else piece.strides()
    if piece is None or steps is None:
        return None
    weight = torch.empty((), device="meta").as_strided(piece.shape, steps, piece.offset)

    def product(values: Callable[[Node], Any]) -> Product | None:
        given = (*args[:at], weight, *args[at + 1 :])
        filled = map_arg(given, values)
        return next(READERS[function](filled, {}, lambda tensor: tensor is weight), None)

    def rows(values: Values) -> list[Tensor]:
        return cast(Product, product(values.__getitem__)).rows()

    told = product(lambda n: n.meta["val"])
    if told is None:
        return None
    source = node if told.x is None else (args[0], told.geometry)
    return Read(node, piece, told.part, rows, source, function=function)


def _function_of(node: Node) -> tuple[Any, tuple[Any, ...], int] | None:
    """torch's function that a node calls, its arguments as that takes them, the weight's place."""
    if node.target in _FUNCTIONS:
        function = _FUNCTIONS[cast(Any, node.target)]
        return function, node.args, 2 if function is F.bilinear else 1
    if node.target is not _aten.convolution.default:
        return None
    x, weight, bias, stride, padding, dilation, transposed, more, groups = node.args
    space = cast(Node, weight).meta["val"].dim() - 2
    if transposed:
        return _BACK[space - 1], (x, weight, bias, stride, padding, more, groups, dilation), 1
    return _THERE[space - 1], (x, weight, bias, stride, padding, dilation, groups), 1


_THERE = (F.conv1d, F.conv2d, F.conv3d)
_BACK = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_FUNCTIONS: dict[Any, Any] = {
    _aten.conv1d.default: F.conv1d,
    _aten.conv1d.padding: F.conv1d,
    _aten.conv2d.default: F.conv2d,
    _aten.conv2d.padding: F.conv2d,
    _aten.conv3d.default: F.conv3d,
    _aten.conv3d.padding: F.conv3d,
    _aten.conv_transpose1d.default: F.conv_transpose1d,
    _aten.conv_transpose2d.input: F.conv_transpose2d,
    _aten.conv_transpose3d.input: F.conv_transpose3d,
    _aten.bilinear.default: F.bilinear,
}

# -- recurrent operators ---------------------------------------------------------------------------


def _recurrent(node: Node, pieces: Mapping[Node, Piece]) -> list[Read]:
    function = _RECURRENT[cast(Any, node.target)]
    held = cast("list[Node]", recurrent.weights_in(function, node.args, node.kwargs))
    back = recurrent.feeding_back(function, node.args, node.kwargs)
    found = []
    for number, weight in enumerate(held):
        piece = pieces.get(weight)
        steps = None if piece is None else piece.strides()
        if piece is not None and steps is not None:
            (outputs, inputs), (far, near) = piece.shape, steps
            axes = Axis(outputs, far, "row"), Axis(inputs, near, "col")

            def rows(values: Values, number: int = number) -> list[Tensor]:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                return [recurrent.rows_of(function, args, kwargs, number)]

            part, source = Part(piece.offset, axes), (node, number)
            found.append(Read(node, piece, part, rows, source, feeds_back=back[number]))
    return found


_RECURRENT: dict[Any, Any] = {
    getattr(getattr(_aten, name), overload): getattr(torch, name)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for overload in ("input", "data")
} | {
    getattr(_aten, name).default: getattr(torch, name)
    for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
}
