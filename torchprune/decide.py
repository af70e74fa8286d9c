"""From a layer's weights and statistics to its change: where patterns, scores and solvers meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchprune.changes import Change
from torchprune.errors import CalibrationError
from torchprune.masking import Record
from torchprune.methods.factor import Factor, factorise
from torchprune.methods.magnitude import magnitude_score
from torchprune.methods.sparsegpt import sparsegpt
from torchprune.methods.wanda import wanda_score
from torchprune.moments import Moments
from torchprune.packing import masked
from torchprune.plan import Target
from torchprune.projection import BARRED, project_each
from torchprune.specs import Goal, MagnitudeSpec, SparseGPTSpec, Spec, WandaSpec

_ROWS_MEASURED = 128


def by_magnitude(
    targets: Sequence[Target], spec: Spec, *, tokens: int | None = None, note: str = ""
) -> Iterator[Change]:
    """The changes that magnitude alone decides; with scope "global" all targets share a budget."""
    together = [list(targets)] if spec.scope == "global" else [[t] for t in targets]
    for some in together:
        keeps = _masks(some, [[magnitude_score(w) for w in groups_of(t)] for t in some], spec)
        for target, keep in zip(some, keeps, strict=True):
            record = Record("magnitude", str(target.goal), tokens=tokens, note=note)
            yield Change(target, target.view.from_matrix(keep, target.weight.shape), record)


@dataclass
class Decider:
    """Turns the statistics that calibration yields into changes, layer by layer.

    Attributes:
        spec: the method and its options.
        batches: how many batches calibrate, to tell which layers only some of them reach.
        warnings: what the user must know, filled as layers pass.
    """

    spec: WandaSpec | SparseGPTSpec
    batches: int
    warnings: list[str] = field(default_factory=list)
    _factors: dict[int, Factor] = field(default_factory=dict)
    _factors_of: Moments | None = None

    def changes(self, stop: Sequence[tuple[Target, Moments]]) -> Iterator[Change]:
        """The changes of the layers of one stop."""
        if isinstance(self.spec, WandaSpec) and self.spec.scope == "global":
            targets = [t for t, _ in stop]
            keeps = _masks(targets, [self._scores(t, m) for t, m in stop], self.spec)
            for (target, moments), keep in zip(stop, keeps, strict=True):
                yield self._change(target, moments, keep)
            return
        if isinstance(self.spec, SparseGPTSpec):
            for targets, moments in _solved_together(stop):
                yield from self._solved(self.spec, targets, moments)
            return
        for target, moments in stop:
            keep = _masks([target], [self._scores(target, moments)], self.spec)[0]
            yield self._change(target, moments, keep)

    def unreached(self, target: Target) -> Change:
        """The change of a layer that no batch reached: by magnitude, and said so."""
        note = "no calibration batch reached it: pruned by magnitude"
        self.warnings.append(f"{target.name}: {note}")
        local = MagnitudeSpec(scope="layer" if self.spec.scope == "global" else self.spec.scope)
        return next(by_magnitude([target], local, tokens=0, note=note))

    def _scores(self, target: Target, moments: Moments) -> list[Tensor]:
        """Wanda's score of each group, magnitude's where no token reached the group."""
        return [
            wanda_score(w, square) if rows else magnitude_score(w)
            for w, square, rows in zip(groups_of(target), moments.square, moments.rows, strict=True)
        ]

    def _solved(
        self, spec: SparseGPTSpec, targets: Sequence[Target], moments: Moments
    ) -> Iterator[Change]:
        """SparseGPT group by group, magnitude where no token reached the group."""
        goal, barred = targets[0].goal, [_barred(target) for target in targets]
        weights = [groups_of(target) for target in targets]
        values: list[list[Tensor]] = [[] for _ in targets]
        keeps: list[list[Tensor]] = [[] for _ in targets]
        notes: list[str] = []
        lost, total = [0.0] * len(targets), [0.0] * len(targets)
        for group, rows in enumerate(moments.rows):
            here = [weight[group] for weight in weights]
            if not rows:
                for i, (target, weight) in enumerate(zip(targets, here, strict=True)):
                    score = [[magnitude_score(weight)]]
                    values[i].append(weight.float())
                    keeps[i].append(_masks([target], score, spec, groups=[group])[0][0])
                continue
            factor = self._factor(spec, targets[0], moments, group)
            if factor.damping != spec.damping:
                notes.append(f"damping raised to {factor.damping:g} to factorise")
            solved = sparsegpt(
                here,
                factor,
                goal.pattern,
                goal.sparsity,
                spec.scope or "layer",
                spec.block_size,
                [None if bar is None else bar[group] for bar in barred],
            )
            assert moments.gram is not None
            for i, (weight, found) in enumerate(zip(here, solved, strict=True)):
                values[i].append(found.weight)
                keeps[i].append(found.keep)
                lost[i] += found.squared * rows / 2  # H is 2/n times the second moment
                total[i] += _output_square(weight.float(), moments.gram[group])
        for i, target in enumerate(targets):
            new = target.view.from_matrix(
                torch.stack(values[i]).to(target.weight.dtype), target.weight.shape
            )
            error = lost[i] / total[i] if total[i] > 0 else None
            yield self._change(target, moments, torch.stack(keeps[i]), new, error, notes)

    def _factor(self, spec: SparseGPTSpec, target: Target, moments: Moments, group: int) -> Factor:
        """The factor of a group's inputs, made once for all layers that share the moments."""
        if self._factors_of is not moments:
            self._factors_of, self._factors = moments, {}
        if group not in self._factors:
            assert moments.gram is not None
            self._factors[group] = factorise(
                moments.gram[group], moments.rows[group], spec.damping, target.name
            )
        return self._factors[group]

    def _change(
        self,
        target: Target,
        moments: Moments,
        keep: Tensor,
        new: Tensor | None = None,
        error: float | None = None,
        notes: Sequence[str] = (),
    ) -> Change:
        notes = [*dict.fromkeys(notes)]
        if idle := [g for g, rows in enumerate(moments.rows) if not rows]:
            which = "experts" if target.view.kind.startswith("experts") else "groups"
            notes.append(f"no tokens reached {which} {_few(idle)}: pruned by magnitude")
            self.warnings.append(f"{target.name}: {notes[-1]}")
        if moments.batches < self.batches:
            notes.append(f"reached by {moments.batches} of {self.batches} batches")
        record = Record(
            self.spec.method,
            str(target.goal),
            updates_weights=new is not None,
            error=sampled_error(target, moments, keep) if new is None else error,
            tokens=sum(moments.rows),
            note="; ".join(notes),
        )
        mask = target.view.from_matrix(keep, target.weight.shape)
        return Change(target, mask, record, new)


def _solved_together(
    stop: Sequence[tuple[Target, Moments]],
) -> Iterator[tuple[list[Target], Moments]]:
    """The layers of a stop in order, those of the same inputs and the same goal together."""
    together: dict[tuple[int, Goal], tuple[list[Target], Moments]] = {}
    for target, moments in stop:
        together.setdefault((id(moments), target.goal), ([], moments))[0].append(target)
    yield from together.values()


def groups_of(target: Target) -> Tensor:
    """(groups, rows, cols): a target's weights as they act now, zero where already masked."""
    weight, mask = target.weight.detach(), target.mask
    return target.view.to_matrix(weight if mask is None else masked(weight, mask.mask))


def _barred(target: Target) -> Tensor | None:
    """(groups, rows, cols) bool: weights that an earlier mask pruned. They stay pruned."""
    return None if target.mask is None else target.view.to_matrix(~target.mask.mask)


def _masks(
    targets: Sequence[Target],
    scores: Sequence[Sequence[Tensor]],
    spec: Spec,
    groups: Sequence[int] | None = None,
) -> list[Tensor]:
    """One (groups, rows, cols) mask a target, from a score a group; earlier zeros stay zeros.

    Raises:
        CalibrationError: naming the layer, if a score is NaN.
    """
    flat, free = [], []
    for target, own in zip(targets, scores, strict=True):
        barred = _barred(target)
        for group, score in zip(groups or range(len(own)), own, strict=True):
            if bool(score.isnan().any()):
                raise CalibrationError(
                    f"{target.name}: its scores hold NaN (an infinite weight on an input that is "
                    "always zero); repair the weights or ignore the layer"
                )
            flat.append(score if barred is None else score.masked_fill(barred[group], BARRED))
            free.append(None if barred is None else ~barred[group])
    goal = targets[0].goal
    keeps = project_each(flat, goal.pattern, goal.sparsity, spec.scope or "layer")
    kept = iter(k if f is None else k & f for k, f in zip(keeps, free, strict=True))
    return [torch.stack([next(kept) for _ in own]) for own in scores]


def sampled_error(target: Target, moments: Moments, keep: Tensor) -> float | None:
    """||X (W - W')^T||^2 / ||X W^T||^2 on sampled inputs, of weights that were only masked.

    Of many output rows, an evenly spaced part stands for all.
    """
    lost = total = 0.0
    for group, weight in enumerate(groups_of(target)):
        x = moments.samples(group)
        if x is not None:
            w, kept = _spread(weight).float(), _spread(keep[group])
            share = len(weight) / len(w)
            lost += share * float((x @ w.masked_fill(kept, 0).T).square().sum())
            total += share * float((x @ w.T).square().sum())
    return lost / total if total > 0 else None


def _output_square(weight: Tensor, gram: Tensor) -> float:
    """||X W^T||^2 = tr(W G W^T); of many rows, an evenly spaced part stands for all."""
    part = _spread(weight)
    return float((part @ gram).mul_(part).sum()) * len(weight) / len(part)


def _spread(matrix: Tensor) -> Tensor:
    """Evenly spaced rows of a matrix, fewer than twice _ROWS_MEASURED."""
    return matrix[:: max(1, len(matrix) // _ROWS_MEASURED)]


def _few(items: Sequence[int]) -> str:
    shown = ", ".join(map(str, items[:8]))
    return shown if len(items) <= 8 else f"{shown} and {len(items) - 8} more"
