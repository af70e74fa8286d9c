"""Groups of units: what can be removed one by one, and where each of them lives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torchprune.graph.capture import as_calls
from torchprune.graph.trace import trace
from torchprune.graph.walk import Trace

Kind = Literal["heads", "neurons", "channels"]


@dataclass(frozen=True, eq=False)
class Member:
    """Where the units of a group lie on one axis of one tensor.

    Attributes:
        key: the tensor's name in the plain model's `state_dict`.
        axis: which of its axes.
        units: (length of the axis,) int64, the unit of each index, or -1.
        reads: whether a product sums over this axis: the tensor consumes what the units carry.
    """

    key: str
    axis: int
    units: Tensor
    reads: bool

    def indices(self, units: Tensor) -> Tensor:
        """(length of the axis,) bool: the indices of some units, given as (count,) bool."""
        lookup = torch.cat([units, units.new_zeros(1)])  # -1 reads the last
        return lookup[self.units]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are alike: the heads of one attention, the neurons of one MLP, channels.

    Attributes:
        name: the path of the modules it lives in.
        kind: "heads" where attention keeps the units apart (with grouped queries a unit is one
            key-value head and its query heads), "channels" where convolutions carry them, else
            "neurons".
        count: how many units there are.
        members: where they live. Removing a unit removes its indices in all of them.
        width: how many channels, or neurons, a unit is at least wherever it lies: as many as there
            are groups where the same places go from all groups of a convolution.
    """

    name: str
    kind: Kind
    count: int
    members: tuple[Member, ...]
    width: int = 1

    def __str__(self) -> str:
        axes = ", ".join(f"{m.key}[{m.axis}]" for m in self.members)
        return f"{self.name}: {self.count} {self.kind} on {axes}"


@dataclass(frozen=True, eq=False)
class Frozen:
    """An axis on which nothing can go, why, and how many numbers its tensor holds."""

    key: str
    axis: int
    why: str
    numbers: int = 0


@dataclass(frozen=True, eq=False)
class Structure:
    """What of a model can be removed.

    Attributes:
        groups: in the order of the model's tensors.
        frozen: the axes that stay, with reasons.
    """

    groups: list[Group]
    frozen: list[Frozen]
    trace: Trace = field(repr=False)
    classes: list[Tensor] = field(repr=False)
    """For each group, the class of each of its units."""

    def __str__(self) -> str:
        lines = [str(group) for group in self.groups]
        return "\n".join([*lines, *reasons_of(self.frozen)])


def reasons_of(frozen: Iterable[Frozen]) -> list[str]:
    """A line for each reason, with the first axes that it holds for; the largest tensors first."""
    by_reason: dict[str, list[Frozen]] = {}
    for one in frozen:
        by_reason.setdefault(one.why, []).append(one)
    ordered = sorted(by_reason.items(), key=lambda held: -numbers_of(held[1]))
    return [f"frozen by {why}: {_listed(held)}" for why, held in ordered]


def numbers_of(frozen: Iterable[Frozen]) -> int:
    """How many numbers the tensors of some axes hold, each tensor once."""
    return sum({one.key: one.numbers for one in frozen}.values())


def _listed(frozen: list[Frozen]) -> str:
    more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
    return ", ".join(f"{one.key}[{one.axis}]" for one in frozen[:3]) + more


def in_the_way(structure: Structure, most: int = 5) -> list[str]:
    """What keeps units where they are, in order of the parameters that stay for it.

    Where nothing does, a group could go and has no unit that is zero.
    """
    sizes = _sizes(structure.trace)
    found: dict[str, list[Frozen]] = {}
    for one in structure.frozen:
        found.setdefault(one.why, []).append(one)
    for group in structure.groups:
        why = f"none of its {group.count} {group.kind} is zero"
        found[f"{group.name}: {why}"] = [
            Frozen(m.key, m.axis, why, sizes[m.key]) for m in group.members
        ]
    ordered = sorted(found.items(), key=lambda held: -numbers_of(held[1]))
    lines = [f"{numbers_of(held):,} parameters: {why} ({_listed(held)})" for why, held in ordered]
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])


def _sizes(traced: Trace) -> dict[str, int]:
    """How many numbers each tensor holds."""
    sizes: dict[str, int] = {}
    for axis in traced.axes:
        sizes[axis.key] = sizes.get(axis.key, 1) * len(axis.labels)
    return sizes


def structure_of(model: nn.Module, example_inputs: Any) -> Structure:
    """What can be removed from a model, read off its exported graph.

    Args:
        example_inputs: a tensor, a tuple (positional) or a mapping (keywords).

    Raises:
        ShrinkError: the model cannot be exported.
    """
    return read_groups(model, trace(model, as_calls(model, example_inputs)))


def read_groups(model: nn.Module, traced: Trace) -> Structure:
    """The groups of a followed graph. Units lie in one group if they live on the same axes."""
    classes, frozen = traced.resolved.classes, traced.resolved.frozen
    size = len(classes)
    signature = torch.zeros(size, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    own: list[Tensor] = []
    for axis in traced.axes:
        here = classes[axis.labels]
        own.append(here)
        signature[here.unique()] += torch.randint(-(2**62), 2**62, (1,), generator=generator)
    owners: dict[int, list[int]] = {}  # signature -> axes
    units: dict[int, Tensor] = {}  # signature -> its classes, in order of first appearance
    stays: list[Frozen] = []
    modules = dict(model.named_modules())
    sizes = _sizes(traced)
    for at, (axis, here) in enumerate(zip(traced.axes, own, strict=True)):
        free = here[~frozen[here]]
        if not len(free):
            if axis.axis >= 2 and _is_kernel(axis.key, modules):
                continue
            why = traced.resolved.reasons.get(int(here[0]), "a fixed size of the model's code")
            stays.append(Frozen(axis.key, axis.axis, why, sizes[axis.key]))
            continue
        for mark in signature[free].unique().tolist():
            owners.setdefault(mark, []).append(at)
            if mark not in units:
                units[mark] = _ordered(free[signature[free] == mark])
    groups: list[Group] = []
    names: list[Tensor] = []
    idle: list[tuple[int, str]] = []
    grouped: set[int] = set()
    for mark, some in units.items():
        if len(some) < 2 or len(owners[mark]) < 2:
            together = "all its indices go together, so none can go alone"
            why = together if len(some) < 2 else "no other tensor has to do with it"
            idle += [(at, why) for at in owners[mark]]
            continue
        grouped.update(owners[mark])
        lookup = torch.full((size,), -1)
        lookup[some] = torch.arange(len(some))
        members = []
        for at in owners[mark]:
            axis = traced.axes[at]
            reads = bool(traced.read[axis.labels[lookup[own[at]] >= 0]].any())
            members.append(Member(axis.key, axis.axis, lookup[own[at]], reads))
        kind = _kind(members, bool(traced.resolved.attended[some].any()), modules)
        width = min(_width(member, len(some), modules) for member in members)
        groups.append(Group(_name(members), kind, len(some), tuple(members), width))
        names.append(some)
    for at, why in dict(idle).items():
        axis = traced.axes[at]
        if at not in grouped and not (axis.axis >= 2 and _is_kernel(axis.key, modules)):
            stays.append(Frozen(axis.key, axis.axis, why, sizes[axis.key]))
    return Structure(groups, stays, traced, names)


def _is_kernel(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether axes past the second are a convolution's: extents that nobody wants to remove."""
    return isinstance(modules.get(key.rpartition(".")[0]), _ConvNd)


def _width(member: Member, count: int, modules: Mapping[str, nn.Module]) -> int:
    """How many channels a unit is on one axis; those of one group of a convolution are as many
    in each."""
    spans = torch.bincount(member.units[member.units >= 0], minlength=count)
    owner: Any = modules.get(member.key.rpartition(".")[0])
    times = owner.groups if isinstance(owner, _ConvNd) and member.axis == 1 else 1
    return int(spans[spans > 0].min()) * times


def _ordered(classes: Tensor) -> Tensor:
    """Unique values in order of their first appearance."""
    values, inverse = classes.unique(return_inverse=True)
    first = torch.full((len(values),), len(classes))
    first = first.scatter_reduce(0, inverse, torch.arange(len(classes)), "amin")
    ordered: Tensor = values[first.argsort()]
    return ordered


def _kind(members: list[Member], attended: bool, modules: Mapping[str, nn.Module]) -> Kind:
    if attended:
        return "heads"
    owners = (modules.get(m.key.rpartition(".")[0]) for m in members)
    return "channels" if any(isinstance(o, _ConvNd) for o in owners) else "neurons"


def _name(members: list[Member]) -> str:
    """The longest path that all the modules share; the first module's own if it is none."""
    paths = [m.key.split(".")[:-1] for m in members]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared or paths[0])
