"""`sparsify`: select, calibrate, score, mask, attach. The order of this file is the design."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from tqdm import tqdm

from torchprune import modes
from torchprune.allocation.allocate import allocated
from torchprune.calibration.batches import ACCEPTED_DATA, Batch, read_batches
from torchprune.calibration.block_calls import Ends, Unit
from torchprune.calibration.lockstep import Calibration, Unforeseen
from torchprune.calibration.synthesis import (
    SEQUENCES,
    can_synthesise,
    continuations,
    synthesise,
    windows_of,
)
from torchprune.calibration.text import LONGEST, context_of, longest_of, text_batches
from torchprune.errors import CalibrationError, SpecError
from torchprune.masking.targets import Plan, make_plan
from torchprune.masking.transaction import Changes, all_or_nothing
from torchprune.methods.decide import by_magnitude, decider_for
from torchprune.methods.reconstruct import Gain, reconstruct, summary_of
from torchprune.reports.report import RunRecord, remember_run
from torchprune.specs.methods import Spec
from torchprune.specs.options import Reconstruct
from torchprune.specs.structured import LayerSpec, StructuredSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Model = TypeVar("Model", bound="nn.Module | ExportedProgram")


def sparsify(
    model: Model,
    spec: Spec | StructuredSpec | LayerSpec,
    data: Iterable[Any] | None = None,
    *,
    progress: bool = True,
    max_batches: int = 128,
    keep_dense: bool = False,
    hold: torch.dtype | None = None,
    seed: int = 0,
    tokenizer: Any = None,
) -> Model:
    """Prune a model in place: every chosen layer gets a mask as a parametrization.

    Args:
        model: any module. Its training flags, hooks and settings are as before afterwards. Or an
            `ExportedProgram`, of which a new one with masks is returned; the given one stays as it
            is (`keep_dense` and `hold` do not apply, and data must be given).
        spec: `BestSpec`, or `MagnitudeSpec`, `WandaSpec`, `RIASpec`, `SparseGPTSpec` or `ADMMSpec`
            for single weights; `HeadSpec`, `NeuronSpec`, `ChannelSpec` or `LayerSpec` for whole
            units, which `torchprune.shrink` can then remove.
        data: calibration batches: any iterable whose items are tensors (passed positionally),
            tuples or lists (positional) or mappings (keywords). Tokens that a batch's
            `attention_mask` excludes do not count. Without data, a generative transformers model
            calibrates on text sampled from itself; `MagnitudeSpec` needs none. Texts, with a
            `tokenizer`: what `text_batches` takes.
        progress: show a progress bar over the layers.
        max_batches: read at most so many batches; all of them wait at each layer together, so
            memory grows with their number and size.
        keep_dense: keep the dense weights beside changed ones, so that `densify` can go back.
        hold: `torch.bfloat16` or `torch.float16` to hold the float32 activations of waiting batches
            in half the memory; statistics then come from rounded inputs.
        seed: for the sampled text, or the windows of given texts.
        tokenizer: the model's own, for data that are texts: they become `max_batches` windows of
            as many tokens as the model's context holds, at most 2048.

    Returns:
        the same model; for an `ExportedProgram` a new one.

    Raises:
        SpecError, TargetError: the spec does not fit the model. Nothing was touched.
        CalibrationError: no usable data, or a layer's statistics are not finite.
        InputError: texts that cannot be read, or that the tokenizer cannot take.
        Exception: whatever the model raises. After any error the model is as it was.
    """
    if not isinstance(spec, Spec | StructuredSpec | LayerSpec) or type(spec) is Spec:
        got = f"the class {spec.__name__}" if isinstance(spec, type) else repr(spec)
        raise SpecError(
            "spec must be a MagnitudeSpec, WandaSpec, RIASpec, SparseGPTSpec, ADMMSpec, BestSpec, "
            f"HeadSpec, NeuronSpec, ChannelSpec or LayerSpec, got {got}"
        )
    if hold not in (None, torch.bfloat16, torch.float16):
        raise SpecError(f"hold must be None, torch.bfloat16 or torch.float16, got {hold}")
    if type(model).__name__ == "ExportedProgram":
        if not isinstance(spec, Spec):
            raise SpecError(
                f"{type(spec).__name__} prunes modules, since a program's sizes are constants: "
                "sparsify and shrink the model, then export it"
            )
        if tokenizer is not None:
            raise CalibrationError(
                "tokenizer is for modules, whose context is known; give a program batches: "
                "text_batches(tokenizer, texts, length=...)"
            )
        options = keep_dense or hold is not None
        return cast(Model, _pruned_program(model, spec, data, max_batches, progress, options))
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be a Module or an ExportedProgram, got {type(model).__name__}")
    if not isinstance(spec, Spec):
        _prune_structures(
            model, spec, data, max_batches, seed, keep_dense, hold, progress, tokenizer
        )
        return model
    plan = make_plan(model, spec)
    _check_weights(plan, finite=spec.changes_weights or spec.needs_gram)
    run = RunRecord(spec=spec, skipped=dict(plan.skipped))
    if not spec.needs_data:
        with modes.exact(), all_or_nothing(plan.targets, keep_dense=keep_dense) as changes:
            for change in by_magnitude(plan.targets, spec):
                changes.stage(change)
                changes.settle()
    else:
        batches = _calibration_batches(
            model, spec, data, max_batches, seed, progress, run, tokenizer
        )
        plan, notes = allocated(model, plan, spec, batches, progress=progress)
        run.notes += notes
        own = _own_text(model, spec, batches, seed, progress, run)
        batches = [*own, *batches]
        with _permuted(model, plan, spec, batches, run, hold):
            for foresee in (True, False):
                with (
                    suppress(Unforeseen),
                    all_or_nothing(plan.targets, keep_dense=keep_dense) as changes,
                ):
                    if not foresee:
                        run.notes.append(
                            "calibrated twice: layers that read one tensor in some blocks read "
                            "several in others of the same class"
                        )
                    _calibrate(
                        model, plan, spec, batches, len(own), changes, run, foresee, hold, progress
                    )
                    break
    remember_run(model, run)
    for warning in run.warnings:
        warnings.warn(warning, stacklevel=2)
    return model


def _permuted(
    model: nn.Module,
    plan: Plan,
    spec: Spec,
    batches: Sequence[Batch],
    run: RunRecord,
    hold: torch.dtype | None,
) -> AbstractContextManager[None]:
    if not spec.permute:
        return nullcontext()
    from torchprune.structure.reorder import permuted  # torch.export takes a while to import

    return permuted(model, plan, spec, batches, run, hold=hold)


def _prune_structures(
    model: nn.Module,
    spec: StructuredSpec | LayerSpec,
    data: Iterable[Any] | None,
    max_batches: int,
    seed: int,
    keep_dense: bool,
    hold: torch.dtype | None,
    progress: bool,
    tokenizer: Any,
) -> None:
    from torchprune.structure.blocks import prune_blocks
    from torchprune.structure.prune_units import (
        prune_structures,  # torch.export takes a while to import
    )

    run = RunRecord(spec=spec)
    batches = _calibration_batches(model, spec, data, max_batches, seed, progress, run, tokenizer)
    if isinstance(spec, LayerSpec):
        prune_blocks(model, spec, batches, run, progress=progress)
    else:
        prune_structures(
            model, spec, batches, run, progress=progress, keep_dense=keep_dense, hold=hold
        )
    remember_run(model, run)
    for warning in run.warnings:
        warnings.warn(warning, stacklevel=3)


def _pruned_program(
    program: Any,
    spec: Spec,
    data: Iterable[Any] | None,
    max_batches: int,
    progress: bool,
    options: bool,
) -> Any:
    from torchprune.passes.prune_program import (
        prune_program,  # torch.export takes a while to import
    )

    if options:
        raise SpecError("keep_dense and hold are for modules; a program's own weights stay anyway")
    batches: list[Batch] = []
    if spec.needs_data:
        if data is None:
            raise CalibrationError(
                f"{type(spec).__name__} needs calibration data for an ExportedProgram: "
                f"sparsify(program, spec, data). {ACCEPTED_DATA}"
            )
        batches, _ = read_batches(data, program.module(), max_batches)
    pruned, found = prune_program(program, spec, batches, progress=progress)
    for warning in found:
        warnings.warn(warning, stacklevel=3)
    return pruned


def _calibrate(
    model: nn.Module,
    plan: Plan,
    spec: Spec,
    batches: Sequence[Batch],
    own: int,
    changes: Changes,
    run: RunRecord,
    foresee: bool,
    hold: torch.dtype | None,
    progress: bool,
) -> None:
    """Run the batches in lockstep; at each stop decide the layers' changes and stage them.

    The first `own` batches are the model's own text.
    """
    decider = decider_for(spec, plan.targets, len(batches))
    gains: list[Gain] = []
    options, ends = spec.reconstruct, None
    if isinstance(options, Reconstruct):

        def train(unit: Unit) -> None:
            changes.settle()
            with ExitStack() as stack:
                weights = []
                for target in unit.targets:
                    if (mask := target.mask) is not None:  # a layer that no batch reached has none
                        stack.enter_context(mask.transparent())
                        weights.append((target.weight, mask.whole()))
                gains.append(reconstruct(unit, weights, options, sampled=own))

        ends = Ends(plan.blocks or {"": model}, train, options.alpha)
    calibration = Calibration(
        model,
        plan.targets,
        batches,
        gram=spec.needs_gram,
        blocks=plan.blocks,
        twice=spec.sequential == "block",
        foresee=foresee,
        hold=hold,
        cross=spec.alpha > 0,
        ends=ends,
        cap=spec.token_cap,
    )
    waiting = {target.layer.key: target for target in plan.targets}
    bar = tqdm(total=len(waiting), desc=spec.method, unit="layer", disable=not progress)
    with calibration, bar:
        stops = iter([calibration.collect()]) if spec.sequential == "none" else calibration.stops()
        for stop in stops:
            changes.settle()
            with modes.exact():
                for change in decider.changes(stop):
                    changes.stage(change)
                    del waiting[change.target.layer.key]
                    bar.update()
    changes.settle()
    with modes.exact():
        for target in waiting.values():
            changes.stage(decider.unreached(target))
    run.finish(batches=len(batches), usage=calibration.usage)
    run.warnings.extend(decider.warnings)
    if gains:
        run.notes.append(summary_of(gains))


def _calibration_batches(
    model: nn.Module,
    spec: Spec | StructuredSpec | LayerSpec,
    data: Iterable[Any] | None,
    max_batches: int,
    seed: int,
    progress: bool,
    run: RunRecord,
    tokenizer: Any,
) -> list[Batch]:
    if data is None:
        if not can_synthesise(model):
            raise CalibrationError(
                f"{type(spec).__name__} needs calibration data for a {type(model).__name__}: "
                f"sparsify(model, spec, data). {ACCEPTED_DATA}. (Only decoder-only transformers "
                "language models can calibrate on text of their own; MagnitudeSpec needs no data.)"
            )
        sequences = max(SEQUENCES, spec.windows if isinstance(spec, Spec) else 0)
        data = synthesise(model, sequences=sequences, seed=seed, progress=progress)
        run.notes.append("calibrated on text sampled from the model itself")
    elif tokenizer is not None:
        length = min(LONGEST, context_of(model) or LONGEST, longest_of(tokenizer))
        data = text_batches(tokenizer, data, samples=max_batches, length=length, seed=seed)
        size = data[0]["input_ids"].shape[1]
        run.notes.append(f"calibrated on {len(data)} windows of {size} tokens of the given texts")
    batches, more = read_batches(data, model, max_batches)
    if more:
        run.notes.append(f"used the first {max_batches} batches; more were offered (max_batches)")
    return batches


def _own_text(
    model: nn.Module,
    spec: Spec,
    batches: Sequence[Batch],
    seed: int,
    progress: bool,
    run: RunRecord,
) -> list[Batch]:
    """What the model adds to its calibration text, for specs that want more than was given."""
    if not spec.windows:
        return []
    given = len(windows_of(batches)) if can_synthesise(model) else 0
    missing = spec.windows - given
    if not given:
        run.notes.append(
            "no text was added to the calibration data: that takes a decoder-only transformers "
            "language model and batches of token ids"
        )
        return []
    if missing <= 0:
        return []
    own = continuations(model, batches, missing, seed=seed, progress=progress)
    run.notes.append(f"{missing} calibration windows more were sampled as continuations of {given}")
    return own


def _check_weights(plan: Plan, *, finite: bool) -> None:
    for target in plan.targets:
        weight = target.weight.detach()
        if weight.element_size() == 1:  # eight-bit floats cannot be compared
            weight = weight.float()
        extremes = torch.stack(weight.aminmax())  # both NaN if any weight is, and one pass
        if bool((~extremes.isfinite() if finite else extremes.isnan()).any()):
            bad = ~weight.isfinite() if finite else weight.isnan()
            what = "inf or NaN" if finite else "NaN"
            raise SpecError(
                f"{target.name}: its weight holds {what} at {int(bad.sum())} of {weight.numel()} "
                "places; repair it or ignore the layer"
            )
