"""The plan of a physical removal: what goes, from which axes, and what that saves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.calibration.batches import Batch
from torchprune.errors import ShrinkError
from torchprune.graph.capture import Call, as_calls
from torchprune.graph.groups import Frozen, Group, Structure, read_groups, reasons_of
from torchprune.graph.labels import axes_of
from torchprune.graph.trace import trace
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.plain_state import Slot, slots_of
from torchprune.masking.selection import every_layer, layers_of, repeated_blocks
from torchprune.modes import calibration_mode
from torchprune.structure.constants import Fold, effective, find_constants
from torchprune.structure.cuts import Cut


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
    folds: list[Fold] = field(default_factory=list, repr=False)
    """What biases gain from constant units that go."""

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
        lines += reasons_of(self.frozen)
        return "\n".join(lines if self else ["nothing to remove: no unit is all zero", *lines])


@on_ordinary_tensors
def plan_shrink(
    model: nn.Module, example_inputs: Any, *, modes: Sequence[str] = ("eval",)
) -> ShrinkPlan:
    """Find what masks, or weights that are zero anyway, allow to be removed physically.

    A unit (a head, a neuron, a channel) can go if nothing reads it: every weight that sums over it
    is zero there, by a mask or by value; or if it is constant whatever the input, as where a filter
    and its bias are zero. A constant that is not zero goes into the biases of what reads it. A
    repeated block can go if all its weights are zero and it hands on its input. Nothing is changed.

    Args:
        model: any module that `torch.export` can capture, with masks or without.
        example_inputs: one call of it: a tensor, a tuple (positional) or a mapping (keywords); or
            a list of several, where one does not take every branch. Floating point operations are
            counted on the first, and `shrink` compares outputs on all.
        modes: "eval", "train", or both: in which the examples must go on working. Parameters that
            no example reads in either mode freeze what may belong to them; the notes say which.

    Raises:
        ShrinkError: the model cannot be exported; the message has the operator or line.
    """
    calls = as_calls(model, example_inputs, modes)
    traced = trace(model, calls, closed=True)
    structure = read_groups(model, traced)
    slots = slots_of(model)
    blocks, notes = _idle_blocks(model, calls)
    notes += _unread_notes(traced.unread)
    removals = []
    groups = [g for g in structure.groups if not all(_inside(m.key, blocks) for m in g.members)]
    unread = {id(group): _unread(group, slots) for group in groups}
    constants = find_constants(model, groups, slots, calls, unread)
    notes += constants.notes
    for group in groups:
        gone = unread[id(group)] | constants.gone.get(id(group), torch.tensor(False))
        if gone.all():
            gone[0] = False
            notes.append(f"{group.name}: all {group.kind} are zero; one stays, as one must")
        if gone.any():
            removals.append(Removal(group, gone))
    cuts = list(_cuts(removals))
    removed = _removed(structure, removals)
    return ShrinkPlan(
        removals=removals,
        cuts=cuts,
        blocks=blocks,
        frozen=structure.frozen,
        parameters=_parameters(slots, cuts, blocks),
        flops=_flops(structure, removed, blocks),
        notes=notes,
        sizes=_sizes(structure, removed),
        calls=calls,
        folds=constants.folds,
    )


def idle_blocks_plan(
    model: nn.Module, example_inputs: Any, *, modes: Sequence[str] = ("eval",)
) -> ShrinkPlan:
    """As `plan_shrink`, for whole blocks alone: nothing is exported, and no other unit goes."""
    calls, slots = as_calls(model, example_inputs, modes), slots_of(model)
    blocks, notes = _idle_blocks(model, calls)
    return ShrinkPlan([], [], blocks, [], _parameters(slots, [], blocks), (0, 0), notes, {}, calls)


def _inside(key: str, blocks: list[str]) -> bool:
    return any(key.startswith(f"{block}.") for block in blocks)


def _unread(group: Group, slots: Mapping[str, Slot]) -> Tensor:
    """(count,) bool: the units that nothing reads, or whose weights are all zero."""
    read = torch.zeros(group.count, dtype=torch.bool)
    made = torch.zeros(group.count, dtype=torch.bool)
    for member in group.members:
        values = effective(slots[member.key])
        if values.dim() < 2 and not member.reads:
            continue
        others = [a for a in range(values.dim()) if a != member.axis]
        alive = (values != 0).cpu().any(dim=others) & (member.units >= 0)
        found = member.units[alive].unique()
        made[found] = True
        if member.reads:
            read[found] = True
    if any(member.reads for member in group.members):
        return ~read
    return ~made


def _cuts(removals: list[Removal]) -> Iterator[Cut]:
    gone: dict[tuple[str, int], Tensor] = {}
    for removal in removals:
        for member in removal.group.members:
            here = member.indices(removal.gone)
            place = member.key, member.axis
            gone[place] = gone[place] | here if place in gone else here
    for (key, axis), indices in gone.items():
        yield Cut(key, axis, len(indices), (~indices).nonzero().flatten())


def _removed(structure: Structure, removals: list[Removal]) -> Tensor:
    """(labels,) bool, over classes: what goes."""
    removed = torch.zeros(len(structure.trace.resolved.classes), dtype=torch.bool)
    classes = dict(zip(map(id, structure.groups), structure.classes, strict=True))
    for removal in removals:
        removed[classes[id(removal.group)][removal.gone]] = True
    return removed


def _parameters(slots: Mapping[str, Slot], cuts: list[Cut], blocks: list[str]) -> tuple[int, int]:
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
        if not _inside(key, blocks):
            lasting.add(id(slot.tensor))
    before = sum(count for count, _ in shapes.values())
    return before, sum(math.prod(shape) for name, (_, shape) in shapes.items() if name in lasting)


def _flops(structure: Structure, removed: Tensor, blocks: list[str]) -> tuple[int, int]:
    classes = structure.trace.resolved.classes
    before = after = 0
    for product in structure.trace.products:
        whole = 2 * math.prod(product.shape)
        before += whole
        if _inside(f"{product.module}.", blocks):
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
        kept = ~removed[classes[size.tag]]
        others = [a for a in range(kept.dim()) if a != size.axis]
        after = int((kept.any(dim=others) if others else kept).sum())
        before = size.tag.shape[size.axis]
        if after != before:
            found.setdefault(size.module, {}).setdefault(before, set()).add(after)
    return found


def _unread_notes(keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return [
        f"no example reads {', '.join(keys[:4])}{more}: what may belong to them stays; give "
        "examples that do, plan_shrink(model, [one, another])"
    ]


def _idle_blocks(model: nn.Module, calls: Sequence[Call]) -> tuple[list[str], list[str]]:
    """The repeated blocks whose weights are all zero and that hand on what they get; notes."""
    blocks = repeated_blocks(model)
    zero = {name: block for name, block in blocks.items() if _all_zero(block)}
    if not zero:
        return [], []
    same: dict[str, bool] = {}
    with torch.no_grad():
        handles = [
            block.register_forward_hook(_comparing(name, same), with_kwargs=True)
            for name, block in zero.items()
        ]
        try:
            for call in calls:
                with calibration_mode(model, training=call.training):
                    call.batch.run(model)
        finally:
            for handle in handles:
                handle.remove()
    idle = [name for name in zero if same.get(name)]
    notes = [
        f"{name}: its weights are zero, but it changes its input (a bias, or a norm after the "
        "residual), so it stays"
        for name in zero
        if not same.get(name)
    ]
    for parent in {name.rpartition(".")[0] for name in idle}:
        siblings = [n for n in blocks if n.rpartition(".")[0] == parent]
        if all(name in idle for name in siblings):
            idle.remove(siblings[0])
            notes.append(f"{siblings[0]}: all blocks are zero; one stays, as one must")
    return idle, notes


def _all_zero(block: nn.Module) -> bool:
    layers = list(layers_of(block)) or list(every_layer(block))
    slots = slots_of(block)
    return bool(layers) and not any(effective(slots[y.key]).any() for y in layers)


def _comparing(name: str, same: dict[str, bool]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        made = out[0] if isinstance(out, tuple) else out
        equal = isinstance(made, Tensor) and given is not None and torch.equal(given, made)
        same[name] = same.get(name, True) and equal

    return hook


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
