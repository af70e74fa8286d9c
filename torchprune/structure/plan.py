"""`plan_shrink`: find what masks or zero weights allow to be removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchprune.errors import ShrinkError
from torchprune.graph.capture import Call, as_calls
from torchprune.graph.groups import Group, Structure, read_groups
from torchprune.graph.labels import Choice
from torchprune.graph.trace import Captured
from torchprune.graph.walk import Trace
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.plain_state import Slot, slots_of
from torchprune.masking.selection import every_layer, layers_of, repeated_blocks
from torchprune.modes import calibration_mode
from torchprune.structure.constants import effective, find_constants
from torchprune.structure.shrink import accepted
from torchprune.structure.shrink_plan import (
    Removal,
    ShrinkPlan,
    drawn_up,
    inside,
    parameters_left,
    removed_classes,
)


@on_ordinary_tensors
def plan_shrink(
    model: nn.Module,
    example_inputs: Any,
    *,
    modes: Sequence[str] = ("eval",),
    on_refusal: Literal["raise", "ignore"] = "raise",
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

        on_refusal: what becomes of groups without which the model's own code fails or computes
            otherwise, as where a size is a number in the code: "raise" leaves that to `shrink`,
            "ignore" tries the removal, leaves such groups as they are and lists them in the notes
            with their lines.

    Raises:
        ShrinkError: the model cannot be exported; the message has the operator or line.
    """
    if on_refusal not in ("raise", "ignore"):
        raise ShrinkError(f'on_refusal must be "raise" or "ignore", got {on_refusal!r}')
    calls = as_calls(model, example_inputs, modes)
    captured = Captured(model, calls)
    plan = planned(model, calls, read_groups(model, captured.trace(closed=True)))
    plan = _as_zeros_lie(model, calls, captured, plan)
    return accepted(model, plan, slots_of(model)) if on_refusal == "ignore" and plan else plan


def _as_zeros_lie(
    model: nn.Module, calls: Sequence[Call], captured: Captured, plan: ShrinkPlan
) -> ShrinkPlan:
    """The plan, or one for fewer parameters where channels of convolutions with groups that lose
    nothing by it go the other way: whole groups, or places within them."""
    structure = plan.structure
    assert structure is not None
    removed = removed_classes(structure, plan.removals)[structure.trace.resolved.classes]
    grouped = structure.trace.grouped
    lose = {one.choice for one in grouped if removed[one.reads].any() or removed[one.makes].any()}
    others: dict[Choice, bool] = {o.choice: not o.whole for o in grouped if o.choice not in lose}
    if not others:
        return plan
    traced = captured.trace(closed=True, given=others)
    other = planned(model, calls, read_groups(model, traced))
    return other if other.parameters[1] < plan.parameters[1] else plan


def planned(model: nn.Module, calls: Sequence[Call], structure: Structure) -> ShrinkPlan:
    """The plan for a model whose structure was read from those calls."""
    slots = slots_of(model)
    blocks, notes = _idle_blocks(model, calls)
    notes += _unread_notes(structure.trace)
    removals = []
    groups = [g for g in structure.groups if not all(inside(m.key, blocks) for m in g.members)]
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
    start = ShrinkPlan(
        [], [], blocks, [], (0, 0), (0, 0), notes, calls=list(calls), folds=constants.folds
    )
    return drawn_up(start, structure, slots, removals)


def idle_blocks_plan(
    model: nn.Module, example_inputs: Any, *, modes: Sequence[str] = ("eval",)
) -> ShrinkPlan:
    """As `plan_shrink`, for whole blocks alone: nothing is exported, and no other unit goes."""
    calls, slots = as_calls(model, example_inputs, modes), slots_of(model)
    blocks, notes = _idle_blocks(model, calls)
    sizes = parameters_left(slots, [], blocks)
    return ShrinkPlan([], [], blocks, [], sizes, (0, 0), notes, calls=calls)


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


def _unread_notes(trace: Trace) -> list[str]:
    keys = trace.unread
    if not keys:
        return []
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    note = (
        f"no example reads {', '.join(keys[:4])}{more}: what may belong to them stays; give "
        "examples that do, plan_shrink(model, [one, another])"
    )
    tried = f"the other mode was tried for them, and failed: {trace.untried}"
    return [note, tried] if trace.untried else [note]


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
