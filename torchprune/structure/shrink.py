"""`shrink`: remove physically what a plan lists. All of it, or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

from torch import Tensor, nn

from torchprune.calibration.batches import Batch
from torchprune.errors import ShrinkError
from torchprune.masking.mask import detach, masked_layers, original_of
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.plain_state import Slot, slots_of
from torchprune.masking.selection import layers_of
from torchprune.modes import eval_mode
from torchprune.structure.config import (
    apply_settings,
    is_accepted,
    is_native,
    made_otherwise,
    native_settings,
    setting,
)
from torchprune.structure.conv_groups import groups_left
from torchprune.structure.cuts import cut
from torchprune.structure.generating import differing, generated
from torchprune.structure.narrowed import narrow, record_of
from torchprune.structure.refusals import told, without_refused
from torchprune.structure.resize import (
    Attributes,
    drop_blocks,
    guesses,
    key_heads,
    restate,
    set_attributes,
    told_by_none,
)
from torchprune.structure.same_outputs import (
    TOLERANCE,
    Fault,
    Seen,
    difference,
    fault_of,
    seen_of,
)
from torchprune.structure.shrink_plan import ShrinkPlan, check_fits
from torchprune.structure.size_record import Resized, keep_resized, resized_of
from torchprune.structure.snapshot import Snapshot
from torchprune.structure.stock import is_configured
from torchprune.structure.without_blocks import drop_configured

Model = TypeVar("Model", bound=nn.Module)


@on_ordinary_tensors
def shrink(model: Model, plan: ShrinkPlan) -> Model:
    """Remove what the plan lists, in place: the same modules with smaller tensors, fewer blocks.

    The law: outputs equal those of the masked model within rounding; on the plan's examples, in
    its modes, they are compared before this returns, and where the model generates, a few tokens
    after the first with its key-value cache. Masks on what stays stay; a mask that keeps everything
    goes. A transformers configuration is updated where it can say the new sizes. Parameters are new
    objects: make optimizers after shrinking.

    Args:
        plan: from `plan_shrink` for this model as it is.

    Returns:
        the same model; as it was, if the plan is empty.

    Raises:
        ShrinkError: the plan was made for another model, or the model's own code fails or computes
            otherwise with the new sizes; the message has the module that fails, the line of its
            code, and the layers to leave alone. The model is then as it was.
    """
    slots = slots_of(model)
    check_fits(plan, slots)
    if not plan:
        return model
    known = _known(model, plan)
    snapshot = Snapshot(model)
    try:
        _carry_out(model, plan, slots, known)
    except _RefusedError as refused:
        snapshot.restore()
        raise _explained(model, plan, refused.fault, known) from refused.__cause__
    except BaseException:
        snapshot.restore()
        raise
    for layer, mask in list(masked_layers(model)):
        if bool(mask.mask.all()):
            detach(layer.module, layer.tensor)
    with eval_mode(model, training=True):
        pass  # modules that keep something of their tensors in eval mode let go of it here
    return model


def accepted(model: nn.Module, plan: ShrinkPlan, slots: Mapping[str, Slot]) -> ShrinkPlan:
    """The part of a plan that the model's own code allows; the notes say what is left, and why.

    The removals are tried; the model stays as it is.

    Raises:
        ShrinkError: the model refuses whichever units go, as where blocks cannot.
    """
    known = _known(model, plan)
    fault = _tried(model, plan, known)
    if fault is None or plan.structure is None:
        return plan
    found = without_refused(plan, plan.structure, slots, fault, partial(_tried, model, known=known))
    if found is None:
        raise ShrinkError(f"the smaller {type(model).__name__} {fault}")
    rest, left = found
    notes = [f"left as it is: {one}; without them the model {one.fault}" for one in left]
    return replace(rest, notes=[*rest.notes, *notes])


class _RefusedError(ShrinkError):
    """The model's own code fails, or computes otherwise, with the new sizes."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


@dataclass(frozen=True, eq=False)
class _Known:
    """What a model gives before it is changed: outputs, and what it generates, if it can."""

    seen: list[Seen]
    spoken: list[Tensor] | None


def _known(model: nn.Module, plan: ShrinkPlan) -> _Known:
    return _Known(seen_of(model, plan.calls), _spoken(model, plan.example))


def _carry_out(
    model: nn.Module, plan: ShrinkPlan, slots: Mapping[str, Slot], known: _Known
) -> None:
    """Change the model; if this fails, it is left half changed."""
    shared_key = {path for path, m in model.named_modules() if key_heads(m) == 1}
    before = dict(model.named_modules())
    groups = groups_left(model, slots, plan.cuts)
    untold = {id(before[path]): values for path, values in told_by_none(before, plan.sizes).items()}
    recorded = _drop(model, plan.blocks, known.seen)
    now = {key: replace(s, tensor=original_of(s.module, s.name)) for key, s in slots.items()}
    cut(now, plan.cuts, plan.folds)  # tensors with a part for each block are shorter already
    for module in model.modules():
        restate(module, groups.get(id(module)))
        vars(module).update(untold.get(id(module), {}))
    for path, how, kept in plan.narrowed:
        narrow(before[path], how, kept)
    resized = _settled(model, plan, known.seen, shared_key, before)
    _check_generating(model, plan, known.spoken)
    untold.update({one: {**untold.get(one, {}), "groups": n} for one, n in groups.items()})
    attributes = _with_untold(model, resized.attributes, untold)
    _remember(
        model,
        replace(resized, drops=recorded, attributes=attributes, narrowed=record_of(model)),
        before,
    )


def _tried(model: nn.Module, plan: ShrinkPlan, known: _Known) -> Fault | None:
    """What is wrong once a plan is carried out. The model is left as it was."""
    snapshot = Snapshot(model)
    try:
        _carry_out(model, plan, slots_of(model), known)
    except _RefusedError as refused:
        return refused.fault
    finally:
        snapshot.restore()
    return None


def _explained(model: nn.Module, plan: ShrinkPlan, fault: Fault, known: _Known) -> ShrinkError:
    """The error of a refused plan: what it is that cannot go is found by trying."""
    name = type(model).__name__
    found = None
    if plan.structure is not None:
        tried = partial(_tried, model, known=known)
        found = without_refused(plan, plan.structure, slots_of(model), fault, tried)
    if found is None:
        what = ", ".join(plan.blocks) or "the units that go"
        return ShrinkError(
            f"without {what} the smaller {name} {fault}; keep some of them with ignore= in the "
            "spec that masked them"
        )
    layers = {layer.key for layer in layers_of(model)}
    return ShrinkError(told(name, fault, found[1], layers))


# -- tensors and blocks ----------------------------------------------------------------------------


def _drop(model: nn.Module, blocks: list[str], expected: list[Seen]) -> list[list[str]]:
    """Take blocks out. What to note of it: nothing, if the configuration says it."""
    if not blocks:
        return []
    if is_configured(model):
        drop_configured(model, blocks, lambda: str(difference(model, expected) or ""))
        return []
    drop_blocks(model, blocks)
    return [blocks]


# -- what the code asks for ------------------------------------------------------------------------


def _settled(
    model: nn.Module,
    plan: ShrinkPlan,
    expected: list[Seen],
    shared_key: set[str],
    before: Mapping[str, nn.Module],
) -> Resized:
    """Set the settings and attributes by which the model's code asks for the new sizes."""
    configured = bool(plan.removals) and is_configured(model)
    offered = native_settings(model, plan.removals) if configured else []
    first: _RefusedError | None = None
    for settings in [*offered, {}]:
        inner = Snapshot(model)
        kept, original = _configure(model, settings)
        try:
            attributes = _fit(model, plan, expected, shared_key, before)
            apart = _said(model, expected) if settings else {}
        except _RefusedError as refused:
            first = first or refused
        else:
            if apart is not None:
                paths = {*attributes, *apart}
                both = {p: {**attributes.get(p, {}), **apart.get(p, {})} for p in paths}
                return Resized([], both, kept, original)
        inner.restore()
    raise first or _RefusedError(Fault("has no sizes that fit"))


def _configure(
    model: nn.Module, settings: dict[str, object]
) -> tuple[dict[str, int], dict[str, int]]:
    """Update a transformers configuration.

    Returns:
        the settings that a file could not hold, since transformers would refuse them, and what
        they were.
    """
    if not settings:
        return {}, {}
    original = {name: setting(model.config, name) for name in settings}
    apply_settings(model.config, settings)
    if is_accepted(model) is None:
        return {}, {}
    if any("." in name for name in settings):  # a record has only the outer ones
        apply_settings(model.config, original)
        return {}, {}
    numbers = {name: old for name, old in original.items() if type(old) is int}
    return {name: cast(int, settings[name]) for name in numbers}, numbers


def _said(model: nn.Module, expected: list[Seen]) -> Attributes | None:
    """The numbers of modules that the configuration does not say: none, if the model computes the
    same with those that its class makes. None if it says wrong ones."""
    made, modules = made_otherwise(model), dict(model.named_modules())
    larger: Attributes = {}
    for path, values in made.items():
        held = vars(modules[path])
        if own := {n: held[n] for n, v in values.items() if v > held[n]}:
            larger[path] = own
    inner = Snapshot(model)
    for left_out in ({}, larger) if larger and not is_native(model) else ({},):
        set_attributes(modules, made)
        set_attributes(modules, left_out)
        fault = difference(model, expected)
        inner.restore()
        if fault is None:
            return left_out
    return None


def _fit(
    model: nn.Module,
    plan: ShrinkPlan,
    expected: list[Seen],
    shared_key: set[str],
    before: Mapping[str, nn.Module],
) -> Attributes:
    """Find the attributes by which the modules' code asks for the new sizes, and set them."""
    names = _renamed(model, before)
    modules = {old: model.get_submodule(new) for old, new in names.items()}
    first: Fault | None = None
    for attempt in _attempts(modules, plan, shared_key):
        inner = Snapshot(model)
        set_attributes(modules, attempt)
        fault = difference(model, expected)
        if fault is None:
            return {names[path]: values for path, values in attempt.items()}
        first = first or fault
        inner.restore()
    raise _RefusedError(first or Fault("has no sizes that fit"))


def _spoken(model: nn.Module, example: Batch) -> list[Tensor] | None:
    """What the model generates before it is changed; None if it cannot."""
    try:
        return generated(model, example)
    except Exception:  # whatever it misses in the example: nothing to compare with then
        return None


def _check_generating(model: nn.Module, plan: ShrinkPlan, spoken: list[Tensor] | None) -> None:
    if spoken is None:
        return
    try:
        found = generated(model, plan.example)
        tolerance = TOLERANCE.get(spoken[0].dtype, 1e-1)
        problem = "generates nothing" if found is None else differing(found, spoken, tolerance)
        fault = Fault(problem) if problem else None
    except Exception as error:
        fault = fault_of(model, error)
    if fault is not None:
        when = f"{fault.problem} when it generates with its cache"
        raise _RefusedError(replace(fault, problem=when))


def _renamed(model: nn.Module, before: Mapping[str, nn.Module]) -> dict[str, str]:
    """The names of modules before blocks went -> their names now; what is gone is absent."""
    now = {id(module): path for path, module in model.named_modules()}
    return {old: now[id(module)] for old, module in before.items() if id(module) in now}


def _attempts(
    modules: dict[str, nn.Module], plan: ShrinkPlan, shared_key: set[str]
) -> Iterator[Attributes]:
    seen: list[Attributes] = []
    for attempt in guesses(modules, plan.sizes, shared_key):
        if attempt not in seen:
            seen.append(attempt)
            yield attempt


# -- memory ----------------------------------------------------------------------------------------


def _with_untold(
    model: nn.Module, attributes: Attributes, untold: Mapping[int, Mapping[str, int]]
) -> Attributes:
    """Attributes, with those of modules by id which no tensor's shape tells."""
    own = {path: untold[id(m)] for path, m in model.named_modules() if id(m) in untold}
    return {p: {**attributes.get(p, {}), **own.get(p, {})} for p in sorted({*attributes, *own})}


def _remember(model: nn.Module, record: Resized, before: Mapping[str, nn.Module]) -> None:
    """Note on the model what its class and configuration do not say, for `torchprune.save`."""
    earlier = resized_of(model)
    if earlier is not None:
        record = earlier.followed_by(record, _renamed(model, before))
    if is_configured(model) and not record.settings and is_native(model):
        keep_resized(model, None)
    else:
        keep_resized(model, record)
