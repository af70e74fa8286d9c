"""Channels: what may change places without changing what a model computes.

Removing a unit asks only that nothing of it stays behind. Exchanging two asks more: that the model
does the same to both. Half of an axis may go through one function and half through another, so
units are compared by all that the graph does to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchprune.graph.groups import Group, Structure
from torchprune.graph.walk import Trace
from torchprune.masking.matrices import is_fused_experts, prunable_names


@dataclass(frozen=True, eq=False)
class Place:
    """Where channels lie on one axis of one tensor.

    Attributes:
        key: the tensor's name in the plain model's `state_dict`.
        axis: which of its axes.
        index: (copies, count) int64: channel i lies at index[c, i], for every copy c.
        reads: whether a product sums over this axis.
        expert: the one slice of the tensor's first axis that is meant; None: the whole tensor.
    """

    key: str
    axis: int
    index: Tensor
    reads: bool
    expert: int | None = None

    def reorder(self, tensor: Tensor, order: Tensor) -> None:
        """Move the tensor's values in place: channel i becomes what channel order[i] is."""
        part, axis = tensor.data, self.axis
        if self.expert is not None:
            part, axis = part[self.expert], axis - 1
        index = self.index.to(tensor.device)
        moved = part.index_select(axis, index[:, order.to(tensor.device)].reshape(-1))
        part.index_copy_(axis, index.reshape(-1), moved)


@dataclass(frozen=True, eq=False)
class Channels:
    """Channels that may be put in any order, if that is done in all their places at once.

    Attributes:
        name: for people.
        count: how many there are.
        places: where they lie, in the order in which the first tensor that reads them has them.
    """

    name: str
    count: int
    places: tuple[Place, ...]


def neurons(structure: Structure, modules: Mapping[str, nn.Module]) -> list[Channels]:
    """The groups of neurons whose units are all alike; of fused experts, each expert's own."""
    colours = unit_colours(structure.trace)
    found: list[Channels] = []
    for group, classes in zip(structure.groups, structure.classes, strict=True):
        if group.kind != "neurons" or bool((colours[classes] != colours[classes[0]]).any()):
            continue
        places = [
            Place(m.key, m.axis, index, m.reads)
            for m in group.members
            if (index := index_of(m.units, group.count)) is not None
        ]
        if len(places) < len(group.members):  # some units have more of a tensor than others
            continue
        experts = _experts(group, modules)
        if experts is None:
            found.append(arranged(group.name, places))
            continue
        for expert in range(experts):
            own = [Place(p.key, p.axis, p.index, p.reads, expert) for p in places]
            found.append(arranged(f"{group.name}, expert {expert}", own))
    return found


def arranged(name: str, places: list[Place]) -> Channels:
    """Channels numbered as the first tensor that reads them has them."""
    first = next((p for p in places if p.reads), places[0])
    order = first.index[0].argsort()
    placed = (Place(p.key, p.axis, p.index[:, order], p.reads, p.expert) for p in places)
    return Channels(name, len(order), tuple(placed))


def index_of(units: Tensor, count: int) -> Tensor | None:
    """(copies, count): where each unit lies, from the (length,) unit of every index, or -1.

    None if some units lie at more places than others.
    """
    inside = (units >= 0).nonzero().flatten()
    times = torch.bincount(units[inside], minlength=count)
    if bool((times != times[0]).any()):
        return None
    ordered = inside[units[inside].argsort(stable=True)]
    return ordered.view(count, -1).T.contiguous()


def _experts(group: Group, modules: Mapping[str, nn.Module]) -> int | None:
    """How many experts have these neurons each for themselves; None if that is not known.

    The graph gives all experts the same labels, since they can only lose the same neurons. But
    each multiplies by matrices of its own alone.
    """
    paths = {m.key.rpartition(".")[0] for m in group.members}
    module = modules.get(paths.pop())
    if paths or module is None or not is_fused_experts(module):
        return None
    names = prunable_names(module)
    known = {*names, *(f"{name}_bias" for name in names)}
    if not {m.key.rpartition(".")[2] for m in group.members} <= known:
        return None
    return int(getattr(module, names[0]).shape[0])


def unit_colours(traced: Trace) -> Tensor:
    """(labels,) int64: equal for classes of labels to which the graph does the same throughout.

    A label's role is the axis it comes from and which of its class's indices there it is. A class
    is told by how often which role appears in which result of the graph, and which roles met. By
    hashes: different ones are equal by a chance of some 2^-60.
    """
    classes = traced.resolved.classes
    role = torch.zeros(len(classes), dtype=torch.long)
    for number, axis in enumerate(traced.axes):
        role[axis.labels] = _mixed(_rank(classes[axis.labels]) + (number << 32))
    colours = torch.zeros(len(classes), dtype=torch.long)
    for number, size in enumerate(traced.sizes):
        tag = size.tag.reshape(-1)
        colours.index_add_(0, classes[tag], _mixed(role[tag] ^ (2 * number + 1)))
    for number, (one, two) in enumerate(traced.edges):
        met = _mixed(role[one] ^ (2 * number + 2)) + 3 * role[two]
        colours.index_add_(0, classes[one], _mixed(met))
    return colours[classes]


def _rank(classes: Tensor) -> Tensor:
    """How many equal values stand before each."""
    order = classes.argsort(stable=True)
    ordered = classes[order]
    at = torch.arange(len(classes))
    first = torch.where(ordered == ordered.roll(1), 0, at)
    first[:1] = 0
    rank = torch.empty_like(order)
    rank[order] = at - first.cummax(0).values
    return rank


def _mixed(values: Tensor) -> Tensor:
    """Integers spread over all 64 bits, equal for equal ones (the finaliser of splitmix64)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return values ^ ((values >> 31) & ((1 << 33) - 1))
