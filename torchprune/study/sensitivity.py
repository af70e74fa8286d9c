"""`sensitivity`: what pruning each layer alone, or taking away each whole unit, would cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from torchprune.allocation.layer_costs import dense_statistics, output_error
from torchprune.calibration.batches import Batch
from torchprune.calibration.data import Data
from torchprune.calibration.moments import Moments
from torchprune.calibration.survey import is_plain, survey
from torchprune.calibration.token_masks import TokenMask
from torchprune.errors import CalibrationError, SpecError
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.shards import sharded_in
from torchprune.masking.targets import Plan, Target, make_plan
from torchprune.methods.decide import Decider, groups_of
from torchprune.specs.allocation import Loss
from torchprune.specs.functions import described
from torchprune.specs.spec import Spec
from torchprune.study.damage import Damage, Judge, estimates, judging
from torchprune.study.half_done import HalfDone, problem_of
from torchprune.study.kinds import depth_of, kind_of
from torchprune.study.layer_trials import Level, Trial, at_goal, goals_of, in_place, tried
from torchprune.study.sensitivities import Cost, SensitivityError, SensitivityResult

Mode = Literal["cheap", "exact"]


@on_ordinary_tensors
def sensitivity(
    model: nn.Module,
    data: Iterable[Any] | None,
    spec: Spec,
    *,
    levels: Sequence[Level] | None = None,
    mode: Mode = "cheap",
    metric: str | None = None,
    loss: Loss | None = None,
    windows: Iterable[Any] | None = None,
    max_windows: int = 8,
    solve: bool = True,
    gradients: bool = False,
    progress: bool = True,
    path: str | os.PathLike[str] | None = None,
    max_batches: int = 128,
    seed: int = 0,
    tokenizer: Any = None,
    token_mask: TokenMask = None,
) -> SensitivityResult:
    """What pruning each layer alone costs. The model is as it was afterwards, bit for bit."""
    calibration = Data(data, tokenizer, max_batches, seed, progress, token_mask)
    batches, notes = calibration.read(model, "sensitivity")
    judges = batches[:max_windows]
    if windows is not None:
        judges, _ = Data(windows, tokenizer, max_windows, seed, progress, token_mask).read(
            model, "sensitivity(windows=)"
        )
    goals = goals_of(levels, spec)
    plain = is_plain(model)
    seen = None if plain else survey(model, batches)
    plan = make_plan(model, spec) if seen is None else make_plan(model, spec, seen.readings, seen.gates)
    asked = ["weights", mode, described(spec), *goals, str(metric), str(solve)]
    empty = SensitivityResult((), metric or "kl", "weights", mode, repr(spec), tuple(goals), problem=problem_of(model, [batches, judges], asked))
    file = HalfDone(path, empty)
    stop = dense_statistics(model, plan.targets, batches, spec, gram=spec.needs == "gram" or (solve and spec.needs_gram))
    decider = Decider(spec, len(batches))
    rows = []
    blocks = list(plan.blocks)
    with judging(model, plan.blocks, [t.layer.module for t, _ in stop]) as judge, tqdm(total=len(stop) * len(goals), desc="sensitivity", unit="trial", disable=not progress) as bar:
        judge.look(judges, loss)
        print("replays", judge.replays, judge.measures, judge.loss)
        for target, moments in stop:
            for level, goal in goals.items():
                row = file.find(target.name, level)
                if row is None:
                    at = at_goal(target, goal, spec)
                    if isinstance(at, str):
                        continue
                    trial = tried(at, moments, decider, solve=solve and spec.needs_gram)
                    other = target.view.to_matrix(trial.weight)
                    error = output_error(at, moments, other)
                    with in_place({at.weight: trial.weight}):
                        found = estimates(judge.damage([at.layer.module]))
                    row = Cost(target.name, kind_of(target.name, target.layer.module), depth_of(target.layer.key, blocks), level, trial.zeros, trial.keep.numel(), error=error.relative, squared=error.lost / len(batches), **found)
                    file.keep(row)
                rows.append(row)
                bar.update()
    return file.end(rows, notes)
