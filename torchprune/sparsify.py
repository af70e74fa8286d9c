"""`sparsify`: select, calibrate, score, mask, attach. The order of this file is the design."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from tqdm import tqdm

from torchprune import modes
from torchprune.allocation.allocate import allocated
from torchprune.calibration.batches import ACCEPTED_DATA, Batch, read_batches
from torchprune.calibration.block_calls import Ends, Unit
from torchprune.calibration.data import Data
from torchprune.calibration.lockstep import Calibration, Unsurveyed
from torchprune.calibration.same_problem import problem_of
from torchprune.calibration.sources import Unforeseen
from torchprune.calibration.survey import MOST_BATCHES, Survey, is_plain, survey
from torchprune.calibration.token_masks import TokenMask
from torchprune.checkpoint.decisions import Decisions
from torchprune.errors import CalibrationError, SpecError
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.shards import sharded_in, whole_of
from torchprune.masking.targets import Plan, make_plan
from torchprune.masking.transaction import Change, Changes, all_or_nothing
from torchprune.methods.decide import Decider, Part, decider_for, without_data
from torchprune.methods.reconstruct import Gain, reconstruct, summary_of
from torchprune.reports.report import RunRecord, remember_run
from torchprune.specs.functions import described
from torchprune.specs.goals import Goal
from torchprune.specs.options import Reconstruct
from torchprune.specs.spec import Spec
from torchprune.structure.budget_spec import BudgetSpec
from torchprune.structure.specs import LayerSpec, StructuredSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Model = TypeVar("Model", bound="nn.Module | ExportedProgram")


@on_ordinary_tensors
def sparsify(
    model: Model,
    spec: Spec | StructuredSpec | LayerSpec | BudgetSpec,
    data: Iterable[Any] | None = None,
    *,
    progress: bool = True,
    max_batches: int = 128,
    keep_dense: bool = False,
    reversible: bool = True,
    hold: torch.dtype | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    token_mask: TokenMask = None,
    path: str | os.PathLike[str] | None = None,
) -> Model:
    """Prune a model in place: every chosen layer gets a mask as a parametrization.

    Args:
        model: any module. Its training flags, hooks and settings are as before afterwards. Or an
            `ExportedProgram`, of which a new one with masks is returned; the given one stays as it
            is (`keep_dense`, `reversible` and `hold` do not apply, and data must be given).
        spec: `BestSpec`, or `MagnitudeSpec`, `WandaSpec`, `RIASpec`, `SparseGPTSpec` or `ADMMSpec`
            for single weights; `HeadSpec`, `NeuronSpec`, `ChannelSpec` or `LayerSpec` for whole
            units, which `torchprune.shrink` can then remove, or `BudgetSpec` for several kinds.
        data: calibration batches: any iterable whose items are tensors (passed positionally),
            tuples or lists (positional) or mappings (keywords); or a `datasets.Dataset`, each row
            of which is a batch of one. Padding does not count: where a batch holds a mask of it,
            its call runs once more with other content at the padding, and the rows that differ are
            left out. Columns that the model does not take are left out, with a note. Without data,
            a generative transformers model calibrates on text sampled from itself; `MagnitudeSpec`
            needs none. Texts, with a `tokenizer`: what `text_batches` takes.
        progress: show a progress bar over the layers.
        max_batches: read at most so many batches; all of them wait at each layer together, so
            memory grows with their number and size.
        keep_dense: keep the dense weights beside changed ones, so that `densify` can go back.
        reversible: keep the values that masks prune, packed, so that `densify` can go back where
            no others were changed. Without, a mask costs one bit a weight and nothing else.
        hold: `torch.bfloat16` or `torch.float16` to hold the float32 activations of waiting batches
            in half the memory; statistics then come from rounded inputs.
        seed: for the sampled text, or the windows of given texts.
        tokenizer: the model's own, for data that are texts: they become `max_batches` windows of
            as many tokens as the model's context holds, at most 2048.
        token_mask: which tokens count, instead of what is found out: the name of a column of the
            batches, a function of a batch (as it was given), or a sequence of a tensor a batch;
            each (batch, length), True where a token counts, or None to find out.
        path: a directory to keep decided layers in as they come, for methods that take data: after
            an interruption the same call goes on from there, to the same bits. The batches walk
            through the model again, and what was decided is not decided again. Refused for another
            model, spec, data or other options. Delete it when the result is saved. Not kept are
            CUDA's random numbers.

    Returns:
        the same model; for an `ExportedProgram` a new one.

    Raises:
        SpecError, TargetError: the spec does not fit the model. Nothing was touched.
        CalibrationError: no usable data, or a layer's statistics are not finite.
        CheckpointError: `path` holds something else, another run, or is damaged.
        InputError: texts that cannot be read, or that the tokenizer cannot take.
        Exception: whatever the model raises. After any error the model is as it was.
    """
    _check_request(spec, hold, keep_dense and not reversible)
    if path is not None:
        _check_kept(model, spec)
    calibration = Data(data, tokenizer, max_batches, seed, progress, token_mask)
    if type(model).__name__ == "ExportedProgram":
        for_modules = keep_dense or not reversible or hold is not None
        return cast(Model, _prune_program(model, spec, calibration, for_modules))
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be a Module or an ExportedProgram, got {type(model).__name__}")
    run = RunRecord(spec=spec)
    if isinstance(spec, Spec):
        _Weights(model, spec, calibration, run, keep_dense, reversible, hold, path=path).prune()
    else:
        _check_unsharded(model, spec)
        _prune_structures(model, spec, calibration, run, keep_dense, reversible, hold)
    remember_run(model, run)
    for warning in run.warnings:
        warnings.warn(warning, stacklevel=3)
    return model


def _check_request(spec: object, hold: object, contradictory: bool) -> None:
    if not isinstance(spec, Spec | StructuredSpec | LayerSpec | BudgetSpec) or type(spec) is Spec:
        got = f"the class {spec.__name__}" if isinstance(spec, type) else repr(spec)
        raise SpecError(
            "spec must be a MagnitudeSpec, WandaSpec, RIASpec, SparseGPTSpec, ADMMSpec, BestSpec, "
            "ScoreSpec, SolverSpec, HeadSpec, NeuronSpec, ChannelSpec, LayerSpec or BudgetSpec, "
            f"got {got}"
        )
    if hold not in (None, torch.bfloat16, torch.float16):
        raise SpecError(f"hold must be None, torch.bfloat16 or torch.float16, got {hold}")
    if contradictory:
        raise SpecError(
            "keep_dense=True keeps what densify needs and reversible=False drops it: give one of "
            "them"
        )


def _check_kept(model: object, spec: object) -> None:
    """Refuse to keep what nothing is kept of."""
    if not isinstance(model, nn.Module):
        raise SpecError(f"path keeps runs over a Module, got {type(model).__name__}; leave it out")
    if not isinstance(spec, Spec) or not spec.needs_data:
        why = "decides by weights alone" if isinstance(spec, Spec) else "decides all units at once"
        raise SpecError(
            f"path keeps layers as they are decided one after another on data, and "
            f"{type(spec).__name__} {why}; leave it out"
        )


def _check_unsharded(model: nn.Module, spec: object) -> None:
    """Refuse to calibrate a model of whose parameters each process holds a part."""
    name = sharded_in(model)
    if name is not None:
        raise SpecError(
            f"{type(spec).__name__} runs the model layer by layer, in step over all batches, and "
            f"{name} is sharded over processes, which cannot follow; sparsify before fully_shard, "
            "or give the masks of a whole copy to torchprune.apply_masks, or use MagnitudeSpec, "
            "which needs no data"
        )


# -- single weights of a module --------------------------------------------------------------------


@dataclass(eq=False)
class Way:
    """How far a model is on the way to its spec's zeros.

    Attributes:
        now, final: the share of zeros that it is to have, and the spec's own.
        goals: what each layer (by key) is to become in the end. An uneven allocation fills them
            the first time, so that layers keep their shares on the whole way.
    """

    now: float
    final: float
    goals: dict[str, Goal] = field(default_factory=dict)

    def of(self, plan: Plan) -> Plan:
        """The plan of what goes now."""
        for target in plan.targets:
            self.goals.setdefault(target.layer.key, target.goal)
        scaled = {key: goal.on_the_way(self.now, self.final) for key, goal in self.goals.items()}
        targets = [replace(t, goal=scaled[t.layer.key]) for t in plan.targets]
        return replace(plan, targets=targets)


@on_ordinary_tensors
def plan_of(model: nn.Module, spec: Spec, data: Data) -> tuple[Plan, RunRecord]:
    """What `sparsify` would prune, and the record of it, without pruning.

    Raises:
        SpecError, TargetError, CalibrationError: as `sparsify` does.
    """
    run = RunRecord(spec=spec)
    weights = _Weights(model, spec, data, run, False, False, None)
    if not spec.needs_data:
        return weights.plan(weights.seen_without_need()), run
    if is_plain(model):
        return weights.plan(), run
    batches, _ = data.read(model, type(spec).__name__, at_least=spec.windows)
    return weights.plan(survey(model, batches)), run


@on_ordinary_tensors
def prune_on_the_way(
    model: nn.Module, spec: Spec, data: Data, way: Way, *, reversible: bool
) -> RunRecord:
    """`sparsify`, as far as the way is gone. Not remembered: the record is returned.

    Raises:
        SpecError, TargetError, CalibrationError: as `sparsify` does. The model is as it was then.
    """
    run = RunRecord(spec=spec)
    _Weights(model, spec, data, run, False, reversible, None, way).prune()
    return run


@dataclass(eq=False)
class _Weights:
    """One call of `sparsify` for single weights of a module."""

    model: nn.Module
    spec: Spec
    data: Data
    run: RunRecord
    keep_dense: bool
    reversible: bool
    hold: torch.dtype | None
    way: Way | None = None
    path: str | os.PathLike[str] | None = None
    decisions: Decisions = field(default_factory=Decisions)

    def prune(self) -> None:
        """Select, calibrate, and in lockstep with that score, mask and attach."""
        if not self.spec.needs_data:
            self._by_weights_alone(self._on_the_way(self.plan(self.seen_without_need())))
            return
        _check_unsharded(self.model, self.spec)
        plain = is_plain(self.model)
        plan = self.plan() if plain else None  # refused, if it is, before any data are read
        asker, windows = type(self.spec).__name__, self.spec.windows
        batches, notes = self.data.read(self.model, asker, at_least=windows)
        self.run.notes += notes
        plan = plan or self.plan(survey(self.model, batches))
        if self.path is not None:
            asked = f"{described(self.spec)} hold={self.hold} seed={self.data.seed}"
            self.decisions = Decisions(self.path, problem_of(self.model, [batches], asked))
        notes = list(self.run.notes)
        try:
            self._by_data(plan, batches, surveyed=not plain)
        except Unsurveyed:
            again = "calibrated twice: some weights are read in part or several times"
            self.run.notes = [*notes, again]
            plan = self.plan(survey(self.model, batches))
            self._by_data(plan, batches, surveyed=True)

    def seen_without_need(self) -> Survey | None:
        """How the model reads its weights, where no data are needed: on the first batch given, or
        what transformers makes up, if one of them can be run."""
        if is_plain(self.model) or sharded_in(self.model) is not None:
            return None
        try:
            if self.data.given is not None:
                few = min(self.data.max_batches, MOST_BATCHES)
                batches, _ = replace(self.data, max_batches=few).read(self.model, "")
            else:
                made_up = getattr(self.model, "dummy_inputs", None)
                batches = read_batches([made_up], self.model, 1).batches
            return survey(self.model, batches)
        except Exception:  # nothing depends on it
            return None

    def plan(self, seen: Survey | None = None) -> Plan:
        seen = seen or Survey()
        plan = make_plan(self.model, self.spec, seen.readings, seen.gates)
        self.run.skipped, self.run.warnings = dict(plan.skipped), list(plan.warnings)
        _check_weights(plan, finite=self.spec.changes_weights or self.spec.needs_gram)
        return plan

    def _on_the_way(self, plan: Plan) -> Plan:
        return plan if self.way is None else self.way.of(plan)

    def _by_data(self, plan: Plan, batches: Sequence[Batch], *, surveyed: bool) -> None:
        model, spec, run = self.model, self.spec, self.run
        self.decisions.begin()
        if spec.uneven is not None and (self.way is None or not self.way.goals):
            allocate = partial(allocated, model, plan, spec, batches, progress=self.data.progress)
            plan, notes = self.decisions.allocation(plan, allocate)
            run.notes += notes
        plan = self._on_the_way(plan)
        own, notes = self.data.written_on(model, batches, spec.windows)
        run.notes += notes
        with self._permuted(plan, [*own, *batches]):
            self._in_lockstep(plan, own, batches, surveyed)

    def _by_weights_alone(self, plan: Plan) -> None:
        with modes.exact(), self._changing(plan) as changes:
            for change in without_data(plan.targets, self.spec):
                changes.stage(change)
                changes.settle()

    def _changing(self, plan: Plan) -> AbstractContextManager[Changes]:
        return all_or_nothing(plan.targets, keep_dense=self.keep_dense, reversible=self.reversible)

    def _permuted(self, plan: Plan, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        if not self.spec.permute:
            return nullcontext()
        from torchprune.structure.reorder import permuted  # torch.export takes a while to import

        return permuted(self.model, plan, self.spec, batches, self.run, hold=self.hold)

    def _in_lockstep(
        self, plan: Plan, own: Sequence[Batch], batches: Sequence[Batch], surveyed: bool
    ) -> None:
        """Calibrate foreseeing which layers share their inputs; where that fails, without."""
        for foresee in (True, False):
            self.decisions.begin()
            with suppress(Unforeseen), self._changing(plan) as changes:
                if not foresee:
                    self.run.notes.append(
                        "calibrated twice: layers that read one tensor in some blocks read "
                        "several in others of the same class"
                    )
                self._calibrate(plan, own, batches, changes, foresee=foresee, surveyed=surveyed)
                return

    def _calibrate(
        self,
        plan: Plan,
        own: Sequence[Batch],
        given: Sequence[Batch],
        changes: Changes,
        *,
        foresee: bool,
        surveyed: bool,
    ) -> None:
        """Run the batches in lockstep; at each stop decide the layers' changes and stage them."""
        spec, run, batches = self.spec, self.run, [*own, *given]
        decider = decider_for(spec, plan.targets, len(batches))
        gains: list[Gain] = []
        calibration = Calibration(
            self.model,
            plan.targets,
            batches,
            gram=spec.needs_gram,
            total=spec.needs_mean,
            blocks=plan.blocks,
            twice=spec.sequential == "block",
            foresee=foresee,
            surveyed=surveyed,
            hold=self.hold,
            cross=spec.alpha > 0,
            ends=self._training(plan, changes, len(own), gains),
            cap=spec.token_cap,
        )
        ahead = spec.sequential == "none"
        waiting = {target.layer.key: target for target in plan.targets}
        quiet = not self.data.progress
        bar = tqdm(total=len(waiting), desc=spec.label, unit="layer", disable=quiet)
        with calibration, bar:
            for stop in [calibration.collect()] if ahead else calibration.stops():
                changes.settle()
                with modes.exact():
                    for part in decider.parts(stop):
                        for change in self._decided(decider, part):
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

    def _decided(self, decider: Decider, part: Part) -> list[Change]:
        """The changes of layers of the same inputs, from an interrupted run if it kept them."""
        targets = [target for some, _ in part for target in some]
        return self.decisions.changes(
            targets, lambda: list(decider.decided(part)), decider.warnings
        )

    def _training(
        self, plan: Plan, changes: Changes, sampled: int, gains: list[Gain]
    ) -> Ends | None:
        """What trains each block once its layers are pruned, if the spec asks for it.

        The first `sampled` batches are the model's own text, which judges nothing.
        """
        options = self.spec.reconstruct
        if not isinstance(options, Reconstruct):
            return None

        def train(unit: Unit) -> None:
            changes.settle()
            with ExitStack() as stack:
                weights = []
                for target in unit.targets:
                    if (mask := target.mask) is not None:  # a layer that no batch reached has none
                        stack.enter_context(mask.transparent())
                        weights.append((target.weight, mask.mask))
                learn = partial(reconstruct, unit, weights, options, sampled=sampled)
                gains.append(self.decisions.training(unit.name, weights, learn))

        return Ends(plan.blocks or {"": self.model}, train, options.alpha)


def _check_weights(plan: Plan, *, finite: bool) -> None:
    for target in plan.targets:
        weight = whole_of(target.weight).detach()
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


# -- whole structures, programs --------------------------------------------------------------------


def _prune_structures(
    model: nn.Module,
    spec: StructuredSpec | LayerSpec | BudgetSpec,
    data: Data,
    run: RunRecord,
    keep_dense: bool,
    reversible: bool,
    hold: torch.dtype | None,
) -> None:
    # torch.export takes a while to import
    from torchprune.structure.blocks import prune_blocks
    from torchprune.structure.prune_units import prune_structures

    batches, notes = data.read(model, type(spec).__name__)
    run.notes += notes
    if isinstance(spec, LayerSpec):
        prune_blocks(model, spec, batches, run, progress=data.progress, reversible=reversible)
    elif isinstance(spec, BudgetSpec):
        from torchprune.allocation.budgeted import prune_to_budget
        from torchprune.structure.offers import offers_of

        run.notes += prune_to_budget(
            offers_of(model, spec, batches, run),
            spec,
            batches,
            progress=data.progress,
            keep_dense=keep_dense,
            reversible=reversible,
            hold=hold,
        )
    else:
        prune_structures(
            model,
            spec,
            batches,
            run,
            progress=data.progress,
            keep_dense=keep_dense,
            reversible=reversible,
            hold=hold,
        )


def _prune_program(
    program: Any,
    spec: Spec | StructuredSpec | LayerSpec | BudgetSpec,
    data: Data,
    for_modules: bool,
) -> Any:
    from torchprune.passes.prune_program import prune_program  # torch.export: as above

    if not isinstance(spec, Spec):
        raise SpecError(
            f"{type(spec).__name__} prunes modules, since a program's sizes are constants: "
            "sparsify and shrink the model, then export it"
        )
    if for_modules:
        raise SpecError(
            "keep_dense, reversible and hold are for modules; a program's own weights stay anyway"
        )
    if data.tokenizer is not None:
        raise CalibrationError(
            "tokenizer is for modules, whose context is known; give a program batches: "
            "text_batches(tokenizer, texts, length=...)"
        )
    batches: list[Batch] = []
    if spec.needs_data:
        if data.given is None:
            raise CalibrationError(
                f"{type(spec).__name__} needs calibration data for an ExportedProgram: "
                f"sparsify(program, spec, data). {ACCEPTED_DATA}"
            )
        taken = read_batches(data.given, program.module(), data.max_batches, data.token_mask)
        batches = taken.batches
    pruned, found = prune_program(program, spec, batches, progress=data.progress)
    for warning in found:
        warnings.warn(warning, stacklevel=4)  # through the decorator of `sparsify`
    return pruned
