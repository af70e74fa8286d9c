"""`sparsify` for whole units: read the structure, score, mask, and refit what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from tqdm import tqdm

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.block_calls import Ends, Unit
from torchprune.calibration.lockstep import Calibration, Usage
from torchprune.calibration.moments import Moments
from torchprune.errors import CalibrationError, SpecError, TargetError
from torchprune.graph.capture import Call
from torchprune.graph.groups import Group, Member, in_the_way, read_groups
from torchprune.graph.trace import trace
from torchprune.masking.mask import Record, attach, mask_of, obstacle, original_of
from torchprune.masking.matrices import view_of
from torchprune.masking.reading import Reading
from torchprune.masking.scales import is_coded
from torchprune.masking.selection import (
    Layer,
    as_selectors,
    check_used,
    layers_of,
    maskable_of,
    matches,
    repeated_blocks,
    tied_to,
)
from torchprune.masking.targets import Target
from torchprune.methods.decide import groups_of, sampled_error
from torchprune.methods.reconstruct import Gain, reconstruct, summary_of
from torchprune.reports.report import RunRecord
from torchprune.specs.allocation import Loss
from torchprune.specs.goals import Goal
from torchprune.specs.options import Reconstruct
from torchprune.specs.patterns import Unstructured
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


@dataclass(eq=False)
class _Choice:
    """A group to prune: its layers, those that read it, and what was decided."""

    group: Group
    layers: dict[str, Layer]
    readers: list[Target]
    gone: Tensor | None = None
    scored: bool = True


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
    choices = _choose(model, spec, batches[0], run)
    runner = _Runner(model, spec, batches, choices, run, hold)
    with Edits(keep_dense=keep_dense) as edits:
        runner.score_ahead()
        runner.sweep(edits, progress=progress)
        runner.finish()
        with modes.exact():
            edits.settle()
            _attach(choices, spec, runner.done, edits, reversible=reversible)


@dataclass(frozen=True, eq=False)
class Units:
    """A group whose units may go.

    Attributes:
        readers: the layers that read what the units carry.
    """

    group: Group
    layers: dict[str, Layer]
    readers: list[Target]

    def without(self, gone: Tensor) -> dict[str, tuple[Layer, Tensor]]:
        """By key the layers and what stays of them without some units, given as (count,) bool."""
        return _keeps([_Choice(self.group, self.layers, self.readers, gone)])


class UnitScorer:
    """The groups that a spec would prune, and what their units are worth in the dense model.

    Raises:
        ShrinkError: the model cannot be exported.
        TargetError: there is no such group, or a selector matches nothing.
    """

    def __init__(
        self, model: nn.Module, spec: StructuredSpec, batches: Sequence[Batch], run: RunRecord
    ) -> None:
        choices = _choose(model, spec, batches[0], run)
        self._runner = _Runner(model, spec, batches, choices, run, None)
        self.units = [Units(c.group, c.layers, c.readers) for c in choices]

    def scores(self) -> list[Tensor]:
        """(count,) a group, by the spec's score; higher is worth more."""
        return self._runner.scores()

    def taylor(self, loss: Loss) -> list[Tensor]:
        """(count,) a group, |sum of weight * gradient| of a loss, summed over the batches."""
        return self._runner.taylor(loss)


# -- choosing --------------------------------------------------------------------------------------


def _choose(
    model: nn.Module, spec: StructuredSpec, example: Batch, run: RunRecord
) -> list[_Choice]:
    spread = (y for y in maskable_of(model) if isinstance(y.module, _ConvTransposeNd))
    layers = [*layers_of(model), *(y for y in spread if y.tensor == "weight")]
    targets, ignore = as_selectors(spec.targets), as_selectors(spec.ignore)
    for what, selectors in (("targets", targets), ("ignore", ignore)):
        for selector in selectors:
            check_used(what, selector, model, layers)
    structure = read_groups(model, trace(model, [Call(example)]))
    by_key = {layer.key: layer for layer in layers}
    ties = tied_to(model)
    choices = []
    for group in structure.groups:
        if group.kind != spec.kind:
            continue
        own = {m.key: by_key[m.key] for m in group.members if m.key in by_key}
        if targets and not any(matches(s, y) for s in targets for y in own.values()):
            continue
        if any(matches(s, y) for s in ignore for y in own.values()):
            run.skipped[group.name] = "ignored"
            continue
        readers = [m for m in group.members if m.reads]
        problem = next((p for y in own.values() if (p := obstacle(y, ties) or _coded(y))), None)
        if any(m.key not in own for m in readers) or not readers:
            problem = "a weight that is no layer's reads it, so it cannot be observed or masked"
        if problem:
            run.skipped[group.name] = problem
            continue
        choices.append(_Choice(group, own, [_target(own[m.key]) for m in readers]))
    if not choices:
        there = ", ".join(sorted({g.kind for g in structure.groups})) or "nothing"
        why = "; ".join(f"{k}: {v}" for k, v in list(run.skipped.items())[:3])
        raise TargetError(
            f"{type(spec).__name__}: no {spec.kind} to prune in this {type(model).__name__}; it "
            f"has groups of {there}"
            + (f" ({why})" if why else "")
            + f". In the way stood {'; '.join(in_the_way(structure))}"
        )
    return choices


def _coded(layer: Layer) -> str | None:
    """Why units cannot be cut from a weight of codes, or None."""
    weight = original_of(layer.module, layer.tensor)
    if not is_coded(weight):
        return None
    return f"its {layer.tensor} is {weight.dtype}, whose scales would not follow; dequantize first"


def _target(layer: Layer) -> Target:
    view = view_of(layer.module, original_of(layer.module, layer.tensor).shape)
    reading = Reading(view) if isinstance(layer.module, _ConvTransposeNd) else None
    return Target(layer, Goal(Unstructured(), 0.0), view, reading=reading)


def _columns(target: Target, member: Member) -> Tensor:
    """(cols,) the unit of each column of the layer's matrix, or -1."""
    shape = target.weight.shape
    place = [len(member.units) if a == member.axis else 1 for a in range(len(shape))]
    return target.view.to_matrix(member.units.reshape(place).expand(shape))[0, 0]


# -- running ---------------------------------------------------------------------------------------


class _Runner:
    """One pruning: scores where they are needed at once, then a sweep in the model's order."""

    def __init__(
        self,
        model: nn.Module,
        spec: StructuredSpec,
        batches: Sequence[Batch],
        choices: list[_Choice],
        run: RunRecord,
        hold: torch.dtype | None,
    ) -> None:
        self.model, self.spec, self.batches, self.choices = model, spec, batches, choices
        self.run, self.hold = run, hold
        self.done: dict[str, _Done] = {}
        self._blocks = repeated_blocks(model)
        self._reading: dict[str, list[tuple[_Choice, Member]]] = {}
        self._targets: dict[str, Target] = {}
        for choice in choices:
            for target, member in zip(
                choice.readers, (m for m in choice.group.members if m.reads), strict=True
            ):
                self._targets.setdefault(target.layer.key, target)
                self._reading.setdefault(target.layer.key, []).append((choice, member))

    @property
    def _by_inputs(self) -> bool:
        return self.spec.score in ("flap", "activation")

    def score_ahead(self) -> None:
        """Decide what does not depend on inputs that earlier removals change."""
        if self._by_inputs:
            shared = any(len(choice.readers) > 1 for choice in self.choices)
            if self.spec.allocation == "uniform" and not shared:
                return
        scores = self.scores()
        if self.spec.allocation == "uniform":
            found = [uniform(score, self.spec) for score in scores]
        else:
            found = across(scores, self.spec)
        for choice, gone in zip(self.choices, found, strict=True):
            choice.gone = gone

    def scores(self) -> list[Tensor]:
        """(count,) a group, on the model as it is."""
        if self._by_inputs:
            return self._dense_scores()
        if self.spec.score == "taylor":
            return self.taylor(self.spec.loss or default_loss)
        return [self._given(choice.group) for choice in self.choices]

    def taylor(self, loss: Loss) -> list[Tensor]:
        """(count,) a group, |weight * gradient|, summed over batches."""
        groups = [choice.group for choice in self.choices]
        return taylor_scores(self.model, groups, self._weights(), self.batches, loss)

    def _given(self, group: Group) -> Tensor:
        score = self.spec.score
        if score == "random":
            return random_scores(group, self.spec.seed)
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

    def _calibration(self, *, gram: bool, ends: Ends | None = None) -> Calibration:
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
        )

    def _dense_scores(self) -> list[Tensor]:
        """Every group's scores on the model as it is, summed over the layers that read it."""
        scores = {id(choice): torch.zeros(choice.group.count) for choice in self.choices}
        seen: set[int] = set()
        with self._calibration(gram=False) as calibration:
            for target, moments in calibration.collect():
                for choice, member in self._reading[target.layer.key]:
                    scores[id(choice)] += self._score(choice, member, target, moments)
                    seen.add(id(choice))
        for choice in self.choices:
            if id(choice) not in seen:
                scores[id(choice)] = self._unreached(choice)
        return [scores[id(choice)] for choice in self.choices]

    def _score(self, choice: _Choice, member: Member, target: Target, moments: Moments) -> Tensor:
        units = _columns(target, member).cpu()
        total = torch.zeros(choice.group.count)
        with modes.exact():
            for group, weight in enumerate(groups_of(target)):
                found = read_scores(str(self.spec.score), weight, moments, group)
                total += by_unit(found, units, choice.group.count)
        return total

    def _unreached(self, choice: _Choice) -> Tensor:
        note = "no calibration batch reached it: scored by the size of its weights"
        self.run.warnings.append(f"{choice.group.name}: {note}")
        return weight_scores(choice.group, self._weights(choice.group))

    def sweep(self, edits: Edits, *, progress: bool) -> None:
        """Go through the layers that read, deciding and refitting them one after the other."""
        undecided = any(choice.gone is None for choice in self.choices)
        options, ends = self.spec.reconstruct, None
        if not (undecided or self.spec.refit or options):
            return
        gains: list[Gain] = []
        if isinstance(options, Reconstruct):

            def train(unit: Unit) -> None:
                gains.append(self._train(unit, edits, options))

            ends = Ends(self._blocks or {"": self.model}, train, options.alpha)
        bar = tqdm(
            total=len(self._targets), desc=self.spec.method, unit="layer", disable=not progress
        )
        with self._calibration(gram=self.spec.refit, ends=ends) as calibration, bar:
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
        decided = [choice for choice in self.choices if choice.gone is not None]
        weights = []
        with ExitStack() as stack:
            for key, (layer, keep) in _keeps(decided).items():
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
                choice.gone = uniform(self._unreached(choice), self.spec)
        if not self.run.batches:
            self.run.finish(batches=len(self.batches), usage=Usage())

    def _decide(self, target: Target, moments: Moments) -> None:
        for choice, member in self._reading[target.layer.key]:
            if choice.gone is None:
                score = self._score(choice, member, target, moments)
                choice.gone = uniform(score, self.spec)

    def _edit(self, target: Target, moments: Moments, edits: Edits) -> None:
        """Let the layer read no more what goes, and fit it to what stays."""
        keep = torch.ones(target.view.cols, dtype=torch.bool)
        for choice, member in self._reading[target.layer.key]:
            assert choice.gone is not None
            units = _columns(target, member).cpu()
            keep &= ~torch.cat([choice.gone, choice.gone.new_zeros(1)])[units]
        keep = keep.to(target.weight.device)
        weights = groups_of(target)
        done = self.done.setdefault(target.layer.key, _Done(tokens=sum(moments.rows)))
        if bool(keep.all()):
            done.error = 0.0
        elif moments.gram is None:
            done.error = sampled_error(target, moments, keep.expand_as(weights))
            edits.write(target, weights * keep, kept=bool(self.spec.reconstruct))
        else:
            self._refit(target, moments, keep, weights, done, edits)

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
        module = target.layer.module
        biased = isinstance(getattr(module, "bias", None), nn.Parameter)
        biased &= not isinstance(module, _ConvTransposeNd)  # its rows are one for each tap
        found = [
            refit(weight, moments, keep, self.spec.damping, group=group, bias=biased, fit=fits)
            for group, weight in enumerate(weights)
        ]
        if not all(f.weight.isfinite().all() for f in found):
            raise CalibrationError(f"{target.name}: its fit to what stays is not finite")
        total = sum(f.total for f in found)
        done.error = sum(f.lost for f in found) / total if total > 0 else None
        done.changed = fits
        new = torch.stack([f.weight for f in found]).to(target.weight.dtype)
        edits.write(target, new, kept=fits)
        if fits and found[0].shift is not None:
            edits.shift(target.layer, found[0].shift)


def _is_whole(mask: Tensor) -> bool:
    """Whether (groups, rows, cols) masks prune nothing but whole rows and whole columns."""
    alive = mask.any(-1, keepdim=True)
    full, none = (mask | ~alive).all(-2), ~mask.any(-2)
    return bool((full | none).all())


# -- changing --------------------------------------------------------------------------------------


def _attach(
    choices: Sequence[_Choice],
    spec: StructuredSpec,
    done: dict[str, _Done],
    edits: Edits,
    *,
    reversible: bool,
) -> None:
    """Put the masks on: of every layer one, for all the groups it belongs to."""
    patterns: dict[str, list[str]] = {}
    for choice in choices:
        assert choice.gone is not None
        gone, group = choice.gone, choice.group
        text = f"{spec.score_name} {int(gone.sum())}/{group.count} {group.kind}"
        for key in choice.layers:
            patterns.setdefault(key, []).append(text)
    for key, (layer, keep) in _keeps(choices).items():
        here, weight = done.get(key, _Done()), original_of(layer.module, layer.tensor)
        record = Record(
            spec.method,
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
            record = Record(spec.method, "refitted", updates_weights=True)
            keep = torch.ones_like(bias, dtype=torch.bool)
            attach(layer.module, layer.tensor, keep, record, edits.dense[id(bias)])


def _keeps(choices: Sequence[_Choice]) -> dict[str, tuple[Layer, Tensor]]:
    """What stays of every layer, for all the decided groups it belongs to and its mask so far."""
    keeps: dict[str, tuple[Layer, Tensor]] = {}
    for choice in choices:
        assert choice.gone is not None
        for member in choice.group.members:
            layer = choice.layers.get(member.key)
            if layer is None:
                continue
            weight = original_of(layer.module, layer.tensor)
            if member.key not in keeps:
                keeps[member.key] = layer, _present(layer, weight)
            index = member.indices(choice.gone).nonzero().flatten().to(weight.device)
            keeps[member.key][1].index_fill_(member.axis, index, False)
    return keeps


def _present(layer: Layer, weight: Tensor) -> Tensor:
    mask = mask_of(layer.module, layer.tensor)
    if mask is None:
        return torch.ones_like(weight, dtype=torch.bool, memory_format=torch.contiguous_format)
    return mask.mask
