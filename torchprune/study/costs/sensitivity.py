"""`sensitivity`: what pruning each layer alone, or taking away each whole unit, would cost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from torchprune.calibration.data import Data
from torchprune.calibration.same_problem import problem_of
from torchprune.calibration.token_masks import TokenMask
from torchprune.errors import SpecError
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.shards import sharded_in
from torchprune.specs.allocation import Loss
from torchprune.specs.functions import described
from torchprune.specs.goals import Goal
from torchprune.specs.spec import Spec
from torchprune.structure.specs import LayerSpec, StructuredSpec
from torchprune.study.costs.bench import Asked, Bench
from torchprune.study.costs.costs import MEASURES, SensitivityError
from torchprune.study.costs.half_done import HalfDone
from torchprune.study.costs.layer_runs import run_layers
from torchprune.study.costs.layer_trials import Level, goals_of
from torchprune.study.costs.sensitivities import SensitivityResult
from torchprune.study.costs.unit_runs import run_blocks, run_units

Mode = Literal["cheap", "exact"]


@on_ordinary_tensors
def sensitivity(
    model: nn.Module,
    data: Iterable[Any] | None,
    spec: Spec | StructuredSpec | LayerSpec,
    *,
    levels: Sequence[Level] | None = None,
    mode: Mode = "cheap",
    metric: str | None = None,
    loss: Loss | None = None,
    windows: Iterable[Any] | None = None,
    max_windows: int = 8,
    solve: bool = True,
    probes: int = 8,
    progress: bool = True,
    path: str | os.PathLike[str] | None = None,
    max_batches: int = 128,
    seed: int = 0,
    tokenizer: Any = None,
    token_mask: TokenMask = None,
) -> SensitivityResult:
    """What pruning each layer alone, or taking away each whole unit, costs the model.

    >>> import torch, torchprune
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> batches = [torch.randn(64, 16)]
    >>> found = torchprune.sensitivity(model, batches, torchprune.WandaSpec(), progress=False)
    >>> found.layers, found.levels
    (['0', '2'], ('0.3', '0.5', '0.7'))
    >>> sorted(found.overrides(0.5))
    ['0', '2']

    The spec says what is tried. A spec for single weights (`WandaSpec`, ...): each layer that it
    would prune, alone, at each level. `LayerSpec`: each block, skipped. `HeadSpec`: each head (with
    grouped queries each key-value head and its queries), masked. `NeuronSpec`, `ChannelSpec`: at
    each level, the units of one MLP or one group of channels that score least.

    "cheap" runs the dense model over the data, and `probes` times backward: all layers and levels
    by their own errors, and by the change of the model's outputs that gradients predict. "exact"
    makes one change after another and runs the model on windows, from the changed block on: what
    comes before it gives what it gave. That is tried on a window first; where it does not give the
    same bits the whole model runs.

    Args:
        model: any module; as it was afterwards, bit for bit, also after an error or Ctrl-C.
        data: calibration batches as `sparsify` takes them, read once: the statistics of scores.
        spec: as above; of its targets, ignored layers and dense overrides no others are tried. Its
            allocation, permutation and the training of blocks are left out.
        levels: sparsities, patterns such as "2:4", or pairs (pattern, sparsity). Default 0.3, 0.5
            and 0.7, or the spec's n:m pattern.
        mode: "cheap" or "exact".
        metric: what ranks: of "exact" "kl" (in nats a row of logits), "loss" (its difference) or
            "change" (||y - y'||^2 / ||y||^2 of outputs without logits); of "cheap" "predicted" (of
            KL or change), "error" (a layer's own, ||X (W - W')^T||^2 / ||X W^T||^2), "squared" (its
            numerator), and of units "taylor" (|weight x gradient| of the loss). Default: the first
            that there is, "taylor" for units where `loss` is given.
        loss: (model, batch) -> scalar: a task's own. Default: a transformers language model's.
        windows: batches that judge in "exact", default the data's first.
        max_windows: read at most so many of them.
        solve: in "exact", whether methods that change weights solve each layer, on what it reads
            in the dense model; otherwise masks of their scores stand for them, as in "cheap".
        probes: backward passes in "cheap", a batch each; 0: errors alone.
        progress: show a progress bar, with the time left.
        path: a JSON file that is written whole after each result, and gone on from if it is there;
            one of another model, spec, data or options is refused.
        max_batches, seed, tokenizer, token_mask: as `sparsify` takes them; the seed is also that of
            the probes.

    Returns:
        a row for each trial, with error bars over the windows.

    Raises:
        SpecError, TargetError: the spec or an option does not fit. Nothing was run.
        CalibrationError: no usable data, statistics or a loss that are not finite, or nothing to
            measure.
        SensitivityError: nothing was measured as `metric`, or the file is damaged or of something
            else.
    """
    _check(model, spec, mode, metric, probes, max_windows)
    units, goals = tried_on(spec, levels)
    asker = "sensitivity"
    batches, notes = Data(data, tokenizer, max_batches, seed, progress, token_mask).read(
        model, asker
    )
    judges = batches[:max_windows]
    if windows is not None:
        given = Data(windows, tokenizer, max_windows, seed, progress, token_mask)
        judges = given.read(model, f"{asker}(windows=)")[0]
    asked = Asked(spec, units, mode, goals, loss, solve, probes, seed, progress)
    empty = SensitivityResult(
        (),
        metric or "",
        units,
        mode,
        described(spec),
        tuple(goals),
        windows=len(judges) if mode == "exact" else len(batches),
        problem=problem_of(model, [batches, judges], described(asked.tells)),
    )
    bench = Bench(model, asked, batches, judges, HalfDone(path, empty), notes)
    run = {"weights": run_layers, "blocks": run_blocks}.get(units, run_units)
    rows = run(bench)
    done = replace(
        bench.file.result, rows=tuple(rows), notes=tuple(bench.notes), dense_loss=bench.dense_loss
    )
    return bench.file.end(replace(done, metric=_metric(done, metric, loss)))


def _check(
    model: object, spec: object, mode: str, metric: str | None, probes: int, max_windows: int
) -> None:
    if not isinstance(model, nn.Module):
        raise SpecError(f"sensitivity is for modules, got {type(model).__name__}")
    if not isinstance(spec, Spec | StructuredSpec | LayerSpec) or type(spec) is Spec:
        raise SpecError(f"spec must be a spec such as WandaSpec() or HeadSpec(), got {spec!r}")
    if mode not in ("cheap", "exact"):
        raise SpecError(f'mode must be "cheap" or "exact", got {mode!r}')
    if metric is not None and metric not in MEASURES:
        raise SpecError(f"metric must be one of {', '.join(MEASURES)}, got {metric!r}")
    for option, value, least in (("probes", probes, 0), ("max_windows", max_windows, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SpecError(f"{option} must be a whole number from {least} on, got {value!r}")
    if (name := sharded_in(model)) is not None:
        raise SpecError(
            f"{name} is sharded over processes; measure a whole copy before fully_shard"
        )


def tried_on(
    spec: Spec | StructuredSpec | LayerSpec, levels: Sequence[Level] | None
) -> tuple[str, dict[str, Goal]]:
    """What a spec is tried on, and the goals of its levels by what they are called.

    Raises:
        SpecError: the spec or a level is not understood, or there are none for these units.
    """
    units = _units_of(spec)
    if units not in ("blocks", "heads"):
        return units, goals_of(levels, spec if isinstance(spec, Spec) else None)
    if levels is not None:
        raise SpecError(f"levels are for weights, neurons and channels; {units} go one by one")
    return units, {}


def _units_of(spec: Spec | StructuredSpec | LayerSpec) -> str:
    if isinstance(spec, Spec):
        return "weights"
    return "blocks" if isinstance(spec, LayerSpec) else spec.kind


def _metric(result: SensitivityResult, metric: str | None, loss: Loss | None) -> str:
    """The measure that ranks."""
    there = result.measures
    if metric is None and there:
        by_task = loss is not None and "taylor" in there
        return "taylor" if by_task else there[0]
    if metric not in there:
        raise SensitivityError(
            f"nothing was measured as {metric!r}; there is {', '.join(there) or 'nothing'}"
        )
    return metric
