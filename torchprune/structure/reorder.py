"""Permuting channels before n:m masks, where that leaves the model's function as it is.

A group of an n:m pattern holds m neighbouring inputs of a layer. Where those inputs are neurons of
an MLP or channels of a head's values, they may change places if the outputs of the layers that make
them change places alike. The pattern runs along inputs, so the masks of those layers only have
their rows moved. Nothing is left to compute at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.lockstep import Calibration
from torchprune.calibration.moments import Moments
from torchprune.errors import SpecError
from torchprune.graph.capture import Call, exported
from torchprune.graph.groups import Structure, read_groups
from torchprune.graph.trace import trace_program
from torchprune.masking.mask import masked_layers
from torchprune.masking.plain_state import Slot, obstacle, slots_of
from torchprune.masking.targets import Plan, Target
from torchprune.methods.decide import group_scores, groups_of
from torchprune.methods.permute import best_order, retained
from torchprune.reports.report import RunRecord
from torchprune.specs.patterns import NM
from torchprune.specs.spec import Spec
from torchprune.structure.channels import Channels, Place, neurons
from torchprune.structure.head_values import head_values

Score = Callable[[str, int], Tensor]
"""(tensor key, group of its view) -> (rows, cols) what each weight is worth."""


@dataclass(eq=False)
class _Chosen:
    """A new order of some channels, and what the pattern retains of their readers' scores.

    Attributes:
        layer: the name of a layer that reads them.
        total, before, after: sums of scores: all, and those retained.
    """

    channels: Channels
    layer: str
    order: Tensor
    total: float
    before: float
    after: float


@contextmanager
def permuted(
    model: nn.Module,
    plan: Plan,
    spec: Spec,
    batches: Sequence[Batch],
    run: RunRecord,
    *,
    hold: torch.dtype | None,
) -> Iterator[None]:
    """Put the inputs of n:m layers in orders in which more survives; after an error, back again.

    Weights, biases and buffers move within their own memory. The orders are chosen by the method's
    own scores (Wanda's, for methods that change weights) on the dense model, squared.

    Raises:
        SpecError: the model carries masks already.
        ShrinkError: the model cannot be exported, so its structure cannot be read.
        CalibrationError: a layer's statistics are not finite.
    """
    if (held := next(masked_layers(model), None)) is not None:
        raise SpecError(
            f"{type(spec).__name__}: permute moves weights, and {held[0].name} carries a mask "
            "already; torchprune.densify(model) or fold(model) first"
        )
    program = exported(model, Call(batches[0]))
    structure = read_groups(model, trace_program(model, program))
    found = [*neurons(structure, dict(model.named_modules())), *head_values(model, program)]
    slots, reasons = slots_of(model), dict[str, str]()
    owners = _owners(slots)
    readers = {t.layer.key: t for t in plan.targets if isinstance(t.goal.pattern, NM)}
    usable = [c for c in found if _is_usable(c, readers, slots, owners, reasons)]
    used = {p.key for c in usable for p in c.places if p.key in readers and p.reads}
    read = [target for key, target in readers.items() if key in used]
    score = _scores(spec, read, _inputs(model, plan, spec, read, batches, hold))
    with modes.exact():
        chosen = [_choose(channels, readers, score) for channels in usable]
    left = {
        target.name: reasons.get(key) or _why(key, target, structure)
        for key, target in readers.items()
        if key not in used
    }
    run.notes += _notes(chosen, left)
    done: list[tuple[Place, Tensor]] = []
    try:
        with modes.exact():
            for choice in chosen:
                for place in choice.channels.places if choice.after > choice.before else ():
                    place.reorder(slots[place.key].tensor, choice.order)
                    done.append((place, choice.order))
        yield
    except BaseException:
        with modes.exact():
            for place, order in reversed(done):
                place.reorder(slots[place.key].tensor, order.argsort())
        raise


def _is_usable(
    channels: Channels,
    readers: dict[str, Target],
    slots: dict[str, Slot],
    owners: dict[int, list[str]],
    reasons: dict[str, str],
) -> bool:
    """Whether an n:m layer reads the channels in whole groups, and all their tensors can move."""
    reads = [p for p in channels.places if p.reads and p.key in readers]
    if not reads:
        return False
    why = next((w for p in channels.places if (w := _obstacle(p.key, slots, owners))), None)
    patterns = {readers[p.key].goal.pattern for p in reads}
    if len(patterns) > 1:
        why = "layers of different patterns read its inputs"
    elif not all(_in_groups(p.index, _pattern(readers[p.key]).m) for p in reads):
        why = "groups of its pattern reach across the channels that may change places"
    if why:
        reasons.update(dict.fromkeys((p.key for p in reads), why))
    return why is None


def _pattern(target: Target) -> NM:
    assert isinstance(target.goal.pattern, NM)
    return target.goal.pattern


def _in_groups(index: Tensor, m: int) -> bool:
    """Whether every m neighbours of (copies, count) positions are a whole group, in order."""
    if index.shape[1] % m:
        return False
    groups = index.reshape(-1, m)
    first = groups[:, :1]
    return bool((first % m == 0).all()) and torch.equal(groups, first + torch.arange(m))


def _owners(slots: Mapping[str, Slot]) -> dict[int, list[str]]:
    """The tensors that lie in each storage, by its address."""
    owners: dict[int, list[str]] = {}
    for key, slot in slots.items():
        if obstacle(slot.tensor) is None:
            owners.setdefault(slot.tensor.untyped_storage().data_ptr(), []).append(key)
    return owners


def _obstacle(key: str, slots: Mapping[str, Slot], owners: Mapping[int, list[str]]) -> str | None:
    """Why the values of a tensor cannot be moved in place, or None."""
    tensor = slots[key].tensor
    if why := obstacle(tensor):
        return f"{key} {why}"
    if others := [k for k in owners[tensor.untyped_storage().data_ptr()] if k != key]:
        return f"{key} shares its memory with {', '.join(others[:3])}"
    if any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        return f"{key} is an expanded tensor"
    return None


def _why(key: str, target: Target, structure: Structure) -> str:
    """Why no channels were found among a layer's inputs."""
    axis = 1 if target.view.kind == "conv" else target.view.order[-1]
    for frozen in structure.frozen:
        if (frozen.key, frozen.axis) == (key, axis):
            return f"its inputs are frozen by {frozen.why}"
    kinds = {g.kind for g in structure.groups for m in g.members if m.key == key and m.reads}
    if "heads" in kinds:
        return "its inputs are no values of attention that one layer makes and nothing else reads"
    if "channels" in kinds:
        return "its inputs are channels of convolutions"
    return "its inputs do not all pass through the same operators"


# -- choosing --------------------------------------------------------------------------------------


def _inputs(
    model: nn.Module,
    plan: Plan,
    spec: Spec,
    targets: Sequence[Target],
    batches: Sequence[Batch],
    hold: torch.dtype | None,
) -> dict[str, Moments]:
    """Statistics of the layers' inputs on the dense model, by layer key."""
    if spec.needs == "nothing" or not targets:
        return {}
    calibration = Calibration(
        model,
        targets,
        batches,
        gram=spec.needs == "gram",
        total=spec.needs_mean,
        blocks=plan.blocks,
        foresee=False,
        hold=hold,
        cap=spec.token_cap,
    )
    found: dict[str, Moments] = {}
    with calibration:  # nothing is changed at the stops, and the model's tail is not run
        for stop in calibration.stops():
            found |= {target.layer.key: _without_samples(moments) for target, moments in stop}
    return found


def _without_samples(moments: Moments) -> Moments:
    """The statistics alone: sampled rows of all layers together would be large."""
    return replace(moments, sample=[[] for _ in moments.rows])


def _scores(spec: Spec, targets: Sequence[Target], inputs: Mapping[str, Moments]) -> Score:
    by_key = {target.layer.key: target for target in targets}

    @lru_cache(maxsize=1)  # the heads of one layer follow one another
    def score(key: str, group: int) -> Tensor:
        target = by_key[key]
        weight = groups_of(target)[group]
        return group_scores(spec, target.name, weight, inputs.get(key), group).square()

    return score


def _choose(channels: Channels, readers: Mapping[str, Target], score: Score) -> _Chosen:
    reads = [p for p in channels.places if p.reads and p.key in readers]
    parts = [
        score(place.key, group)[:, copy]
        for place in reads
        for group in (
            range(readers[place.key].view.groups) if place.expert is None else [place.expert]
        )
        for copy in place.index
    ]
    whole = torch.cat(parts)
    target = readers[reads[0].key]
    pattern = _pattern(target)
    order = best_order(whole, pattern)
    return _Chosen(
        channels,
        target.name,
        order,
        float(whole.sum(dtype=torch.float64)),
        retained(whole, pattern),
        retained(whole[:, order], pattern),
    )


def _notes(chosen: Sequence[_Chosen], left: Mapping[str, str]) -> list[str]:
    """What was permuted and what that gained; what was not, and why."""
    notes, gains, whys = [], [], dict[str, list[str]]()
    for layer in dict.fromkeys(choice.layer for choice in chosen):
        own = [choice for choice in chosen if choice.layer == layer]
        total = sum(c.total for c in own) or 1.0
        before, after = sum(c.before for c in own) / total, sum(c.after for c in own) / total
        if after > before:
            gains.append(f"{layer} {before:.4f} -> {after:.4f}")
        else:
            whys.setdefault("no order of its inputs was found that retains more", []).append(layer)
    if gains:
        notes.append(f"permuted inputs; retained share of squared scores: {', '.join(gains)}")
    for layer, why in left.items():
        whys.setdefault(why, []).append(layer)
    for why, layers in whys.items():
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        notes.append(f"not permuted: {', '.join(layers[:3])}{more}: {why}")
    return notes
