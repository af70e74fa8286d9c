"""`sparsify` for whole units: read the structure, score, mask, and refit what reads them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from tqdm import tqdm

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.block_calls import Ends, Unit
from torchprune.calibration.lockstep import Calibration, Usage
from torchprune.calibration.moments import Moments
from torchprune.errors import CalibrationError, SpecError
from torchprune.graph.capture import Call
from torchprune.graph.groups import Group, Member, read_groups
from torchprune.graph.trace import trace
from torchprune.masking.mask import Record, attach, mask_of, original_of
from torchprune.masking.matrices import ConvNd
from torchprune.masking.selection import Layer, repeated_blocks
from torchprune.masking.targets import Target
from torchprune.methods.decide import groups_of, sampled_error
from torchprune.methods.reconstruct import Gain, reconstruct, summary_of
from torchprune.reports.report import RunRecord
from torchprune.specs.allocation import Loss
from torchprune.specs.options import Reconstruct
from torchprune.structure.parameter_edits import Edits
from torchprune.structure.refit_readers import refit
from torchprune.structure.scores import (
    by_unit,
    default_loss,
    random_scores,
    read_scores,
    taylor_scores,
    weight_scores,
)
from torchprune.structure.share import across, uniform
from torchprune.structure.specs import StructuredSpec
from torchprune.structure.unit_choices import Choice, choose, columns_of, keeps_of, no_choice


@dataclass
class _Done:
    """What happened to one layer that reads."""

    error: float | None = None
    tokens: int | None = None
    changed: bool = False
    notes: list[str] = field(default_factory=list)


def prune_structures(
    model: nn.Module,
    spec: StructuredSpec,
    batches: Sequence[Batch],
    run: RunRecord,
    *,
    progress: bool,
    keep_dense: bool,
    reversible: bool,
    hold: torch.dtype | None,
) -> None:
    """Mask whole units of a model, in place.

    Raises:
        ShrinkError: the model cannot be exported.
        TargetError: there is no such group, or a selector matches nothing.
        CalibrationError: statistics are not finite, or a loss is missing.
    """
    choices = _chosen(model, spec, batches[0], run)
    runner = UnitRunner(model, batches, choices, run, hold)
    with Edits(keep_dense=keep_dense) as edits:
        runner.score_ahead()
        runner.sweep(edits, progress=progress)
        runner.finish()
        with modes.exact():
            edits.settle()
            attach_units(choices, runner.done, edits, reversible=reversible)


@dataclass(frozen=True, eq=False)
class Units:
    """A group whose units may go.

    Attributes:
        readers: the layers that read what the units carry.
    """

    spec: StructuredSpec
    group: Group
    layers: dict[str, Layer]
    readers: list[Target]

    def without(self, gone: Tensor) -> dict[str, tuple[Layer, Tensor]]:
        """By key the layers and what stays of them without some units, given as (count,) bool."""
        return keeps_of([Choice(self.spec, self.group, self.layers, self.readers, gone)])


class UnitScorer:
    """The groups that a spec would prune, and what their units are worth in the dense model.

    Raises:
        ShrinkError: the model cannot be exported.
        TargetError: there is no such group, or a selector matches nothing.
    """

    def __init__(
        self, model: nn.Module, spec: StructuredSpec, batches: Sequence[Batch], run: RunRecord
    ) -> None:
        choices = _chosen(model, spec, batches[0], run)
        self._runner = UnitRunner(model, batches, choices, run, None)
        self.units = [Units(c.spec, c.group, c.layers, c.readers) for c in choices]

    def scores(self) -> list[Tensor]:
        """(count,) a group, by the spec's score; higher is worth more."""
        return self._runner.scores()

    def taylor(self, loss: Loss) -> list[Tensor]:
        """(count,) a group, |sum of weight * gradient| of a loss, summed over the batches."""
        return self._runner.taylor(loss)


def _chosen(model: nn.Module, spec: StructuredSpec, example: Batch, run: RunRecord) -> list[Choice]:
    structure = read_groups(model, trace(model, [Call(example)]))
    choices = choose(model, spec, structure, run)
    if not choices:
        raise no_choice(model, spec, structure, run)
    return choices


# -- running ---------------------------------------------------------------------------------------


class UnitRunner:
    """One pruning: scores where they are needed at once, then a sweep in the model's order.

    Args:
        without: names of blocks that go, so that nothing of them is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        choices: list[Choice],
        run: RunRecord,
        hold: torch.dtype | None,
        without: Collection[str] = (),
    ) -> None:
        self.model, self.batches, self.choices = model, batches, choices
        self.run, self.hold = run, hold
        self.done: dict[str, _Done] = {}
        self._blocks = {k: b for k, b in repeated_blocks(model).items() if k not in without}
        self._reading: dict[str, list[tuple[Choice, Member]]] = {}
        self._targets: dict[str, Target] = {}
        for choice in choices:
            for target, member in zip(choice.readers, choice.reading, strict=True):
                self._targets.setdefault(target.layer.key, target)
                self._reading.setdefault(target.layer.key, []).append((choice, member))

    def score_ahead(self) -> None:
        """Decide what does not depend on inputs that earlier removals change."""
        spec = self.choices[0].spec
        if by_inputs(spec):
            shared = any(len(choice.readers) > 1 for choice in self.choices)
            if spec.allocation == "uniform" and not shared:
                return
        scores = self.scores()
        if spec.allocation == "uniform":
            found = [
                uniform(score, spec, choice.group.width)
                for choice, score in zip(self.choices, scores, strict=True)
            ]
        else:
            found = across(scores, spec, [choice.group.width for choice in self.choices])
        for choice, gone in zip(self.choices, found, strict=True):
            choice.gone = gone

    def scores(self) -> list[Tensor]:
        """(count,) a group, on the model as it is; all groups are of one spec."""
        if by_inputs(self.choices[0].spec):
            return self._dense_scores()
        return self.given_scores()

    def given_scores(self) -> list[Tensor]:
        """(count,) a group, where inputs do not matter; all groups are of one spec."""
        spec = self.choices[0].spec
        if spec.score == "taylor":
            return self.taylor(spec.loss or default_loss)
        return [self._given(choice.group, spec) for choice in self.choices]

    def taylor(self, loss: Loss) -> list[Tensor]:
        """(count,) a group, |weight * gradient|, summed over batches."""
        groups = [choice.group for choice in self.choices]
        return taylor_scores(self.model, groups, self._weights(), self.batches, loss)

    def _given(self, group: Group, spec: StructuredSpec) -> Tensor:
        score = spec.score
        if score == "random":
            return random_scores(group, spec.seed)
        if not callable(score):
            return weight_scores(group, self._weights(group))
        given = score(self.model, group)
        if not isinstance(given, Tensor) or given.shape != (group.count,) or given.isnan().any():
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise SpecError(
                f"score must give a tensor ({group.count},) without NaN for {group.name}, got {got}"
            )
        return given.detach().float().cpu()

    def _weights(self, group: Group | None = None) -> dict[str, Tensor]:
        """The parameters behind the layers of one group or all, masked where they are."""
        some = [c for c in self.choices if group is None or c.group is group]
        layers = {key: layer for choice in some for key, layer in choice.layers.items()}
        return {key: original_of(y.module, y.tensor) for key, y in layers.items()}

    def read_by(self, target: Target) -> list[tuple[Choice, Member]]:
        """What a layer reads, and by which of its axes."""
        return self._reading[target.layer.key]

    def calibration(
        self, *, gram: bool, ends: Ends | None = None, rows_will_do: bool = False
    ) -> Calibration:
        """Statistics of what the layers read that read some group."""
        return Calibration(
            self.model,
            list(self._targets.values()),
            self.batches,
            gram=gram,
            total=True,
            blocks=self._blocks,
            foresee=False,
            hold=self.hold,
            ends=ends,
            rows_will_do=rows_will_do,
        )

    def _dense_scores(self) -> list[Tensor]:
        """Every group's scores on the model as it is, summed over the layers that read it."""
        scores = {id(choice): torch.zeros(choice.group.count) for choice in self.choices}
        seen: set[int] = set()
        with self.calibration(gram=False) as calibration:
            for target, moments in calibration.collect():
                for choice, member in self.read_by(target):
                    scores[id(choice)] += score_at(choice, member, target, moments)
                    seen.add(id(choice))
        for choice in self.choices:
            if id(choice) not in seen:
                scores[id(choice)] = self._unreached(choice)
        return [scores[id(choice)] for choice in self.choices]

    def _unreached(self, choice: Choice) -> Tensor:
        note = "no calibration batch reached it: scored by the size of its weights"
        self.run.warnings.append(f"{choice.group.name}: {note}")
        return weight_scores(choice.group, self._weights(choice.group))

    def sweep(self, edits: Edits, *, progress: bool, training: bool = True) -> None:
        """Go through the layers that read, deciding and refitting them one after the other."""
        undecided = any(choice.gone is None for choice in self.choices)
        asked = (choice.spec.reconstruct for choice in self.choices)
        options, ends = next((one for one in asked if one and training), False), None
        refits = any(choice.spec.refit for choice in self.choices)
        if not (undecided or refits or options):
            return
        gains: list[Gain] = []
        if isinstance(options, Reconstruct):

            def train(unit: Unit) -> None:
                gains.append(self._train(unit, edits, options))

            ends = Ends(self._blocks or {"": self.model}, train, options.alpha)
        what = ", ".join(dict.fromkeys(choice.spec.method for choice in self.choices))
        bar = tqdm(total=len(self._targets), desc=what, unit="layer", disable=not progress)
        with self.calibration(gram=refits, ends=ends, rows_will_do=True) as calibration, bar:
            for stop in calibration.stops():
                for target, moments in stop:
                    with modes.exact():
                        self._decide(target, moments)
                        self._edit(target, moments, edits)
                    bar.update()
        self.run.finish(batches=len(self.batches), usage=calibration.usage)
        if gains:
            self.run.notes.append(summary_of(gains))

    def _train(self, unit: Unit, edits: Edits, options: Reconstruct) -> Gain:
        """Train what stays of a unit's layers, those that read and those that write."""
        inside = {id(p) for p in unit.module.parameters()}
        decided = [c for c in self.choices if c.gone is not None and c.spec.reconstruct]
        weights = []
        with ExitStack() as stack:
            for key, (layer, keep) in keeps_of(decided).items():
                weight = original_of(layer.module, layer.tensor)
                if id(weight) in inside:
                    if (mask := mask_of(layer.module, layer.tensor)) is not None:
                        stack.enter_context(mask.transparent())
                    edits.touch(layer)
                    self.done.setdefault(key, _Done()).changed = True
                    weights.append((weight, keep))
            return reconstruct(unit, weights, options)

    def finish(self) -> None:
        """Decide what no batch reached."""
        for choice in self.choices:
            if choice.gone is None:
                score = self._unreached(choice)
                choice.gone = uniform(score, choice.spec, choice.group.width)
        if not self.run.batches:
            self.run.finish(batches=len(self.batches), usage=Usage())

    def _decide(self, target: Target, moments: Moments) -> None:
        for choice, member in self.read_by(target):
            if choice.gone is None:
                score = score_at(choice, member, target, moments)
                choice.gone = uniform(score, choice.spec, choice.group.width)

    def _edit(self, target: Target, moments: Moments, edits: Edits) -> None:
        """Let the layer read no more what goes, and fit it to what stays."""
        keep, weights = self._kept_columns(target), groups_of(target)
        specs = [choice.spec for choice, _ in self.read_by(target)]
        done = self.done.setdefault(target.layer.key, _Done(tokens=sum(moments.rows)))
        if bool(keep.all()):
            done.error = 0.0
        elif not any(spec.refit for spec in specs):
            done.error = sampled_error(target, moments, keep.expand_as(weights))
            kept = any(spec.reconstruct for spec in specs)
            edits.write(target, weights * keep, kept=kept)
        else:
            self._refit(target, moments, keep, weights, done, edits)

    def _kept_columns(self, target: Target) -> Tensor:
        """(cols,) bool: what a layer goes on reading."""
        keep = torch.ones(target.view.cols, dtype=torch.bool)
        for choice, member in self.read_by(target):
            assert choice.gone is not None
            units = columns_of(target, member).cpu()
            keep &= ~torch.cat([choice.gone, choice.gone.new_zeros(1)])[units]
        return keep.to(target.weight.device)

    def silence(self, edits: Edits) -> None:
        """Let layers that were not swept read no more what goes."""
        for target in self._targets.values():
            keep = self._kept_columns(target)
            if target.layer.key not in self.done and not bool(keep.all()):
                edits.write(target, groups_of(target) * keep)

    def _refit(
        self,
        target: Target,
        moments: Moments,
        keep: Tensor,
        weights: Tensor,
        done: _Done,
        edits: Edits,
    ) -> None:
        fits = target.mask is None or _is_whole(target.view.to_matrix(target.mask.mask))
        if not fits:
            done.notes.append("it has a mask of other zeros: not refitted")
        damping = next(c.spec.damping for c, _ in self.read_by(target) if c.spec.refit)
        module = target.layer.module
        biased = isinstance(getattr(module, "bias", None), nn.Parameter)
        biased &= not isinstance(module, _ConvTransposeNd)  # its rows are one for each tap
        found = [
            refit(weight, moments, keep, damping, group=group, bias=biased, fit=fits)
            for group, weight in enumerate(weights)
        ]
        if not all(f.weight.isfinite().all() for f in found):
            raise CalibrationError(f"{target.name}: its fit to what stays is not finite")
        total = sum(f.total for f in found)
        done.error = sum(f.lost for f in found) / total if total > 0 else None
        done.changed = fits
        new = torch.stack([f.weight for f in found]).to(target.weight.dtype)
        edits.write(target, new, kept=fits)
        shifts = [f.shift for f in found if f.shift is not None]
        if fits and shifts:
            edits.shift(target.layer, torch.cat(shifts))


def by_inputs(spec: StructuredSpec) -> bool:
    """Whether units are worth what the layers that read them make of their inputs."""
    return spec.score in ("flap", "activation")


def score_at(choice: Choice, member: Member, target: Target, moments: Moments) -> Tensor:
    """(count,) what a group's units are worth to one layer that reads them."""
    units = columns_of(target, member).cpu()
    total = torch.zeros(choice.group.count)
    module: Any = target.layer.module
    spread = isinstance(module, ConvNd | _ConvTransposeNd)
    times = module.groups if spread else 1  # each group reads every token
    with modes.exact():
        for group, weight in enumerate(groups_of(target)):
            found = read_scores(str(choice.spec.score), weight, moments, group)
            total += times * by_unit(found, units, choice.group.count)
    return total


def _is_whole(mask: Tensor) -> bool:
    """Whether (groups, rows, cols) masks prune nothing but whole rows and whole columns."""
    alive = mask.any(-1, keepdim=True)
    full, none = (mask | ~alive).all(-2), ~mask.any(-2)
    return bool((full | none).all())


# -- changing --------------------------------------------------------------------------------------


def attach_units(
    choices: Sequence[Choice],
    done: dict[str, _Done],
    edits: Edits,
    *,
    reversible: bool,
) -> None:
    """Put the masks on: of every layer one, for all the groups it belongs to."""
    patterns: dict[str, list[str]] = {}
    methods: dict[str, str] = {}
    for choice in choices:
        assert choice.gone is not None
        gone, group, spec = choice.gone, choice.group, choice.spec
        text = f"{spec.score_name} {int(gone.sum())}/{group.count} {group.kind}"
        if group.width > 1 and group.kind != "heads":
            text += f" of {group.width}"
        for key in choice.layers:
            patterns.setdefault(key, []).append(text)
            methods.setdefault(key, spec.method)
    for key, (layer, keep) in keeps_of(choices).items():
        here, weight = done.get(key, _Done()), original_of(layer.module, layer.tensor)
        record = Record(
            methods[key],
            ", ".join(dict.fromkeys(patterns[key])),
            updates_weights=here.changed,
            error=here.error,
            tokens=here.tokens,
            note="; ".join(here.notes),
        )
        dense = edits.dense.get(id(weight))
        attach(layer.module, layer.tensor, keep, record, dense, reversible=reversible)
    for layer in edits.biases:
        bias = original_of(layer.module, layer.tensor)
        if id(bias) in edits.dense:  # nothing of it is pruned: the mask keeps the dense values
            method = methods[f"{layer.key.removesuffix('bias')}weight"]
            record = Record(method, "refitted", updates_weights=True)
            keep = torch.ones_like(bias, dtype=torch.bool)
            attach(layer.module, layer.tensor, keep, record, edits.dense[id(bias)])
