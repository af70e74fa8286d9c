"""`sparsify`: select, calibrate, score, mask, attach. The order of this file is the design."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from torchprune import ambient
from torchprune.batches import ACCEPTED_DATA, Batch, read_batches
from torchprune.errors import CalibrationError, SpecError
from torchprune.lockstep import Calibration, Usage
from torchprune.masking import Mask, Record, attach, detach, mask_of
from torchprune.methods.magnitude import magnitude_score
from torchprune.methods.sparsegpt import Factor, factorise, sparsegpt
from torchprune.methods.wanda import wanda_score
from torchprune.moments import Moments
from torchprune.plan import Plan, Target, make_plan
from torchprune.projection import BARRED, project, project_each
from torchprune.report import RunRecord, remember_run
from torchprune.specs import MagnitudeSpec, SparseGPTSpec, Spec, WandaSpec
from torchprune.synthesis import can_synthesise, synthesise

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model,
    spec: Spec,
    data: Iterable[Any] | None = None,
    *,
    progress: bool = True,
    max_batches: int = 128,
    keep_dense: bool = False,
    hold: torch.dtype | None = None,
    seed: int = 0,
) -> Model:
    """Prune a model in place: every chosen layer gets a mask as a parametrization.

    Args:
        model: any module. Its training flags, hooks and settings are as before afterwards.
        spec: `MagnitudeSpec`, `WandaSpec` or `SparseGPTSpec`.
        data: calibration batches: any iterable whose items are tensors (passed positionally),
            tuples or lists (positional) or mappings (keywords). Tokens that a batch's
            `attention_mask` excludes do not count. Without data, a generative transformers model
            calibrates on text sampled from itself; `MagnitudeSpec` needs none.
        progress: show a progress bar over the layers.
        max_batches: read at most so many batches; all of them wait at each layer together, so
            memory grows with their number and size.
        keep_dense: keep the dense weights beside changed ones, so that `densify` can go back.
        hold: `torch.bfloat16` or `torch.float16` to hold the float32 activations of waiting batches
            in half the memory; statistics then come from rounded inputs.
        seed: for the sampled text.

    Returns:
        the same model.

    Raises:
        SpecError, TargetError: the spec does not fit the model. Nothing was touched.
        CalibrationError: no usable data, or a layer's statistics are not finite.
        Exception: whatever the model raises. After any error the model is as it was.
    """
    if not isinstance(spec, MagnitudeSpec | WandaSpec | SparseGPTSpec):
        raise SpecError(
            "spec must be a MagnitudeSpec, WandaSpec or SparseGPTSpec, "
            f"got {type(spec).__name__ if not isinstance(spec, type) else f'the class {spec.__name__} itself'}"
        )
    if hold not in (None, torch.bfloat16, torch.float16):
        raise SpecError(f"hold must be None, torch.bfloat16 or torch.float16, got {hold}")
    plan = make_plan(model, spec)
    _check_weights(plan, finite=isinstance(spec, SparseGPTSpec))
    run = RunRecord(spec=spec, skipped=dict(plan.skipped))
    with ambient.exact(), _all_or_nothing(keep_dense=keep_dense) as changes:
        if isinstance(spec, MagnitudeSpec):
            for target, mask in zip(plan.targets, _magnitude_masks(plan.targets, spec), strict=True):
                changes.stage(Change(target, mask, Record(spec.method, str(target.goal))))
        else:
            batches = _calibration_batches(model, spec, data, max_batches, seed, progress, run)
            _calibrate(model, plan, spec, batches, changes, run, hold=hold, progress=progress)
    remember_run(model, run)
    for warning in run.warnings:
        warnings.warn(warning, stacklevel=2)
    return model


# -- calibration ---------------------------------------------------------------------------------


def _calibrate(
    model: nn.Module,
    plan: Plan,
    spec: WandaSpec | SparseGPTSpec,
    batches: list[Batch],
    changes: Changes,
    run: RunRecord,
    *,
    hold: torch.dtype | None,
    progress: bool,
) -> None:
    blocks = list(plan.blocks.values()) if spec.sequential == "block" else []
    prune = _Pruner(spec, len(batches))
    reached: set[str] = set()
    calibration = Calibration(
        model,
        plan.targets,
        batches,
        gram=isinstance(spec, SparseGPTSpec),
        blocks=blocks,
        hold=hold,
    )
    with calibration, tqdm(
        total=len(plan.targets), desc=spec.method, unit="layer", disable=not progress
    ) as bar:
        stops = iter([calibration.collect()]) if spec.sequential == "none" else calibration.stops()
        for stop in stops:
            changes.settle()
            for change in prune.stop(stop):
                changes.stage(change)
                reached.add(change.target.layer.key)
                bar.update()
        changes.settle()
        for target in plan.targets:
            if target.layer.key not in reached:
                changes.stage(prune.unreached(target))
                bar.update()
    run.finish(batches=len(batches), usage=calibration.usage)
    run.warnings.extend(prune.warnings)


@dataclass
class _Pruner:
    """Turns statistics into changes, one layer at a time."""

    spec: WandaSpec | SparseGPTSpec
    batches: int
    warnings: list[str] = field(default_factory=list)
    _factors: dict[int, Factor] = field(default_factory=dict)
    _of: Moments | None = None

    def stop(self, stop: list[tuple[Target, Moments]]) -> Iterator[Change]:
        """The changes of one stop's layers."""
        if self.spec.scope == "global":
            yield from self._together(stop)
            return
        for target, moments in stop:
            yield self._prune(target, moments)

    def unreached(self, target: Target) -> Change:
        """The change of a layer no batch reached: by magnitude, and said so."""
        note = "no calibration batch reached it: pruned by magnitude"
        self.warnings.append(f"{target.name}: {note}")
        score = torch.stack([_barred(target, g, magnitude_score(w)) for g, w in _groups(target)])
        return Change(
            target,
            _project(target, score, self.spec.scope),
            Record("magnitude", str(target.goal), tokens=0, note=note),
        )

    def _together(self, stop: list[tuple[Target, Moments]]) -> Iterator[Change]:
        scores = [
            _barred(target, g, wanda_score(w, moments.square[g]))
            for target, moments in stop
            for g, w in _groups(target)
        ]
        goal = self.spec.goal
        masks = iter(project_each(scores, goal.pattern, goal.sparsity, "global"))
        for target, moments in stop:
            keep = torch.stack([next(masks) for _ in range(target.view.groups)])
            yield self._change(target, moments, keep, None, [])

    def _prune(self, target: Target, moments: Moments) -> Change:
        keeps, values, notes = [], [], []
        idle = [g for g, rows in enumerate(moments.rows) if not rows]
        if idle:
            which = "experts" if target.view.kind.startswith("experts") else "groups"
            note = f"no tokens reached {which} {_few(idle)}: pruned by magnitude"
            self.warnings.append(f"{target.name}: {note}")
            notes.append(note)
        if moments.batches < self.batches:
            notes.append(f"reached by {moments.batches} of {self.batches} batches")
        for g, weight in _groups(target):
            if g in idle:
                keeps.append(_project_one(target, _barred(target, g, magnitude_score(weight)), self.spec))
                values.append(weight.float())
            elif isinstance(self.spec, SparseGPTSpec):
                factor = self._factor(target, moments, g)
                if factor.damping != self.spec.damping:
                    notes.append(f"damping raised to {factor.damping:g} to factorise")
                value, keep = sparsegpt(
                    weight,
                    factor,
                    target.goal.pattern,
                    target.goal.sparsity,
                    self.spec.scope or "layer",
                    self.spec.block_size,
                    _bar(target, g),
                )
                keeps.append(keep)
                values.append(value)
            else:
                score = _barred(target, g, wanda_score(weight, moments.square[g]))
                keeps.append(_project_one(target, score, self.spec))
        return self._change(target, moments, torch.stack(keeps), values or None, notes)

    def _factor(self, target: Target, moments: Moments, group: int) -> Factor:
        """The factor of a group's inputs, made once for all layers that share the moments."""
        assert isinstance(self.spec, SparseGPTSpec) and moments.gram is not None
        if self._of is not moments:
            self._of, self._factors = moments, {}
        if group not in self._factors:
            self._factors[group] = factorise(
                moments.gram[group], moments.rows[group], self.spec.damping, target.name
            )
        return self._factors[group]

    def _change(
        self,
        target: Target,
        moments: Moments,
        keep: Tensor,
        values: list[Tensor] | None,
        notes: list[str],
    ) -> Change:
        weight = target.weight
        new = None
        if values is not None:
            matrix = torch.stack(values).to(weight.dtype)
            new = target.view.from_matrix(matrix, weight.shape)
        record = Record(
            self.spec.method,
            str(target.goal),
            updates_weights=new is not None,
            error=_relative_error(target, moments, keep, values),
            tokens=sum(moments.rows),
            note="; ".join(notes),
        )
        return Change(target, target.view.from_matrix(keep, weight.shape), record, new)


def _relative_error(
    target: Target, moments: Moments, keep: Tensor, values: list[Tensor] | None
) -> float | None:
    """||X (W - W')^T||^2 / ||X W^T||^2: exact from a second moment, else on sampled inputs."""
    lost = total = 0.0
    for g, dense in _groups(target):
        w = dense.float()
        pruned = torch.where(keep[g], w if values is None else values[g], 0)
        if moments.gram is not None:
            gram = moments.gram[g]
            lost += float(((w - pruned) @ gram * (w - pruned)).sum())
            total += float((w @ gram * w).sum())
        elif (x := moments.samples(g)) is not None:
            lost += float((x @ (w - pruned).T).square().sum())
            total += float((x @ w.T).square().sum())
    return lost / total if total > 0 else None


def _calibration_batches(
    model: nn.Module,
    spec: Spec,
    data: Iterable[Any] | None,
    max_batches: int,
    seed: int,
    progress: bool,
    run: RunRecord,
) -> list[Batch]:
    if data is None:
        if not can_synthesise(model):
            raise CalibrationError(
                f"{type(spec).__name__} needs calibration data for a {type(model).__name__}: "
                f"sparsify(model, spec, data). {ACCEPTED_DATA}. (Only decoder-only transformers "
                "language models can calibrate on text of their own; MagnitudeSpec needs no data.)"
            )
        data = synthesise(model, seed=seed, progress=progress)
        run.notes.append("calibrated on text sampled from the model itself")
    batches, more = read_batches(data, model, max_batches)
    if more:
        run.notes.append(f"used the first {max_batches} batches; more were offered (max_batches)")
    return batches


# -- masks ---------------------------------------------------------------------------------------


def _magnitude_masks(targets: list[Target], spec: MagnitudeSpec) -> list[Tensor]:
    if spec.scope == "global":
        scores = [
            _barred(t, g, magnitude_score(w)) for t in targets for g, w in _groups(t)
        ]
        kept = iter(project_each(scores, spec.goal.pattern, spec.goal.sparsity, "global"))
        return [
            t.view.from_matrix(
                torch.stack([next(kept) for _ in range(t.view.groups)]), t.weight.shape
            )
            for t in targets
        ]
    masks = []
    for target in targets:
        scores = torch.stack([_barred(target, g, magnitude_score(w)) for g, w in _groups(target)])
        masks.append(_project(target, scores, spec.scope))
    return masks


def _project(target: Target, score: Tensor, scope: str | None) -> Tensor:
    """A mask of the weight's own shape from (groups, rows, cols) scores."""
    goal = target.goal
    keep = torch.stack([project(s, goal.pattern, goal.sparsity, scope or "layer") for s in score])
    return target.view.from_matrix(keep, target.weight.shape)


def _project_one(target: Target, score: Tensor, spec: Spec) -> Tensor:
    return project(score, target.goal.pattern, target.goal.sparsity, spec.scope or "layer")


def _groups(target: Target) -> Iterator[tuple[int, Tensor]]:
    """Each group's (rows, cols) weights as they act now: zero where already masked."""
    weight, mask = target.weight.detach(), target.mask
    if mask is not None:
        weight = torch.where(mask.mask, weight, 0)
    yield from enumerate(target.view.to_matrix(weight))


def _bar(target: Target, group: int) -> Tensor | None:
    """Weights that an earlier mask pruned: they stay pruned."""
    return None if target.mask is None else ~target.view.to_matrix(target.mask.mask)[group]


def _barred(target: Target, group: int, score: Tensor) -> Tensor:
    """A score that is safe to rank: previously pruned weights first, NaN refused."""
    if bool(score.isnan().any()):
        raise CalibrationError(
            f"{target.name}: its scores hold NaN (NaN weights, or an infinite weight on an input "
            "that is always zero); repair the weights or ignore the layer"
        )
    bar = _bar(target, group)
    return score if bar is None else score.masked_fill(bar, BARRED)


def _check_weights(plan: Plan, *, finite: bool) -> None:
    for target in plan.targets:
        weight = target.weight.detach()
        bad = ~weight.isfinite() if finite else weight.isnan()
        if bool(bad.any()):
            what = "inf or NaN" if finite else "NaN"
            raise SpecError(
                f"{target.name}: its weight holds {what} at {int(bad.sum())} of {weight.numel()} "
                "places; repair it or ignore the layer"
            )


def _few(items: list[int]) -> str:
    shown = ", ".join(map(str, items[:8]))
    return shown if len(items) <= 8 else f"{shown} and {len(items) - 8} more"


# -- changing the model, all or nothing ------------------------------------------------------------


@dataclass(eq=False)
class Change:
    """What one layer is to become: a mask, its record and, if the method changes them, values."""

    target: Target
    mask: Tensor
    record: Record
    values: Tensor | None = None


@dataclass(eq=False)
class _Before:
    """What a layer was: the parameter's data, and the mask's parts if it had one."""

    data: Tensor
    mask: Tensor | None
    record: Record | None
    reversible: bool
    dense: Tensor | None


class Changes:
    """Changes to a model that all stay, or all go.

    While batches run through a freshly pruned layer its parameter holds the folded values, since
    masking on every access would cost more than the product itself; `settle` then puts the mask in
    place as a parametrization.
    """

    def __init__(self, *, keep_dense: bool) -> None:
        self.keep_dense = keep_dense
        self._staged: list[Change] = []
        self._before: list[tuple[Target, _Before]] = []

    def stage(self, change: Change) -> None:
        """Make a layer act pruned from now on."""
        weight, mask = change.target.weight, change.target.mask
        before = (
            _Before(weight.data, None, None, True, None)
            if mask is None
            else _Before(weight.data, mask.mask.clone(), mask.record, mask.reversible, mask.dense)
        )
        self._before.append((change.target, before))
        values = weight.data if change.values is None else change.values
        weight.data = torch.where(change.mask, values, 0)
        self._staged.append(change)

    def settle(self) -> None:
        """Attach the masks of what is staged."""
        for change in self._staged:
            layer = change.target.layer
            before = next(b for t, b in reversed(self._before) if t is change.target)
            if change.values is None:
                change.target.weight.data = before.data
            dense = None
            if self.keep_dense and change.values is not None:
                if before.dense is None and before.reversible:
                    dense = before.data
                elif before.dense is not None:
                    dense = before.dense
            attach(layer.module, layer.tensor, change.mask, change.record, dense)
        self._staged.clear()

    def undo(self) -> None:
        """Put every layer back as it was."""
        for target, before in reversed(self._before):
            layer = target.layer
            target.weight.data = before.data
            mask = mask_of(layer.module, layer.tensor)
            if mask is None:
                continue
            if before.mask is None:
                detach(layer.module, layer.tensor)
            else:
                mask.mask.copy_(before.mask)
                assert before.record is not None
                mask.record, mask.reversible = before.record, before.reversible
                mask.dense = before.dense
        self._before.clear()
        self._staged.clear()


@contextmanager
def _all_or_nothing(*, keep_dense: bool) -> Iterator[Changes]:
    changes = Changes(keep_dense=keep_dense)
    try:
        yield changes
        changes.settle()
    except BaseException:
        changes.undo()
        raise
