"""From a layer's weights and statistics to its change: where patterns, scores and solvers meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from torchprune.calibration.moments import Moments
from torchprune.errors import CalibrationError
from torchprune.masking.mask import Record
from torchprune.masking.packing import masked
from torchprune.masking.projection import BARRED, project_each, project_partly
from torchprune.masking.scales import values_of
from torchprune.masking.shards import whole_of
from torchprune.masking.targets import Target
from torchprune.masking.transaction import Change
from torchprune.methods.magnitude import magnitude_score
from torchprune.methods.solve import Solver
from torchprune.modes import exact
from torchprune.specs.goals import Goal
from torchprune.specs.method import GroupMoments, Solution
from torchprune.specs.patterns import NM
from torchprune.specs.spec import Spec

_ROWS_MEASURED = 128

Part = list[tuple[list[Target], Moments]]
"""Layers of the same inputs, those of the same goal together."""


def without_data(targets: Sequence[Target], spec: Spec) -> Iterator[Change]:
    """The changes that weights alone decide; with scope "global" all targets share a budget."""
    together = [list(targets)] if spec.scope == "global" else [[t] for t in targets]
    for some in together:
        keeps = _masks(some, [scores_of(spec, t) for t in some], scope_of(spec, some[0]))
        for target, keep in zip(some, keeps, strict=True):
            note, view = _by_row(spec, target), target.view_text
            record = Record(spec.label, str(target.goal), note=note, view=view)
            yield Change(target, target.view.from_matrix(keep, target.weight.shape), record)


@dataclass
class Decider:
    """Turns the statistics that calibration yields into changes, layer by layer.

    Attributes:
        spec: the method and its options.
        batches: how many batches calibrate, to tell which layers only some of them reach.
        chosen: masks decided beforehand, (groups, rows, cols) by layer key: only the weights of
            those layers are decided.
        warnings: what the user must know, filled as layers pass.
    """

    spec: Spec
    batches: int
    chosen: dict[str, Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _solver: Solver | None = None

    def choose(self, targets: Sequence[Target], scores: Sequence[Sequence[Tensor]]) -> None:
        """Decide masks that share one budget."""
        keeps = _masks(targets, scores, self.spec.scope)
        self.chosen = {t.layer.key: k for t, k in zip(targets, keeps, strict=True)}

    def changes(self, stop: Sequence[tuple[Target, Moments]]) -> Iterator[Change]:
        """The changes of the layers of one stop."""
        for part in self.parts(stop):
            yield from self.decided(part)

    def parts(self, stop: Sequence[tuple[Target, Moments]]) -> Iterator[Part]:
        """The layers of one stop in order, in parts of which none hangs on another's work."""
        if self.spec.scope == "global" and not self.chosen:
            self.choose([t for t, _ in stop], [scores_of(self.spec, t, m) for t, m in stop])
        for _, part in groupby(_solved_together(stop), key=lambda some: id(some[1])):
            yield list(part)

    def decided(self, part: Part) -> Iterator[Change]:
        """The changes of the layers of a part."""
        for targets, moments in part:
            if self.spec.needs_gram:
                yield from self._solved(targets, moments)
                continue
            for target in targets:
                yield self._change(target, moments, self.keep(target, moments))

    def unreached(self, target: Target) -> Change:
        """The change of a layer that no batch reached: by its weights alone, and said so."""
        by = self.spec.label if self.spec.chooses_masks_ahead else "magnitude"
        note = f"no calibration batch reached it: pruned by {by}"
        self.warnings.append(f"{target.name}: {note}")
        keep = self.chosen.get(target.layer.key)
        if keep is None:
            scope = "layer" if self.spec.scope == "global" else scope_of(self.spec, target)
            keep = _masks([target], [scores_of(self.spec, target)], scope)[0]
        found = [self.spec.unseen(w, k) for w, k in zip(groups_of(target), keep, strict=True)]
        changed, new = [one for one in found if one is not None], None
        if changed:
            whole = torch.stack([values for values, _ in changed]).to(target.weight.dtype)
            new = target.view.from_matrix(whole, target.weight.shape)
            note = f"{note}; {changed[0][1]}"
        record = Record(
            by, str(target.goal), new is not None, tokens=0, note=note, view=target.view_text
        )
        return Change(target, target.view.from_matrix(keep, target.weight.shape), record, new)

    def keep(self, target: Target, moments: Moments) -> Tensor:
        """The mask of a layer by its scores alone."""
        keep = self.chosen.get(target.layer.key)
        if keep is None:
            scores = [scores_of(self.spec, target, moments)]
            keep = _masks([target], scores, scope_of(self.spec, target))[0]
        return keep

    def _solved(self, targets: Sequence[Target], moments: Moments) -> Iterator[Change]:
        """What the second moment decides, group by group: new weights, or only better masks.

        Where no token reached a group magnitude decides, and weights stay.

        The layers read the same inputs and have the same goal.
        """
        goal, scope = targets[0].goal, scope_of(self.spec, targets[0])
        spec = self.spec if scope == self.spec.scope else replace(self.spec, scope=scope)
        if self._solver is None or self._solver.moments is not moments:
            self._solver = Solver(spec, moments, targets[0].name)
        solver = self._solver
        weights, barred = [groups_of(t) for t in targets], [_barred(t) for t in targets]
        keeps = None if spec.chooses_weights else [self.keep(t, moments) for t in targets]
        found: list[list[Solution]] = [[] for _ in targets]
        notes: list[str] = []
        for group, rows in enumerate(moments.rows):
            here = [weight[group] for weight in weights]
            if rows:
                solved = solver.solve(
                    group,
                    here,
                    goal,
                    [None if bar is None else bar[group] for bar in barred],
                    [None if keeps is None else keeps[i][group] for i in range(len(targets))],
                    [t.name for t in targets],
                )
                notes += solver.notes
            else:
                solved = [
                    self._by_magnitude(t, w, group)
                    if keeps is None
                    else Solution(w.float(), keeps[i][group], 0.0)
                    for i, (t, w) in enumerate(zip(targets, here, strict=True))
                ]
            for own, one in zip(found, solved, strict=True):
                own.append(one)
        for target, weight, own in zip(targets, weights, found, strict=True):
            new = None
            if spec.fits_weights:
                fitted = torch.stack([one.weight for one in own]).to(target.weight.dtype)
                new = target.view.from_matrix(fitted, target.weight.shape)
            yield self._change(
                target,
                moments,
                torch.stack([one.keep for one in own]),
                new,
                _relative(weight, own, moments),
                notes,
            )

    def _by_magnitude(self, target: Target, weight: Tensor, group: int) -> Solution:
        scores = [[magnitude_score(weight)]]
        keep = _masks([target], scores, scope_of(self.spec, target), groups=[group])[0][0]
        new = self.spec.unseen(weight, keep)
        return Solution(weight.float() if new is None else new[0], keep, 0.0)

    def _change(
        self,
        target: Target,
        moments: Moments,
        keep: Tensor,
        new: Tensor | None = None,
        error: float | None = None,
        notes: Sequence[str] = (),
    ) -> Change:
        notes = [*dict.fromkeys(notes), *filter(None, [_by_row(self.spec, target)])]
        if idle := [g for g, rows in enumerate(moments.rows) if not rows]:
            kind = "experts" if target.view.kind.startswith("experts") else "groups"
            which = f"{kind} {_few(idle)}" if len(moments.rows) > 1 else "it"
            by = self.spec.label if self.spec.chooses_masks_ahead else "magnitude"
            notes.append(f"no tokens reached {which}: pruned by {by}")
            self.warnings.append(f"{target.name}: {notes[-1]}")
        if moments.batches < self.batches:
            notes.append(f"reached by {moments.batches} of {self.batches} batches")
        if new is None:
            if moments.gram is None:
                error = sampled_error(target, moments, keep)
            if self.spec.reconstruct:  # the block's training will change what is kept
                new = target.view.from_matrix(groups_of(target), target.weight.shape)
        record = Record(
            self.spec.label,
            str(target.goal),
            updates_weights=new is not None,
            error=error,
            tokens=sum(moments.rows),
            note="; ".join(notes),
            view=target.view_text,
        )
        mask = target.view.from_matrix(keep, target.weight.shape)
        return Change(target, mask, record, new)


def scope_of(spec: Spec, target: Target) -> str | None:
    """Where the count of a layer's zeros is exact.

    What a weight that feeds back gives is read by itself at every later step: the few units that a
    whole layer's ranking leaves without weights stop to remember, though it costs little in one
    step. So there rows keep their shares.
    """
    shares = spec.scope == "layer" and target.feeds_back and "row" in spec.scopes
    return "row" if shares else spec.scope


def _by_row(spec: Spec, target: Target) -> str:
    """What the report says of a layer whose rows keep their shares, though they need not."""
    if scope_of(spec, target) == spec.scope or isinstance(target.goal.pattern, NM):
        return ""
    return "each row keeps its share: what it gives comes back to it"


def decider_for(spec: Spec, targets: Sequence[Target], batches: int) -> Decider:
    """A decider; masks that need no statistics and share one budget are chosen at once."""
    decider = Decider(spec, batches)
    if spec.chooses_masks_ahead and spec.scope == "global":
        with exact():
            decider.choose(targets, [scores_of(spec, t) for t in targets])
    return decider


def scores_of(spec: Spec, target: Target, moments: Moments | None = None) -> list[Tensor]:
    """What the weights of each group are worth to a method, see `group_scores`."""
    return [
        group_scores(spec, target.name, weight, moments, group)
        for group, weight in enumerate(groups_of(target))
    ]


def group_scores(
    spec: Spec, layer: str, weight: Tensor, moments: Moments | None, group: int
) -> Tensor:
    """(rows, cols) what weights are worth to a method; magnitude's where it needs inputs and no
    token reached them.

    Args:
        layer: its name, for errors.
        weight: (rows, cols).
        moments: of the inputs; None where no batch reached the layer.
        group: which of the moments' groups reads them.
    """
    if spec.needs == "nothing":
        return spec.scores(weight, GroupMoments(layer))
    if moments is None or not moments.rows[group]:
        return magnitude_score(weight)
    return spec.scores(weight, moments.of(group, layer))


def _relative(weight: Tensor, solved: Sequence[Solution], moments: Moments) -> float | None:
    """||X (W - W')^T||^2 / ||X W^T||^2 over all groups that tokens reached."""
    assert moments.gram is not None
    lost = sum(one.squared or 0.0 for one in solved)
    total = sum(
        _output_square(weight[group].float(), moments.gram[group])
        for group, rows in enumerate(moments.rows)
        if rows
    )
    return lost / total if total > 0 else None


def _solved_together(
    stop: Sequence[tuple[Target, Moments]],
) -> Iterator[tuple[list[Target], Moments]]:
    """The layers of a stop in order, those of the same inputs and the same goal together."""
    together: dict[tuple[int, Goal], tuple[list[Target], Moments]] = {}
    for target, moments in stop:
        together.setdefault((id(moments), target.goal), ([], moments))[0].append(target)
    yield from together.values()


def groups_of(target: Target) -> Tensor:
    """(groups, rows, cols): a target's weights as they act now, zero where already masked.

    Of eight-bit codes, the float32 values that they stand for. Of shards every process asks at
    once.
    """
    layer, mask = target.layer, target.mask
    weight = whole_of(target.weight).detach()
    weight = values_of(
        layer.module, layer.tensor, weight if mask is None else masked(weight, mask.mask)
    )
    return target.view.to_matrix(weight)


def _barred(target: Target) -> Tensor | None:
    """(groups, rows, cols) bool: weights that an earlier mask pruned. They stay pruned."""
    return None if target.mask is None else target.view.to_matrix(~target.mask.mask)


def _masks(
    targets: Sequence[Target],
    scores: Sequence[Sequence[Tensor]],
    scope: str | None,
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
    if goal.share < 1:  # on the way to an n:m pattern
        keeps = [project_partly(f, goal.pattern, goal.sparsity, "layer", goal.share) for f in flat]
    else:
        keeps = project_each(flat, goal.pattern, goal.sparsity, scope or "layer")
    kept = iter(k if f is None else k & f for k, f in zip(keeps, free, strict=True))
    return [torch.stack([next(kept) for _ in own]) for own in scores]


def sampled_error(target: Target, moments: Moments, keep: Tensor) -> float | None:
    """||X (W - W')^T||^2 / ||X W^T||^2 of weights that were only masked: on sampled inputs, or by
    the second moment where that is at hand.

    Of many output rows, an evenly spaced part stands for all.
    """
    lost = total = 0.0
    for group, weight in enumerate(groups_of(target)):
        left = sampled_squares(weight, moments, group, weight.masked_fill(keep[group], 0))
        if left is not None:
            lost, total = lost + left[0], total + left[1]
    return lost / total if total > 0 else None


def sampled_squares(
    weight: Tensor, moments: Moments, group: int, change: Tensor
) -> tuple[float, float] | None:
    """||X D^T||^2 and ||X W^T||^2 of a group's change D of its weight W, both (rows, cols): over
    its sampled inputs, or all of them where the second moment is at hand; None where no token
    reached it."""
    if moments.gram is not None:
        gram = moments.gram[group]
        return _output_square(change.float(), gram), _output_square(weight.float(), gram)
    x = moments.samples(group)
    if x is None:
        return None
    w, gone = _spread(weight).float(), _spread(change).float()
    share = len(weight) / len(w)
    return share * float((x @ gone.T).square().sum()), share * float((x @ w.T).square().sum())


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
