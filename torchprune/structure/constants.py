"""Units that carry one constant, whatever the input: they can go though what reads them is alive.

A zero filter with a zero bias, a batch norm whose weight is zero, rows cleared by another tool.
That a unit is constant is not concluded from one run, in which a ReLU may be dead by chance: the
model is run with other inputs and with all that is not zero drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.left_as_is import left_as_is
from torchprune.graph.capture import Call
from torchprune.graph.groups import Group, Member
from torchprune.masking.matrices import ConvNd, is_transposed_linear
from torchprune.masking.packing import masked
from torchprune.masking.plain_state import Slot

_DRAWS = 2


@dataclass(frozen=True, eq=False)
class Fold:
    """What a layer's bias gains when a group's constants, which it reads, go."""

    key: str
    gain: Tensor
    group: Group


@dataclass
class Constants:
    """For each group, by its id, the units that are constant, and the biases they go into."""

    gone: dict[int, Tensor] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_constants(
    model: nn.Module,
    groups: Sequence[Group],
    slots: Mapping[str, Slot],
    calls: Sequence[Call],
    unread: Mapping[int, Tensor],
) -> Constants:
    """The constant units of some groups that everything that reads them can do without.

    Args:
        unread: for each group, by its id, the units that go anyway. One unit of each group stays.
    """
    found = Constants()
    maybe = {id(g): c for g in groups if (c := _candidates(g, slots)).any()}
    asked = [g for g in groups if id(g) in maybe and _readers(g, slots) is not None]
    if not asked:
        return found
    readers = {m.key: slots[m.key] for g in asked for m in g.members if m.reads}
    spans = [_seen(model, readers, calls[0].batch, seed) for seed in range(_DRAWS)]
    here = _seen(model, readers, calls[0].batch, None)
    trains = any(call.training for call in calls)
    for group in asked:
        gone, reading = maybe[id(group)], [m for m in group.members if m.reads]
        if any(m.key not in span for m in reading for span in (*spans, here)):
            continue  # read elsewhere than in the first example
        for member in reading:
            for low, high in (span[member.key] for span in (*spans, here)):
                gone = gone & _by_unit(low == high, member, group.count)
        if bool((gone | unread[id(group)]).all()):
            gone[0] = False
        if trains:  # statistics of batches may make another constant of it there
            for member in reading:
                gone = gone & _by_unit(here[member.key][0] == 0, member, group.count)
        gone = _foldable(group, gone, slots, here, found)
        if gone.any():
            found.gone[id(group)] = gone
    return found


def _candidates(group: Group, slots: Mapping[str, Slot]) -> Tensor:
    """(count,) bool: units that all matrices make zero, or that some vector multiplies by zero."""
    made, scaled = torch.zeros(group.count, dtype=torch.bool), torch.ones(group.count) > 0
    for member in group.members:
        values = effective(slots[member.key])
        if member.reads:
            continue
        others = [axis for axis in range(values.dim()) if axis != member.axis]
        alive = ((values != 0).any(dim=others) if others else values != 0).cpu()
        units = member.units[alive & (member.units >= 0)].unique()
        if values.dim() > 1:
            made[units] = True
        elif slots[member.key].name == "weight":
            hit = torch.zeros_like(scaled)
            hit[units] = True
            scaled &= hit | ~_present(member, group.count)
    return ~made | ~scaled


def _present(member: Member, count: int) -> Tensor:
    here = torch.zeros(count, dtype=torch.bool)
    here[member.units[member.units >= 0]] = True
    return here


def effective(slot: Slot) -> Tensor:
    """A tensor as the model uses it: with its mask, where it has one."""
    tensor = slot.tensor.detach()
    return tensor if slot.mask is None else masked(tensor, slot.mask.mask)


def _readers(group: Group, slots: Mapping[str, Slot]) -> list[Member] | None:
    """What reads a group, if these are all weights of plain layers; else None."""
    readers = [member for member in group.members if member.reads]
    plain = all(
        slots[m.key].name == "weight" and _axis_of(slots[m.key].module) == m.axis for m in readers
    )
    return readers if readers and plain else None


def _axis_of(module: nn.Module) -> int | None:
    """The axis of a layer's weight along which it reads its input, or None."""
    if isinstance(module, nn.Linear):
        return 1
    if is_transposed_linear(module):
        return 0
    return 1 if isinstance(module, ConvNd) else None


def _seen(
    model: nn.Module, readers: Mapping[str, Slot], batch: Batch, seed: int | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The least and greatest value of each input channel of each reader, in one run.

    Args:
        seed: to draw the inputs and all parameters that are not zero; None for those of the model.
    """
    spans: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(key: str) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            space = module.weight.dim() - 2 if isinstance(module, ConvNd) else 0
            axis = x.dim() - 1 - space
            flat = x.movedim(axis, -1).flatten(0, -2)
            low, high = flat.amin(0).cpu(), flat.amax(0).cpu()
            if key in spans:
                low, high = low.minimum(spans[key][0]), high.maximum(spans[key][1])
            spans[key] = low, high

        return look

    with ExitStack() as stack:
        stack.enter_context(left_as_is(model))
        stack.enter_context(modes.calibration_mode(model))
        stack.enter_context(torch.no_grad())
        for key, slot in readers.items():
            stack.callback(slot.module.register_forward_pre_hook(hook(key)).remove)
        if seed is None:
            batch.run(model)
        else:
            generator = torch.Generator().manual_seed(seed)
            drawn = {n: _drawn(p, generator) for n, p in model.named_parameters()}
            given = (batch.args, batch.kwargs)
            args, kwargs = pytree.tree_map(lambda value: _other(value, generator), given)
            torch.func.functional_call(model, drawn, args, kwargs)
    return spans


def _drawn(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Other values of a usual size where there are any, biases small: zeros stay zeros."""
    wide = parameter.numel() / max(1, len(parameter)) if parameter.dim() > 1 else 100.0
    values = torch.randn(parameter.shape, generator=generator) / wide**0.5
    drawn: Tensor = values.to(parameter) * (parameter.detach() != 0)
    return drawn


def _other(value: Any, generator: torch.Generator) -> Any:
    """An input of the same kind: numbers drawn, ids in another order."""
    if not isinstance(value, Tensor) or value.numel() < 2 or value.dtype == torch.bool:
        return value
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=generator).to(value)
        return value.mean() + (value.std() + 1) * noise
    order = torch.randperm(value.numel(), generator=generator).to(value.device)
    return value.flatten()[order].view(value.shape)


def _by_unit(columns: Tensor, member: Member, count: int) -> Tensor:
    """(count,) bool: units all of whose columns hold."""
    found = torch.ones(count, dtype=torch.bool)
    units = _of_inputs(member.units, columns)
    found[units[~columns & (units >= 0)]] = False
    return found


def _of_inputs(units: Tensor, inputs: Tensor) -> Tensor:
    """(inputs,) what is told of the inputs of one group, for those of all groups."""
    return units.repeat(len(inputs) // len(units))


def _foldable(
    group: Group,
    gone: Tensor,
    slots: Mapping[str, Slot],
    here: Mapping[str, tuple[Tensor, Tensor]],
    found: Constants,
) -> Tensor:
    """The units that can go, their constants noted as gains of what reads them."""
    for member in (m for m in group.members if m.reads):
        values = here[member.key][0]
        if problem := _why_not(slots[member.key].module):
            units = _of_inputs(member.units, values)
            alive = units[(values != 0) & (units >= 0)]
            stays = torch.zeros_like(gone)
            stays[alive] = True
            if (stays & gone).any():
                found.notes.append(
                    f"{group.name}: {int((stays & gone).sum())} {group.kind} are constant and not "
                    f"zero, and stay: {member.key.rpartition('.')[0]} reads them, which {problem}"
                )
            gone = gone & ~stays
    for member in (m for m in group.members if m.reads):
        values = here[member.key][0]
        columns = _of_inputs(member.indices(gone), values) & (values != 0)
        if columns.any():
            weight = effective(slots[member.key]).double().movedim(member.axis, -1)
            own = values.masked_fill(~columns, 0).to(weight).view(-1, weight.shape[-1])
            own = own.repeat_interleave(len(weight) // len(own), 0)  # of each row, by its group
            own = own.view(len(weight), *(1,) * (weight.dim() - 2), -1)
            gain = (weight.masked_fill(own == 0, 0) * own).flatten(1).sum(1)
            found.folds.append(Fold(member.key.removesuffix("weight") + "bias", gain, group))
    return gone


def _why_not(module: Any) -> str | None:
    """Why a constant cannot go into a layer's bias, or None."""
    if getattr(module, "bias", None) is None:
        return "has no bias to hold what they add"
    padded = isinstance(module, ConvNd) and module.padding_mode == "zeros"
    if padded and any(size > 1 for size in module.kernel_size) and _pads(module.padding):
        return "pads with zeros, so that they are not constant at the borders"
    return None


def _pads(padding: Any) -> bool:
    return padding != "valid" if isinstance(padding, str) else any(padding)


def folded(bias: Tensor, folds: Sequence[Fold]) -> Tensor:
    """A bias with what goes into it."""
    gain = sum((fold.gain for fold in folds[1:]), folds[0].gain)
    return (bias.double() + gain.to(bias.device)).to(bias.dtype)
