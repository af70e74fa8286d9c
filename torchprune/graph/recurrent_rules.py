"""Rules of torch's recurrent operators: the features that they read may go, their states stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchprune.graph.context import Context, unknown
from torchprune.graph.products import contract
from torchprune.graph.values import Value


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
    """Sequences of the same length, of which every step is read by the first layer's weights.

    What is inside, all gates and states of all layers and directions, has one width: it is frozen.
    Packed sequences come with their weights elsewhere, and are not followed.
    """
    if not isinstance(has_biases, bool):
        return unknown(ctx, x, states, weights, has_biases)
    each = len(weights) // num_layers
    firsts = [weights[0], weights[each // 2]] if bidirectional else [weights[0]]
    for first in firsts:
        ctx.freeze(contract(ctx, x.inserted(-2), first))
    inputs = {id(first) for first in firsts}
    ctx.freeze(states, [weight for weight in weights if id(weight) not in inputs])
    return tuple(Value(shape) for shape in ctx.shapes)
