"""What goes and what stays: the plan of a physical removal, as it is shown and carried out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchprune.calibration.batches import Batch
from torchprune.errors import ShrinkError
from torchprune.graph.capture import Call
from torchprune.graph.groups import Frozen, Group, Structure, in_the_way, reasons_of
from torchprune.graph.labels import axes_of
from torchprune.masking.plain_state import Slot
from torchprune.structure.constants import Fold
from torchprune.structure.cuts import Cut
from torchprune.structure.narrowed import Narrowing, narrowings


@dataclass(frozen=True, eq=False)
class Removal:
    """The units of one group that go: `gone` is (count,) bool."""

    group: Group
    gone: Tensor

    @property
    def before(self) -> int:
        return self.group.count

    @property
    def after(self) -> int:
        return self.group.count - int(self.gone.sum())


@dataclass(frozen=True)
class Asked:
    """A number in the code of a module, at `file:line`, that would have to become another."""

    module: str
    place: str
    before: int
    after: int


@dataclass(frozen=True)
class ShrinkPlan:
    """What `torchprune.shrink` will remove. `print(plan)` shows it.

    Attributes:
        removals: the groups that lose units, and which.
        cuts: the axes that become shorter by that, masks' and buffers' included.
        blocks: names of the repeated blocks that go as a whole.
        frozen: the axes that nothing could be removed from, with reasons.
        parameters: of the model, before and after.
        flops: floating point operations of all products on the example inputs, before and after.
        notes: what is zero and stays nevertheless, and why.
    """

    removals: list[Removal]
    cuts: list[Cut]
    blocks: list[str]
    frozen: list[Frozen]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, dict[int, set[int]]] = field(default_factory=dict, repr=False)
    """Module -> sizes that its code asks for -> what becomes of them."""
    calls: list[Call] = field(default_factory=list, repr=False)
    narrowed: list[Narrowing] = field(default_factory=list, repr=False)
    """Arguments from which modules pick the units that stay."""
    folds: list[Fold] = field(default_factory=list, repr=False)
    """What biases gain from constant units that go."""
    structure: Structure | None = field(default=None, repr=False)
    """What it was read off."""

    @property
    def example(self) -> Batch:
        """The first of the example inputs."""
        return self.calls[0].batch if self.calls else Batch((), {})

    def __bool__(self) -> bool:
        """Whether there is anything to remove."""
        return bool(self.cuts or self.blocks)

    def __str__(self) -> str:
        lines = []
        width = max((len(r.group.name) for r in self.removals), default=0)
        for r in self.removals:
            axes = ", ".join(
                f"{m.key.removeprefix(r.group.name + '.')}[{m.axis}]" for m in r.group.members
            )
            count = f"{r.before} -> {r.after} {r.group.kind}"
            lines.append(f"{r.group.name:{width}}  {count}  on {axes}")
        lines += [f"{name}  the whole block" for name in self.blocks]
        for what, (before, after) in (("parameters", self.parameters), ("FLOPs", self.flops)):
            share = f" ({after / before:.1%})" if before else ""
            lines.append(f"{what}: {before:,} -> {after:,}{share}")
        lines += self.notes
        if self:
            return "\n".join([*lines, *reasons_of(self.frozen)])
        way = [f"  {line}" for line in self.in_the_way]
        head = "nothing to remove: no unit is all zero" + (". In the way stood" if way else "")
        return "\n".join([head, *way, *lines])

    @property
    def in_the_way(self) -> list[str]:
        """What keeps units where they are, a line each, in order of parameters."""
        return [] if self.structure is None else in_the_way(self.structure)


def drawn_up(
    plan: ShrinkPlan, structure: Structure, slots: Mapping[str, Slot], removals: Sequence[Removal]
) -> ShrinkPlan:
    """The plan with these removals and what follows from them; the rest as it is."""
    cuts = list(_cuts(removals))
    removed = removed_classes(structure, removals)
    going = {id(removal.group) for removal in removals}
    return replace(
        plan,
        removals=list(removals),
        cuts=cuts,
        frozen=structure.frozen,
        parameters=parameters_left(slots, cuts, plan.blocks),
        flops=_flops(structure, removed, plan.blocks),
        sizes=_sizes(structure, removed),
        narrowed=narrowings(structure.trace.handed, removed, structure.trace.resolved.classes),
        folds=[fold for fold in plan.folds if id(fold.group) in going],
        structure=structure,
    )


def asked_of(structure: Structure, removal: Removal) -> list[Asked]:
    """Where the code gives as numbers sizes that a removal changes, in the order of the graph."""
    removed = removed_classes(structure, [removal])
    classes = structure.trace.resolved.classes
    found = []
    for ask in structure.trace.asks:
        after = _extent_left(~removed[classes[ask.tag]], ask.axis)
        if after != ask.tag.shape[ask.axis]:
            found.append(Asked(ask.module, ask.place, ask.tag.shape[ask.axis], after))
    return found


def _extent_left(kept: Tensor, axis: int) -> int:
    others = [a for a in range(kept.dim()) if a != axis]
    return int((kept.any(dim=others) if others else kept).sum())


def _cuts(removals: Sequence[Removal]) -> Iterator[Cut]:
    gone: dict[tuple[str, int], Tensor] = {}
    for removal in removals:
        for member in removal.group.members:
            here = member.indices(removal.gone)
            place = member.key, member.axis
            gone[place] = gone[place] | here if place in gone else here
    for (key, axis), indices in gone.items():
        yield Cut(key, axis, len(indices), (~indices).nonzero().flatten())


def removed_classes(structure: Structure, removals: Sequence[Removal]) -> Tensor:
    """(labels,) bool, over classes: what goes."""
    removed = torch.zeros(len(structure.trace.resolved.classes), dtype=torch.bool)
    classes = dict(zip(map(id, structure.groups), structure.classes, strict=True))
    for removal in removals:
        removed[classes[id(removal.group)][removal.gone]] = True
    return removed


def parameters_left(
    slots: Mapping[str, Slot], cuts: list[Cut], blocks: list[str]
) -> tuple[int, int]:
    """How many there are, before and after."""
    shapes: dict[int, tuple[int, list[int]]] = {}
    lasting: set[int] = set()
    cut_of: dict[str, list[Cut]] = {}
    for cut in cuts:
        cut_of.setdefault(cut.key, []).append(cut)
    for key, slot in slots.items():
        if slot.kind != "parameter":
            continue
        shape = shapes.setdefault(id(slot.tensor), (slot.tensor.numel(), [*slot.tensor.shape]))[1]
        for cut in cut_of.get(key, ()):
            shape[cut.axis] = cut.after
        if not inside(key, blocks):
            lasting.add(id(slot.tensor))
    before = sum(count for count, _ in shapes.values())
    return before, sum(math.prod(shape) for name, (_, shape) in shapes.items() if name in lasting)


def _flops(structure: Structure, removed: Tensor, blocks: list[str]) -> tuple[int, int]:
    classes = structure.trace.resolved.classes
    before = after = 0
    for product in structure.trace.products:
        whole = 2 * math.prod(product.shape)
        before += whole
        if inside(f"{product.module}.", blocks):
            continue
        for tag in product.tags:
            kept = int((~removed[classes[tag]]).sum())
            whole = whole // math.prod(product.shape[a] for a in axes_of(tag)) * kept
        after += whole
    return before, after


def _sizes(structure: Structure, removed: Tensor) -> dict[str, dict[int, set[int]]]:
    classes = structure.trace.resolved.classes
    found: dict[str, dict[int, set[int]]] = {}
    for size in structure.trace.sizes:
        after = _extent_left(~removed[classes[size.tag]], size.axis)
        before = size.tag.shape[size.axis]
        if after != before:
            found.setdefault(size.module, {}).setdefault(before, set()).add(after)
    return found


def inside(key: str, blocks: Sequence[str]) -> bool:
    """Whether a tensor lies in one of some blocks."""
    return any(key.startswith(f"{block}.") for block in blocks)


def check_fits(plan: ShrinkPlan, slots: Mapping[str, Slot]) -> None:
    """Raise ShrinkError unless the plan was made for tensors like these."""
    for cut in plan.cuts:
        slot = slots.get(cut.key)
        if slot is None or slot.tensor.shape[cut.axis] != cut.before:
            got = "no such tensor" if slot is None else f"{slot.tensor.shape[cut.axis]}"
            raise ShrinkError(
                f"{cut.key}: the plan expects {cut.before} indices on axis {cut.axis}, got {got}; "
                "plan_shrink again for this model"
            )
