"""Rules of torch's recurrent operators: the features that they read may go, and cells of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchprune.graph.context import Context, unknown
from torchprune.graph.labels import UNLABELLED, axes_of
from torchprune.graph.products import contract
from torchprune.graph.values import Value, joined, met


@dataclass(frozen=True)
class _Place:
    """The weights of one direction of one layer.

    Attributes:
        inputs: (gates * hidden, features) what reads the sequence.
        states: (gates * hidden, width) what reads the step before.
        biases: of both, (gates * hidden,), if there are any.
        projection: (width, hidden), if there is one; else the width is that of what is hidden.
    """

    inputs: Value
    states: Value
    biases: Sequence[Value]
    projection: Value | None

    def cells(self, ctx: Context) -> Tensor:
        """(hidden,) the tag of the cells: of every gate the k-th row makes the k-th of them."""
        hidden = (self.projection or self.states).shape[1]
        first: Tensor | None = None
        for value in (self.states, self.inputs, *self.biases):
            rows = _along(value, 0).reshape(-1, hidden)
            one = ctx.labels.united(rows, [0]).reshape(-1)
            if first is not None:
                ctx.labels.join(first, one)
            first = one if first is None else first
        assert first is not None
        return first


def recurrent(
    ctx: Context,
    x: Value,
    states: Value | Sequence[Value],
    weights: Sequence[Value],
    has_biases: Any,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """Sequences of the same length; what every step reads, the first layer's weights read.

    A cell is its rows of all gates, and what reads its state. All layers and directions have one
    width, so the k-th cells of all of them go together. Packed sequences come with their weights
    elsewhere, and are not followed.
    """
    if not isinstance(has_biases, bool) or not all(map(_is_whole, weights)):
        return unknown(ctx, x, states, weights, has_biases)
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    places = [
        _place(weights[start : start + each], has_biases) for start in range(0, len(weights), each)
    ]
    cells = _of_all(ctx, [place.cells(ctx) for place in places])
    given = cells
    if places[0].projection is not None:
        given = _of_all(ctx, [_along(p.projection, 0) for p in places if p.projection is not None])
    for layer in range(num_layers):
        state = _last_axis((*x.shape[:-1], len(given)), given)
        own = places[directions * layer : directions * (layer + 1)]
        for place in own:
            contract(ctx, x.inserted(-2), place.inputs)
            contract(ctx, state.inserted(-2), place.states)
            if place.projection is not None:
                inner = _last_axis((*x.shape[:-1], len(cells)), cells)
                contract(ctx, inner.inserted(-2), place.projection)
        x = joined(ctx.labels, [state] * len(own), -1, ctx.why) if len(own) > 1 else state
    firsts = [states] if isinstance(states, Value) else list(states)
    lasts = [
        met(ctx.labels, [first, _last_axis((1, 1, len(tag)), tag)], ctx.why)
        for first, tag in zip(firsts, (given, cells), strict=False)
    ]
    return (Value(ctx.shape, x.tags), *lasts)


def _place(weights: Sequence[Value], has_biases: bool) -> _Place:
    """As torch orders them: of inputs, of states, their biases, and a projection."""
    rest = weights[2:]
    biases = rest[:2] if has_biases else ()
    return _Place(weights[0], weights[1], biases, rest[-1] if len(rest) > len(biases) else None)


def _of_all(ctx: Context, tags: Sequence[Tensor]) -> Tensor:
    """One tag for what has one size everywhere."""
    for tag in tags[1:]:
        ctx.labels.join(tags[0], tag)
    return tags[0]


def _is_whole(weight: Value) -> bool:
    """Whether every axis has labels of its own."""
    return all(
        size == 1 or ((tag := weight.on(axis)) is not None and axes_of(tag) == (axis,))
        for axis, size in enumerate(weight.shape)
    )


def _along(value: Value, axis: int) -> Tensor:
    """(size,) the tag of one axis."""
    tag = value.on(axis)
    return torch.full((value.shape[axis],), UNLABELLED) if tag is None else tag.reshape(-1)


def _last_axis(shape: tuple[int, ...], tag: Tensor) -> Value:
    """A value whose last axis alone has labels."""
    return Value(shape, (tag.reshape((1,) * (len(shape) - 1) + (-1,)),))
