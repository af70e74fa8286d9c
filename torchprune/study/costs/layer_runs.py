"""Trials of single layers, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from torchprune import modes
from torchprune.allocation.layer_costs import dense_statistics, output_error, steps_of
from torchprune.allocation.output_probes import predicted_damage
from torchprune.calibration.lockstep import Stop
from torchprune.calibration.survey import is_plain, survey
from torchprune.errors import CalibrationError
from torchprune.masking.packing import pack_bits
from torchprune.masking.targets import Plan, Target, make_plan
from torchprune.methods.decide import Decider
from torchprune.specs.spec import Spec
from torchprune.study.costs.bench import Bench
from torchprune.study.costs.costs import Cost
from torchprune.study.costs.damage import estimates
from torchprune.study.costs.kinds import depth_of, kind_of
from torchprune.study.costs.layer_trials import at_goal, in_place, tried


@dataclass(frozen=True, eq=False)
class _At:
    """A layer at a level, to be tried, and the row without costs."""

    target: Target
    row: Cost


def run_layers(bench: Bench) -> list[Cost]:
    """A row for each layer and level, in the model's order."""
    spec = bench.asked.spec
    assert isinstance(spec, Spec)
    plan = _plan(bench, spec)
    solve = bench.asked.exact and bench.asked.solve and spec.needs_gram
    gram = solve or spec.needs == "gram"
    with modes.random_numbers_kept(bench.model):
        torch.manual_seed(bench.asked.seed)
        stop = dense_statistics(bench.model, plan.targets, bench.batches, spec, gram=gram)
    if solve and spec.alpha:  # what the dense model reads is what the layer reads
        for _, moments in stop:
            moments.cross = moments.gram
    trials = _trials(bench, plan, stop, spec)
    if not trials:
        why = "; ".join(bench.notes) or "no calibration batch reached a layer"
        raise CalibrationError(f"nothing is left to try: {why}")
    how = "as it solves each layer alone" if solve else "by masks alone"
    if spec.needs_gram or spec.reconstruct:
        bench.notes.append(f"{spec.label}: {how}, on the dense model's inputs")
    if bench.asked.exact:
        return _exact_layers(bench, plan, stop, trials, solve)
    return _cheap_layers(bench, stop, trials)


def _plan(bench: Bench, spec: Spec) -> Plan:
    if is_plain(bench.model):
        return make_plan(bench.model, spec)
    seen = survey(bench.model, bench.batches)
    return make_plan(bench.model, spec, seen.readings, seen.gates)


def _trials(bench: Bench, plan: Plan, stop: Stop, spec: Spec) -> dict[str, list[_At]]:
    """By key of a layer its trials; what cannot be tried is noted."""
    found: dict[str, list[_At]] = {}
    reached = {target.layer.key for target, _ in stop}
    unreached = [t.name for t in plan.targets if t.layer.key not in reached]
    if unreached:
        bench.notes.append(f"no calibration batch reached {_few(unreached)}: not tried")
    blocks, misfits = list(plan.blocks), dict[str, list[str]]()
    for target, _ in stop:
        layer, name = target.layer, target.name
        for level, goal in bench.asked.goals.items():
            at = at_goal(target, goal, spec)
            if isinstance(at, str):
                misfits.setdefault(level, []).append(name)
                continue
            depth, size = depth_of(layer.key, blocks), target.weight.numel()
            kind, step = kind_of(name, layer.module), steps_of(at, spec)[0]
            row = Cost(name, kind, depth, level, 0, size, step)
            found.setdefault(layer.key, []).append(_At(at, row))
    for level, names in misfits.items():
        bench.notes.append(f"the shape of {_few(names)} cannot hold {level}: not tried")
    return found


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _exact_layers(
    bench: Bench, plan: Plan, stop: Stop, trials: Mapping[str, Sequence[_At]], solve: bool
) -> list[Cost]:
    spec, file, rows = bench.asked.spec, bench.file, list[Cost]()
    assert isinstance(spec, Spec)
    decider = Decider(spec, len(bench.batches))
    modules = [target.layer.module for target, _ in stop]
    total = sum(map(len, trials.values()))
    with bench.judge(plan.blocks, modules) as judge, bench.bar(total) as bar:
        for target, moments in stop:
            for at in trials.get(target.layer.key, ()):
                row = file.find(at.row.name, at.row.level)
                if row is None:
                    trial = tried(at.target, moments, decider, solve=solve)
                    weight = trial.weight
                    error = output_error(target, moments, target.view.to_matrix(weight))
                    with in_place({target.weight: weight}):
                        found = estimates(judge.damage([target.layer.module]))
                    row = replace(
                        at.row,
                        zeros=trial.zeros,
                        error=error.relative,
                        squared=error.lost / len(bench.batches),
                    ).measured(found)
                    file.keep([row])
                rows.append(row)
                bar.update()
    return rows


def _cheap_layers(bench: Bench, stop: Stop, trials: Mapping[str, Sequence[_At]]) -> list[Cost]:
    wanted = [at.row for some in trials.values() for at in some]
    known = [bench.file.find(row.name, row.level) for row in wanted]
    if all(known):
        return [row for row in known if row is not None]
    spec, asked, rows = bench.asked.spec, bench.asked, list[Cost]()
    assert isinstance(spec, Spec)
    decider = Decider(spec, len(bench.batches))
    layers = []
    with bench.bar(len(wanted)) as bar:
        for target, moments in stop:
            masks = []
            for at in trials.get(target.layer.key, ()):
                trial = tried(at.target, moments, decider, solve=False)
                error = output_error(target, moments, target.view.to_matrix(trial.weight))
                square = error.lost / len(bench.batches)
                rows.append(
                    replace(at.row, zeros=trial.zeros, error=error.relative, squared=square)
                )
                masks.append(pack_bits(trial.keep))
                bar.update()
            layers.append((target, masks))
    if asked.probes:
        found = predicted_damage(
            bench.model,
            [(target, masks) for target, masks in layers if masks],
            bench.batches,
            probes=asked.probes,
            seed=asked.seed,
            progress=asked.progress,
        )
        costs = list[float | None]()
        for own, (_, masks) in zip(found, (y for y in layers if y[1]), strict=True):
            costs += [None] * len(masks) if own is None else own
        rows = [replace(row, predicted=cost) for row, cost in zip(rows, costs, strict=True)]
    bench.file.keep(rows)
    return rows
