"""Values carried through attention: the channels of each head, from where they are made to where
they are read.

Attention mixes positions, but each channel of its values by itself. So the outputs of the
projection that makes them may change places within a head, if nothing else sees them and one
product reads what comes out. Queries and keys stay: rotations tie their places.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from torchprune.graph import views
from torchprune.graph.program_inputs import sources_of
from torchprune.graph.rules import rule_for
from torchprune.passes.linears import Product, product_of
from torchprune.structure.channels import Channels, Place, arranged, index_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_aten = torch.ops.aten

_MOVES = {
    views.permuted,
    views.transposed,
    views.moved,
    views.turned,
    views.turned_last,
    views.inserted,
    views.squeezed,
    views.repeated_view,
    views.repeated,
    views.interleaved,
    views.sliced,
    views.narrowed,
    views.chosen,
    views.unbound,
    views.cut,
}
"""Rules of operators that move elements and do nothing else: they are run on labels as they are."""

_VALUES: dict[Any, int] = {_aten.scaled_dot_product_attention: 2, _aten.matmul: 1, _aten.bmm: 1}
"""Operators that sum over positions, and which argument's last axis they keep."""


@dataclass(frozen=True, eq=False)
class _Use:
    """A node that does more than move elements: what it reads, and the label of each element."""

    node: Node
    x: Node
    labels: Tensor


def head_values(model: nn.Module, program: ExportedProgram) -> list[Channels]:
    """For every key-value head, the channels of its values, where they may change places."""
    keys = sources_of(model, program)
    found: list[Channels] = []
    for node in program.graph_module.graph.nodes:
        if (made := _product_alone(node, keys)) is None:
            continue
        size = int(node.meta["val"].shape[-1])
        attention = _attention_of([*_uses(node, torch.arange(size).expand(_shape(node)))])
        if attention is None or (out := _mixed_positions(attention)) is None:
            continue
        uses = [*_uses(attention.node, out)]
        read = _product_alone(uses[0].node, keys) if len(uses) == 1 else None
        if read is not None and read.x is uses[0].x:
            found += _heads(made, size, attention.labels, read, uses[0].labels, keys)
    return found


def _product_alone(node: Node, keys: Mapping[str, str]) -> Product | None:
    """A linear layer by parameters of the model that nothing else reads, or None."""
    if (product := product_of(node)) is None or product.through:
        return None
    held = [product.weight] if product.bias is None else [product.weight, product.bias]
    alone = all(n.op == "placeholder" and n.name in keys and len(n.users) == 1 for n in held)
    return product if alone else None


def _shape(node: Node) -> list[int]:
    return [int(size) for size in node.meta["val"].shape]


def _uses(node: Node, labels: Any) -> Iterator[_Use]:
    """Everything that computes with a node's result, whatever moved its elements before."""
    for user in node.users:
        if user.target is operator.getitem:
            yield from _uses(user, labels[cast(int, user.args[1])])
        elif (moved := _moved(user, node, labels)) is not None:
            yield from _uses(user, moved)
        else:
            yield _Use(user, node, labels)


def _moved(user: Node, node: Node, labels: Tensor) -> Any:
    """The labels after a node that only moves elements; None for any other."""
    rule = rule_for(user.target) if user.op == "call_function" else None
    if user.all_input_nodes != [node]:
        return None
    if rule is views.same:
        return labels
    if rule is views.viewed:
        return labels.reshape(_shape(user))
    if rule not in _MOVES:
        return None
    args = torch.fx.map_arg(user.args, lambda _: labels.detach())
    return cast(Any, user.target)(*cast(Any, args), **user.kwargs)


def _attention_of(uses: list[_Use]) -> _Use | None:
    """The one use that mixes positions and keeps channels, if no other sees the same labels."""
    found = [use for use in uses if _keeps_channels(use)]
    if len(found) != 1:
        return None
    here = found[0].labels.unique()
    others = (use for use in uses if use is not found[0])
    shared = any(bool(torch.isin(use.labels.unique(), here).any()) for use in others)
    return None if shared else found[0]


def _keeps_channels(use: _Use) -> bool:
    slot = _VALUES.get(getattr(use.node.target, "overloadpacket", None))
    at = [i for i, arg in enumerate(use.node.args) if arg is use.x]
    labels = use.labels
    return at == [slot] and labels.dim() > 2 and bool((labels == labels[..., :1, :]).all())


def _mixed_positions(use: _Use) -> Tensor | None:
    """Labels of what attention makes of its values, heads repeated for grouped queries."""
    shape, labels = _shape(use.node), use.labels[..., :1, :]
    if use.node.kwargs.get("enable_gqa"):
        labels = labels.repeat_interleave(shape[-3] // labels.shape[-3], -3)
    try:
        return labels.expand(shape)
    except RuntimeError:  # repeated in some other way
        return None


def _heads(
    made: Product,
    size: int,
    carried: Tensor,
    read: Product,
    seen: Tensor,
    keys: Mapping[str, str],
) -> Iterator[Channels]:
    """The channels of each head.

    Args:
        size: how many outputs the first product has; labels count them.
        carried: labels of attention's values, (..., positions, channels).
        seen: labels of what the second product reads.
    """
    columns = seen.reshape(-1, seen.shape[-1])
    heads = carried[..., 0, :].reshape(-1, carried.shape[-1]).unique(dim=0)
    if len(heads.unique()) < heads.numel() or not bool((columns == columns[0]).all()):
        return  # heads share channels, or positions read different ones
    key = keys[read.weight.name]
    for number, head in enumerate(heads):
        units = torch.full((size,), -1)
        units[head] = torch.arange(len(head))
        makes, reads = index_of(units, len(head)), index_of(units[columns[0]], len(head))
        if makes is None or reads is None or not len(reads):
            continue
        places = [
            Place(keys[made.weight.name], int(made.turned), makes, False),
            Place(key, int(not read.turned), reads, True),
        ]
        if made.bias is not None:
            places.append(Place(keys[made.bias.name], 0, makes, False))
        yield arranged(f"{key.rpartition('.')[0]}, head {number}", places)
