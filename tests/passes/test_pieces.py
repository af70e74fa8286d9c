"""Pieces of parameters: what views show is where torch's own views find it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node

from torchprune.passes.pieces import Piece

Show = Callable[[Tensor], Tensor]
PARAMETER = Graph().placeholder("p")


@st.composite
def shows(draw: st.DrawFn, shape: tuple[int, ...]) -> Show:
    """A view, or a copy, of a tensor of this shape."""
    axes = st.integers(0, len(shape) - 1) if shape else st.just(0)
    kinds = ["unsqueeze", "expand", "clone", "half"]
    if shape:
        kinds += ["permute", "flatten", "select", "slice", "unflatten", "chunk"]
    if len(shape) > 1:
        kinds += ["transpose", "merge", "diagonal", "reshape"]
    kind, a, b = draw(st.sampled_from(kinds)), draw(axes), draw(axes)
    size = shape[a] if shape else 1
    if kind == "permute":
        order = draw(st.permutations(range(len(shape))))
        return lambda x: x.permute(order)
    if kind in ("select", "chunk", "slice"):
        start = draw(st.integers(0, size - 1))
        stop, step = draw(st.integers(start + 1, size)), draw(st.integers(1, 3))
        if kind == "select":
            return lambda x: x.select(a, start)
        if kind == "chunk":
            return lambda x: x.chunk(step, a)[-1]
        return lambda x: x[(slice(None),) * a + (slice(start, stop, step),)]
    if kind == "unflatten":
        inner = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        return lambda x: x.unflatten(a, (size // inner, inner))
    if kind == "diagonal":
        return lambda x: x.diagonal(0, a, b) if a != b else x
    other = draw(st.integers(1, 3))
    plain: dict[str, Show] = {
        "unsqueeze": lambda x: x.unsqueeze(a),
        "expand": lambda x: x.expand(other, *shape),
        "clone": torch.clone,
        "half": lambda x: x.to(torch.float16),
        "flatten": torch.flatten,
        "transpose": lambda x: x.transpose(a, b),
        "merge": lambda x: x.flatten(min(a, b), max(a, b)),
        "reshape": lambda x: x.reshape(shape[::-1]),
    }
    return plain[kind]


def shown(piece: Piece, values: Tensor) -> Tensor:
    """The values of a piece, by its axes."""
    places = torch.tensor(piece.offset)
    for runs in piece.axes:
        along = torch.zeros(1, dtype=torch.int64)
        for size, step in runs:
            along = (along[:, None] + torch.arange(size) * step).flatten()
        places = places[..., None] + along
    return values.flatten()[places]


@settings(max_examples=300)
@given(st.data())
def test_any_chain_of_views_and_copies_is_followed(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
    values, piece = whole, Piece.whole(PARAMETER, shape)
    for _ in range(data.draw(st.integers(1, 5))):
        show = data.draw(shows(tuple(values.shape)))
        values = show(values.contiguous())
        if values.dim() > 5 or values.numel() > 300:
            return
        (found,) = piece.viewed(show, cast(Node, None))
        if found is None:  # an axis that crosses others by a step of its own
            return
        piece = found
        assert piece.shape == values.shape
        assert torch.equal(shown(piece, whole), values.float())


def test_what_products_are_given_is_always_followed() -> None:
    """Heads cut out, stacks repeated for a batch: no chain of these gets lost."""
    w = torch.arange(48.0).view(12, 4)
    chains: list[list[Show]] = [
        [lambda x: x.view(3, 4, 4), lambda x: x[1], torch.t],
        [lambda x: x.chunk(3)[2], torch.t, torch.clone, lambda x: x.reshape(2, 2, 4)],
        [
            lambda x: x.view(3, 4, 4).mT,
            lambda x: x.expand(5, 3, 4, 4),
            torch.clone,
            lambda x: x.view(15, 4, 4),
        ],
        [torch.t, torch.flatten, lambda x: x.view(4, 3, 4), lambda x: x[:, 1:]],
    ]
    for chain in chains:
        values, piece = w, Piece.whole(PARAMETER, w.shape)
        for show in chain:
            values = show(values.contiguous())
            (found,) = piece.viewed(cast(Any, show), cast(Node, None))
            assert found is not None
            piece = found
        assert torch.equal(shown(piece, w), values)


def test_numbers_that_are_no_values_of_the_parameter_are_not_followed() -> None:
    piece = Piece.whole(PARAMETER, (4, 4))
    assert piece.viewed(lambda x: x.to(torch.int32), cast(Node, None)) == [None]
