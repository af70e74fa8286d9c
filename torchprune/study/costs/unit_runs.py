"""Trials of whole units, one after the other: blocks skipped, units of groups masked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.allocation.output_probes import predicted_damage
from torchprune.errors import CalibrationError
from torchprune.masking.mask import original_of
from torchprune.masking.packing import masked, pack_bits
from torchprune.masking.selection import Layer, repeated_blocks
from torchprune.reports.report import RunRecord
from torchprune.structure.blocks import droppable, first_of, given_to, skipped
from torchprune.structure.prune_units import Units, UnitScorer
from torchprune.structure.scores import default_loss
from torchprune.structure.specs import LayerSpec, StructuredSpec
from torchprune.study.costs.bench import Bench
from torchprune.study.costs.costs import Cost
from torchprune.study.costs.damage import estimates
from torchprune.study.costs.kinds import depth_of
from torchprune.study.costs.layer_trials import in_place

# -- blocks ----------------------------------------------------------------------------------------


def run_blocks(bench: Bench) -> list[Cost]:
    """A row for each block that may go: what it costs to hand on its input in its place."""
    spec, run = bench.asked.spec, RunRecord(spec=bench.asked.spec)
    assert isinstance(spec, LayerSpec)
    blocks, _ = droppable(bench.model, spec, bench.batches[0], run)
    _note_skipped(bench, run)
    if not blocks:
        raise CalibrationError(f"no block of this {type(bench.model).__name__} can be skipped")
    depths = list(repeated_blocks(bench.model))
    rows = {
        name: Cost(name, "block", depths.index(name), "", size, size)
        for name, block in blocks.items()
        if (size := sum(p.numel() for p in block.parameters()))
    }
    if not bench.asked.exact:
        errors = _turned(bench, blocks)
        found = [replace(row, error=errors[name]) for name, row in rows.items() if name in errors]
        bench.file.keep([row for row in found if bench.file.find(row.name, "") is None])
        return found
    with bench.judge(repeated_blocks(bench.model), []) as judge, bench.bar(len(rows)) as bar:
        for name, row in rows.items():
            known = bench.file.find(name, "")
            if known is None:
                with skipped([blocks[name]]):
                    damage = judge.damage([blocks[name]])
                known = row.measured(estimates(damage))
                bench.file.keep([known])
            rows[name] = known
            bar.update()
    return list(rows.values())


def _turned(bench: Bench, blocks: Mapping[str, nn.Module]) -> dict[str, float]:
    """||out - in||^2 / ||out||^2 of each block, over all calibration data."""
    lost, total = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0.0)

    def watch(stack: ExitStack, name: str, block: nn.Module) -> None:
        def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            one, two = given_to(args, kwargs), first_of(out)
            if one is not None and isinstance(two, Tensor) and one.shape == two.shape:
                lost[name] += float((two.float() - one.float()).square().sum())
                total[name] += float(two.float().square().sum())

        handle = block.register_forward_hook(seen, with_kwargs=True)
        stack.callback(handle.remove)

    with modes.calibration_mode(bench.model), torch.no_grad(), ExitStack() as stack:
        for name, block in blocks.items():
            watch(stack, name, block)
        for batch in bench.batches:
            batch.run(bench.model)
    return {name: lost[name] / total[name] for name in blocks if total[name]}


def _note_skipped(bench: Bench, run: RunRecord) -> None:
    why = dict.fromkeys(run.skipped.values())
    for reason in why:
        names = [name for name, own in run.skipped.items() if own == reason]
        more = "" if len(names) <= 3 else f" and {len(names) - 3} more"
        bench.notes.append(f"{', '.join(names[:3])}{more}: not tried, {reason}")


# -- units of groups -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Gone:
    """Units of a group that go together, and the row without costs."""

    units: Units
    gone: Tensor
    row: Cost

    def keeps(self) -> dict[str, tuple[Layer, Tensor]]:
        return self.units.without(self.gone)


def run_units(bench: Bench) -> list[Cost]:
    """A row for each head; for each group of neurons or channels one a level, those that score
    least going first."""
    spec, run = bench.asked.spec, RunRecord(spec=bench.asked.spec)
    assert isinstance(spec, StructuredSpec)
    scorer = UnitScorer(bench.model, spec, bench.batches, run)
    scores = None if bench.asked.units == "heads" else scorer.scores()
    _note_skipped(bench, run)
    bench.notes += run.warnings
    trials = list(_trials(bench, scorer.units, scores))
    if bench.asked.exact:
        return _exact_units(bench, trials)
    return _cheap_units(bench, scorer, trials)


def _trials(
    bench: Bench, units: Sequence[Units], scores: Sequence[Tensor] | None
) -> Iterator[_Gone]:
    blocks = list(repeated_blocks(bench.model))
    kind, names = bench.asked.units.removesuffix("s"), _names(units)
    for at, own in enumerate(units):
        depth = next((d for key in own.layers if (d := depth_of(key, blocks)) is not None), None)
        for level, gone in _levels(bench, own, None if scores is None else scores[at]):
            keeps = own.without(gone).values()
            sizes = [keep.numel() for _, keep in keeps]
            zeros = sum(keep.numel() - int(keep.sum()) for _, keep in keeps)
            size = sum(sizes) if scores is not None else zeros
            yield _Gone(own, gone, Cost(names[at], kind, depth, level, zeros, size))


def _names(units: Sequence[Units]) -> list[str]:
    """The groups' names, numbered where several have one."""
    found: list[str] = []
    every = [own.group.name for own in units]
    for at, name in enumerate(every):
        number = every[:at].count(name) + 1
        found.append(f"{name} ({number})" if every.count(name) > 1 else name)
    return found


def _levels(bench: Bench, own: Units, score: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Every unit alone; or at each level as many as the spec would let go."""
    count = own.group.count
    if score is None:
        for unit in range(count):
            yield str(unit), torch.arange(count) == unit
        return
    spec, order = bench.asked.spec, score.argsort(stable=True)
    assert isinstance(spec, StructuredSpec)
    for level, goal in bench.asked.goals.items():
        kept = replace(spec, sparsity=float(goal.sparsity)).kept(count, own.group.width)
        gone = torch.zeros(count, dtype=torch.bool)
        gone[order[: count - kept]] = True
        yield level, gone


def _exact_units(bench: Bench, trials: Sequence[_Gone]) -> list[Cost]:
    rows = []
    modules = list(
        {id(y.module): y.module for t in trials for y in t.units.layers.values()}.values()
    )
    blocks = repeated_blocks(bench.model)
    with bench.judge(blocks, modules) as judge, bench.bar(len(trials)) as bar:
        for trial in trials:
            row = bench.file.find(trial.row.name, trial.row.level)
            if row is None:
                weights, touched = {}, []
                for layer, keep in trial.keeps().values():
                    weight = original_of(layer.module, layer.tensor)
                    weights[weight] = masked(weight.data, keep)
                    touched.append(layer.module)
                with in_place(weights):
                    row = trial.row.measured(estimates(judge.damage(touched)))
                bench.file.keep([row])
            rows.append(row)
            bar.update()
    return rows


def _cheap_units(bench: Bench, scorer: UnitScorer, trials: Sequence[_Gone]) -> list[Cost]:
    """By what gradients predict where the layers that read a unit read it no more, and, of units
    that go one by one, by |weight x gradient| of the loss."""
    asked = bench.asked
    known = [bench.file.find(t.row.name, t.row.level) for t in trials]
    if trials and all(known):
        return [row for row in known if row is not None]
    costs: list[dict[str, float]] = [{} for _ in trials]
    if asked.probes:
        for cost, value in zip(costs, _predicted(bench, trials), strict=True):
            if value is not None:
                cost["predicted"] = value
    if asked.units == "heads":
        for cost, value in zip(costs, _taylor(bench, scorer, trials), strict=False):
            cost["taylor"] = value
    rows = [t.row.measured(cost) for t, cost in zip(trials, costs, strict=True)]
    bench.file.keep(rows)
    return rows


def _predicted(bench: Bench, trials: Sequence[_Gone]) -> list[float | None]:
    """By trial, summed over the layers that read its units."""
    layers: dict[str, tuple[Any, list[Tensor], list[int]]] = {}
    for at, trial in enumerate(trials):
        keeps = trial.keeps()
        for target in trial.units.readers:
            key = target.layer.key
            own = layers.setdefault(key, (target, [], []))
            own[1].append(pack_bits(keeps[key][1]))
            own[2].append(at)
    found = predicted_damage(
        bench.model,
        [(target, masks) for target, masks, _ in layers.values()],
        bench.batches,
        probes=bench.asked.probes,
        seed=bench.asked.seed,
        progress=bench.asked.progress,
    )
    totals: list[float | None] = [None] * len(trials)
    for (_, _, places), costs in zip(layers.values(), found, strict=True):
        for at, cost in zip(places, costs or (), strict=bool(costs)):
            totals[at] = (totals[at] or 0.0) + cost
    return totals


def _taylor(bench: Bench, scorer: UnitScorer, trials: Sequence[_Gone]) -> list[float]:
    """By trial, or nothing where the model has no loss."""
    loss = bench.asked.loss or getattr(bench.asked.spec, "loss", None)
    try:
        scores = scorer.taylor(loss or default_loss)
    except Exception:
        if loss is not None:
            raise
        return []  # whatever labels that it was not made for do to the model
    by_group = dict(zip(_names(scorer.units), scores, strict=True))
    return [float(by_group[t.row.name][int(t.row.level)]) / len(bench.batches) for t in trials]
