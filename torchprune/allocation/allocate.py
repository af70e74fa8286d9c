"""From a plan in which all layers are equally sparse to one whose zeros are shared unevenly.

The statistics are taken in one pass of the dense model: sums of squares and sampled inputs, second
moments only where the method's scores need them. The total is exactly the uniform plan's, see
`budget`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from torchprune import modes
from torchprune.allocation.budget import Share, budget_of, cheapest, share_of, shifted, whole
from torchprune.allocation.cost_curves import counts_of, curve_of, read_costs
from torchprune.allocation.layer_costs import dense_statistics, output_error, steps_of
from torchprune.allocation.output_probes import predicted_damage
from torchprune.allocation.owl import outlier_ratio, owl_sparsities
from torchprune.allocation.search import Place, search
from torchprune.calibration.batches import Batch
from torchprune.calibration.moments import Moments
from torchprune.errors import CalibrationError
from torchprune.masking.packing import pack_bits
from torchprune.masking.selection import matches
from torchprune.masking.targets import Plan, Target
from torchprune.methods.decide import Decider, groups_of, sampled_error
from torchprune.methods.wanda import wanda_score
from torchprune.specs.allocation import OWL, LeastError, MeasuredCosts, Search, Sensitivity
from torchprune.specs.goals import Goal
from torchprune.specs.patterns import Block
from torchprune.specs.spec import Spec

Curve = list[tuple[int, float]]
"""A layer's (count, cost), counts rising."""


@dataclass(frozen=True, eq=False)
class _Measured:
    """A layer that takes part, its share of the budget, and the statistics of its inputs."""

    target: Target
    share: Share
    moments: Moments

    def at(self, count: int) -> Target:
        """The layer with the goal of pruning so many counts."""
        goal = Goal(self.target.goal.pattern, Fraction(count, self.share.total))
        return replace(self.target, goal=goal)


def allocated(
    model: nn.Module, plan: Plan, spec: Spec, batches: Sequence[Batch], *, progress: bool
) -> tuple[Plan, list[str]]:
    """The plan with a sparsity of its own for every layer without an override, and notes on it.

    Layers that no batch reaches keep the uniform one. The model is as it was afterwards.

    Raises:
        CalibrationError: statistics or a loss are not finite, or a loss is missing.
        CheckpointError: the search's file is damaged, or of another search.
    """
    options = spec.uneven
    if options is None:
        return plan, []
    free = {
        t.layer.key: t
        for t in plan.targets
        if not any(matches(key, t.layer) for key in spec.overrides)
    }
    stop = dense_statistics(model, list(free.values()), batches, spec, gram=spec.needs == "gram")
    measured = [_Measured(t, _share(t, spec, options.spread), moments) for t, moments in stop]
    curves, notes = list[Curve](), list[str]()
    if isinstance(options, Sensitivity):
        measured, curves, notes = _by_outputs(
            model, measured, spec, batches, options, progress=progress
        )
    shares = [one.share for one in measured]
    if not measured:
        return plan, ["allocation: no calibration batch reached a layer that could take part"]
    scorer = Decider(spec, len(batches))
    match options:
        case OWL():
            with modes.exact():
                counts = whole(_by_outliers(measured, plan, spec, options), shares)
        case LeastError():
            bar = tqdm(measured, desc="allocation", unit="layer", disable=not progress)
            with modes.exact(), bar:
                curves = [_curve(one, scorer, options) for one in bar]
            counts = whole(cheapest(curves, shares), shares)
        case Sensitivity():
            counts = whole(cheapest(curves, shares), shares)
        case Search():
            places = [_place(one, scorer) for one in measured]
            counts, notes = search(model, places, batches, options, progress=progress)
    assert sum(s.step * n for s, n in zip(shares, counts, strict=True)) == budget_of(shares)
    changed = {
        one.target.layer.key: one.at(count) for one, count in zip(measured, counts, strict=True)
    }
    found = [n / s.total for s, n in zip(shares, counts, strict=True)]
    notes.insert(
        0,
        f"allocation by {type(options).__name__}: sparsities from {min(found):.4g} to "
        f"{max(found):.4g}, in all {budget_of(shares):,} of {sum(s.size for s in shares):,} "
        f"weights of {len(shares)} layers, as uniform allocation would prune",
    )
    targets = [changed.get(t.layer.key, t) for t in plan.targets]
    return replace(plan, targets=targets), notes


def _share(target: Target, spec: Spec, spread: float) -> Share:
    """A layer's share of the budget: its counts are those that its scope and pattern make."""
    view, pattern = target.view, target.goal.pattern
    tall, wide = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)
    rows, cols = view.rows // tall, view.cols // wide
    by_row = spec.scope == "row"
    step, total = steps_of(target, spec)
    already = 0
    if (mask := target.mask) is not None:
        tiles = view.to_matrix(~mask.mask).unflatten(2, (cols, wide)).unflatten(1, (rows, tall))
        gone = tiles.all(4).all(2).sum(2)  # (groups, rows of tiles)
        already = int((gone if by_row else gone.sum(1)).max())
    assert spec.sparsity is not None
    return share_of(step, total, spec.sparsity, spread, already)


def _by_outliers(
    measured: Sequence[_Measured], plan: Plan, spec: Spec, options: OWL
) -> list[float]:
    """Counts by OWL; a layer outside the repeated blocks is a block of its own."""
    blocks: dict[str, list[_Measured]] = {}
    owners = []
    for one in measured:
        key = one.target.layer.key
        owners.append(next((b for b in plan.blocks if key.startswith(f"{b}.")), key))
        blocks.setdefault(owners[-1], []).append(one)

    def scores(members: Sequence[_Measured]) -> Iterator[Tensor]:
        for one in members:
            weights = groups_of(one.target)
            for weight, square, rows in zip(
                weights, one.moments.square, one.moments.rows, strict=True
            ):
                if rows:
                    yield wanda_score(weight, square)

    ratios = [outlier_ratio(partial(scores, some), options.outlier) for some in blocks.values()]
    assert spec.sparsity is not None
    wishes = dict(zip(blocks, owl_sparsities(ratios, spec.sparsity, options.spread), strict=True))
    return shifted([wishes[owner] for owner in owners], [one.share for one in measured])


def _by_outputs(
    model: nn.Module,
    measured: Sequence[_Measured],
    spec: Spec,
    batches: Sequence[Batch],
    options: Sensitivity,
    *,
    progress: bool,
) -> tuple[list[_Measured], list[Curve], list[str]]:
    """The layers whose costs are known, these at counts from the least to the greatest allowed, and
    notes."""
    if options.result is not None:
        found = _as_measured(measured, options)
    elif options.cost == "outputs":
        found = _predicted(model, measured, spec, batches, options, progress=progress)
    else:
        scorer = Decider(spec, len(batches))
        bar = tqdm(measured, desc="allocation", unit="layer", disable=not progress)
        with modes.exact(), bar:
            found = [(one, _errors(one, scorer, options)) for one in bar]
    left = len(measured) - len(found)
    notes = [f"allocation: {left} layers of unknown cost keep the uniform sparsity"] if left else []
    return [one for one, _ in found], [curve for _, curve in found], notes


def _as_measured(
    measured: Sequence[_Measured], options: Sensitivity
) -> list[tuple[_Measured, Curve]]:
    result = options.result
    if isinstance(result, MeasuredCosts):
        costs = {name: list(points) for name, points in result.layers}
    else:
        costs = read_costs(Path(result), options.metric)
    known = [one for one in measured if one.target.name in costs]
    if not known:
        raise CalibrationError(
            "Sensitivity(result=): none of its layers is one of this model's that take part, such "
            f"as {measured[0].target.name if measured else 'none'}; it names "
            f"{', '.join(list(costs)[:3])}"
        )
    return [(o, curve_of(costs[o.target.name], o.share, options.levels)) for o in known]


def _predicted(
    model: nn.Module,
    measured: Sequence[_Measured],
    spec: Spec,
    batches: Sequence[Batch],
    options: Sensitivity,
    *,
    progress: bool,
) -> list[tuple[_Measured, Curve]]:
    scorer = Decider(spec, len(batches))
    counts = [counts_of(one.share, options.levels) for one in measured]
    with modes.exact():
        layers = [
            (one.target, [pack_bits(_keep(one, scorer, count)) for count in some])
            for one, some in zip(measured, counts, strict=True)
        ]
    costs = predicted_damage(
        model, layers, batches, probes=options.probes, seed=options.seed, progress=progress
    )
    return [
        (one, list(zip(some, cost, strict=True)))
        for one, some, cost in zip(measured, counts, costs, strict=True)
        if cost is not None
    ]


def _keep(one: _Measured, scorer: Decider, count: int) -> Tensor:
    """The mask at a count, in the weight's own shape."""
    target = one.at(count)
    return target.view.from_matrix(scorer.keep(target, one.moments), target.weight.shape)


def _errors(one: _Measured, scorer: Decider, options: Sensitivity) -> Curve:
    """A layer's error at counts from the least to the greatest allowed."""
    points = []
    for count in counts_of(one.share, options.levels):
        target = one.at(count)
        values = groups_of(target) * scorer.keep(target, one.moments)
        error = output_error(target, one.moments, values)
        points.append((count, error.relative if options.cost == "error" else error.lost))
    return points


def _curve(one: _Measured, scorer: Decider, options: LeastError) -> list[tuple[int, float]]:
    """A layer's relative error at counts from the least to the greatest allowed."""
    points = []
    for count in counts_of(one.share, options.levels):
        target = one.at(count)
        error = sampled_error(target, one.moments, scorer.keep(target, one.moments))
        if error is None:  # its outputs are zero whatever is pruned
            error = 0.0
        elif not error < float("inf"):
            raise CalibrationError(
                f"{target.name}: its error at sparsity {count / one.share.total:.4g} is {error}"
            )
        points.append((count, error))
    return points


def _place(one: _Measured, scorer: Decider) -> Place:
    """A layer as the search sees it."""

    return Place(one.target, one.share, lambda count: _keep(one, scorer, count))
