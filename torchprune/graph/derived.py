"""Operators without a rule of their own: what torch itself makes of them."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree


def parts_of(target: Any, args: Any, kwargs: Any) -> GraphModule | None:
    """An operator as a graph of simpler ones, or None where torch has none for it.

    Args:
        args, kwargs: as the operator is called, with fake tensors.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # takes a while to import

    leaves, tree = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        positional, named = pytree.tree_unflatten(filled, tree)
        return target(*positional, **named)

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = make_fx(call, decomposition_table=_table(), tracing_mode="real")(
                *(leaves[place] for place in places)
            )
    except Exception:  # whatever an operator makes of being traced
        return None
    made.graph.eliminate_dead_code()
    calls = [node.target for node in made.graph.nodes if node.op == "call_function"]
    packet = getattr(target, "overloadpacket", None)
    if any(getattr(one, "overloadpacket", None) is packet for one in calls):
        return None
    return made


@cache
def _table() -> Any:
    from torch._decomp import core_aten_decompositions

    return core_aten_decompositions()
