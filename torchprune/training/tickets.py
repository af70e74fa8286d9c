"""`find_ticket`: the small nets inside a large one that train as well from where it began."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchprune.checkpoint.whole_files import write_whole
from torchprune.errors import SpecError
from torchprune.masking.mask import apply_masks, masked_layers, original_of
from torchprune.masking.matrices import View, view_of
from torchprune.reports.report import report
from torchprune.sparsify import sparsify
from torchprune.specs.functions import described
from torchprune.specs.patterns import NM, Block, Unstructured, parse_pattern
from torchprune.specs.spec import Spec
from torchprune.structure.specs import LayerSpec, StructuredSpec
from torchprune.training.drawn_seeds import drawn_seed, seeded
from torchprune.training.level_specs import Level, Step, described_levels, read_levels
from torchprune.training.run_records import RunError, document, item, judging, measured, read_row
from torchprune.training.schedules import Iterative
from torchprune.training.step_watch import watching_steps
from torchprune.training.ticket_results import (
    DENSE,
    RANDOM,
    REINIT,
    RESULTS,
    TICKET,
    Tickets,
    Trial,
    trial_data,
)
from torchprune.training.ticket_states import TicketStates

FORMAT = "torchprune ticket run 1"
RUN = "run.json"
_WHAT = "search for tickets"

Train = Callable[..., object]
Evaluate = Callable[[Any], Any]


def find_ticket(
    make_model: Callable[[], nn.Module],
    train: Train,
    spec: Spec | StructuredSpec,
    data: Iterable[Any] | None = None,
    *,
    evaluate: Evaluate,
    rounds: int | Iterable[Level] = 5,
    rewind: int | float = 0,
    seeds: int | Sequence[int] = 3,
    baselines: Sequence[str] = (REINIT, RANDOM),
    metric: str | None = None,
    higher_is_better: bool = True,
    confidence: float = 0.95,
    path: str | os.PathLike[str] | None = None,
    max_batches: int = 128,
    progress: bool = True,
) -> Tickets:
    """Search for winning tickets: sparse nets that, from early weights, train as well as the whole.

    In each round the trained model is pruned further, and what stays begins anew from the weights
    and buffers (such as running statistics) that it had at the start, or at an early step. With
    each round's masks two more nets are trained: one with weights of a new initialisation, one
    with random masks of the same counts. A ticket wins where it is not below the dense model within
    the interval of confidence, and above both others by more than that (Frankle & Carbin, arXiv
    1803.03635; rewinding: Frankle et al., arXiv 1912.05671; Renda et al., arXiv 2003.02389).

    >>> import torch, torchprune
    >>> def make():
    ...     return torch.nn.Sequential(
    ...         torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    >>> x = torch.randn(64, 8); y = x[:, :1] * x[:, 1:2]
    >>> def error(model):
    ...     return (model(x) - y).square().mean()
    >>> def fit(model):
    ...     optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ...     for _ in range(20):
    ...         optimizer.zero_grad()
    ...         error(model).backward()
    ...         optimizer.step()
    >>> found = torchprune.find_ticket(
    ...     make, fit, torchprune.MagnitudeSpec(0.75), evaluate=error, rounds=2, seeds=2,
    ...     higher_is_better=False, progress=False)
    >>> [(one.asked, one.left) for one in found.rounds]
    [('0.5', 0.5), ('0.75', 0.25)]
    >>> torchprune.report(found.model(seed=1, round=2)).sparsity
    0.75

    Args:
        make_model: makes a new, dense model, called with torch's, numpy's and Python's global
            generators seeded: it should draw its weights from them, and not set seeds itself.
        train: model -> anything; trains the model in place, with an optimizer of its own. A
            function with a parameter `start` gets, by that name, the step at which the model's
            weights are, 0 or where tickets rewind to, so that it can go on from there; others train
            their whole length again.
        spec: what prunes, to the sparsity of the last round: `MagnitudeSpec(0.98)`, or another.
        data: calibration batches, as `sparsify` takes them, if the spec needs some.
        evaluate: model -> a number, or metric name -> number.
        rounds: so many, each of which prunes the same share of what is left; or the levels
            themselves, as `prune_iteratively` takes them.
        rewind: 0 to the initial weights; a whole number k to those after step k of the dense
            training, counted by its `torch.optim` optimizers; a share between 0 and 1 of its steps,
            which one more training counts.
        seeds: so many draws, or their numbers. Each draws its own weights and its own order of
            training, in which all nets of a round train.
        baselines: some of "reinit" and "random".
        metric: which of several metrics judges.
        higher_is_better: whether that metric is good when it is high.
        confidence: of the intervals over the seeds (Student's t).
        path: a directory that keeps results, rewound weights and masks, written after each
            training. Called again with the same arguments after a kill, the search goes on, with
            the same results as one that was never interrupted. What the functions do and the data
            are not compared.
        max_batches: for `sparsify`.
        progress: show a progress bar over the trainings.

    Returns:
        every result, the table and figure of them, and the tickets themselves.

    Raises:
        SpecError, TargetError: spec, rounds or another argument cannot be, or do not fit the model.
        RunError: make_model gives one model twice, or always the same weights though "reinit" needs
            new ones; training takes fewer steps than `rewind`; `evaluate` gives no number; `path`
            holds another search or a damaged one.
        CheckpointError: a file under `path` is damaged, or the model cannot be saved.
        Exception: what the functions raise.
    """
    steps = _steps(spec, rounds)
    numbers = _seeds(seeds)
    arms = _arms(baselines, steps)
    _check_rewind(rewind)
    if isinstance(confidence, bool) or not 0 < confidence < 1:
        raise SpecError(f"confidence must be above 0 and below 1, got {confidence!r}")
    for name, function in (("make_model", make_model), ("train", train), ("evaluate", evaluate)):
        if not callable(function):
            raise SpecError(f"{name} must be a function, got {function!r}")
    if isinstance(data, Iterator):  # which could be read in one round only
        data = list(islice(data, max_batches + 1))
    home = Path(tempfile.mkdtemp(prefix="torchprune-") if path is None else path)
    states = TicketStates(home, make_model)
    if path is None:  # as long as anybody can ask for its tickets
        weakref.finalize(states, shutil.rmtree, home, ignore_errors=True)
    call = {
        "levels": described_levels(steps),
        "rewind": repr(rewind),
        "seeds": numbers,
        "baselines": list(arms),
        "metric": described(metric),
        "higher_is_better": higher_is_better,
    }
    store = _Store(home, call, lasts=path is not None)
    search = _Search(
        states, store, train, evaluate, data, steps, numbers, arms, rewind, max_batches
    )
    return search.run(metric, higher_is_better, confidence, progress=progress)


# -- what is asked for -----------------------------------------------------------------------------


def _steps(spec: object, rounds: int | Iterable[Level]) -> list[Step]:
    if isinstance(spec, LayerSpec):
        raise SpecError("LayerSpec drops whole blocks, which leaves no net to compare masks in")
    if isinstance(spec, Spec) and spec.permute:
        raise SpecError("permute=True moves weights, and a ticket's go back to where they began")
    if isinstance(rounds, int):
        if isinstance(spec, Spec) and isinstance(spec.pattern, NM):
            raise SpecError(
                f"pattern {spec.pattern} cannot be reached by so many rounds of equal shares: give "
                'the levels, such as rounds=["3:4", "2:4"]'
            )
        if isinstance(spec, Spec | StructuredSpec):
            if not spec.sparsity:
                raise SpecError(f"the last round must prune weights or units, got {spec}")
            rounds = Iterative(0.0, spec.sparsity, rounds).levels
    steps = read_levels(spec, rounds)  # type: ignore[arg-type]
    for step in steps:
        if isinstance(step.spec, LayerSpec) or step.amount == 0:
            raise SpecError(f"a round must prune weights or units, got {step.spec}")
    return steps


def _seeds(seeds: object) -> list[int]:
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return list(range(seeds))
    if isinstance(seeds, Sequence) and not isinstance(seeds, str) and seeds:
        numbers = list(seeds)
        if all(type(n) is int for n in numbers) and len(set(numbers)) == len(numbers):
            return numbers
    raise SpecError(f"seeds must be how many, or different whole numbers, got {seeds!r}")


def _arms(baselines: object, steps: Sequence[Step]) -> list[str]:
    if isinstance(baselines, str) or not isinstance(baselines, Sequence):
        raise SpecError(f'baselines must be some of "reinit" and "random", got {baselines!r}')
    for name in baselines:
        if name not in (REINIT, RANDOM):
            raise SpecError(f'a baseline is "reinit" or "random", got {name!r}')
    uneven = [s.spec for s in steps if getattr(s.spec, "allocation", "") == "global"]
    if RANDOM in baselines and uneven:
        raise SpecError(
            f'{type(uneven[0]).__name__}: with allocation="global" random units would not have the '
            'counts of the ticket: use allocation="uniform", or baselines=("reinit",)'
        )
    return [arm for arm in (REINIT, RANDOM) if arm in baselines]


def _check_rewind(rewind: object) -> None:
    whole = isinstance(rewind, int) and not isinstance(rewind, bool) and rewind >= 0
    if not whole and not (isinstance(rewind, float) and 0 <= rewind < 1):
        raise SpecError(
            "rewind must be 0, a number of steps, or a share of the training between 0 and 1, got "
            f"{rewind!r}"
        )


# -- running ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Search:
    """One call: the trainings of all seeds, rounds and arms, each with seeds of its own."""

    states: TicketStates
    store: _Store
    train: Train
    evaluate: Evaluate
    data: Iterable[Any] | None
    steps: Sequence[Step]
    seeds: Sequence[int]
    baselines: Sequence[str]
    rewind: int | float
    max_batches: int

    def run(
        self, metric: str | None, higher_is_better: bool, confidence: float, *, progress: bool
    ) -> Tickets:
        """Train all that is not trained yet."""
        if not self.store.trials:
            self._check_draws()
        plan = [
            (seed, number, arm)
            for seed in self.seeds
            for number in range(len(self.steps) + 1)
            for arm in ((TICKET, *self.baselines) if number else (DENSE,))
        ]
        done = {(t.seed, t.round, t.arm) for t in self.store.trials}
        bar = tqdm(
            total=len(plan),
            initial=len(done),
            desc="tickets",
            unit="training",
            disable=not progress,
        )
        with bar:
            for seed, number, arm in plan:
                if (seed, number, arm) in done:
                    continue
                bar.set_postfix_str(f"seed {seed}, round {number}, {arm}")
                trial = self._dense(seed) if arm == DENSE else self._masked(seed, number, arm)
                judging(trial.metrics, metric)
                self.store.commit(trial)
                bar.update()
        trials = self.store.trials
        name = judging(trials[0].metrics, metric)
        found = Tickets(
            tuple(trials), name, higher_is_better, confidence, self.store.rewound_to or 0
        )
        if self.store.lasts:
            found.save(self.store.home / RESULTS)
        return found.with_states(self.states)

    def _check_draws(self) -> None:
        """Raise what would show only after the dense training."""
        seed = self.seeds[0]
        one, other = (self.states.fresh(*draw) for draw in ((seed,), (seed, REINIT, 1)))
        if REINIT in self.baselines:
            pairs = zip(one.parameters(), other.parameters(), strict=True)
            if all(torch.equal(a, b) for a, b in pairs if a.dim() > 1):
                raise RunError(
                    "make_model gives the same weights whatever the generators' seed, so there is "
                    "no new initialisation to compare with: let it draw them, or give "
                    'baselines=("random",)'
                )
        if isinstance(self.steps[0].spec, Spec) and not self.steps[0].spec.needs_data:
            self._prune(other, self.steps[0], seed, 1)  # its refusals, before the first training

    # -- trainings -----------------------------------------------------------------------------

    def _dense(self, seed: int) -> Trial:
        """Train the whole model, note what tickets begin with, and the first round's masks."""
        step = self._rewound_to(seed)
        model = self.states.fresh(seed)

        def note() -> None:
            self.states.keep_rewound(seed, model)

        if step == 0:
            note()
        with watching_steps(model, step or None, note) as count:
            trial = self._trained(model, seed, 0, DENSE, start=0)
        if count.steps < step:
            raise RunError(
                f"rewind={self.rewind!r} asks for the weights after step {step}, and train took "
                f"only {count.steps} steps of a torch.optim optimizer"
            )
        self.store.rewound_to = step
        self._next_masks(model, seed, 0)
        return trial

    def _rewound_to(self, seed: int) -> int:
        """The step that tickets rewind to: of a share, counted once, on the first draw."""
        if isinstance(self.rewind, int) or self.rewind == 0:
            return int(self.rewind)
        if self.store.rewound_to is None:
            model = self.states.fresh(seed)
            with watching_steps(model, None, lambda: None) as count:
                self._train(model, seed, 0, start=0)
            return round(self.rewind * count.steps)
        return self.store.rewound_to

    def _masked(self, seed: int, number: int, arm: str) -> Trial:
        model, start = self._begun(seed, number, arm)
        trial = self._trained(model, seed, number, arm, start=start)
        if arm == TICKET and number < len(self.steps):
            self._next_masks(model, seed, number)
        return trial

    def _begun(self, seed: int, number: int, arm: str) -> tuple[nn.Module, int]:
        """A masked model before its training, and the step at which its weights are."""
        start = self.store.rewound_to or 0
        ticket = self.states.ticket(seed, number)
        if arm == TICKET:
            return ticket, start
        if arm == REINIT:
            other = self.states.fresh(seed, REINIT, number)
            return apply_masks(other, self.states.masks(seed, number, other)), 0
        spec, draw = self.steps[number - 1].spec, drawn_seed("masks", seed, number)
        other = self.states.rewound(seed)
        if isinstance(spec, StructuredSpec):
            plain = replace(spec, score="random", refit=False, reconstruct=False, seed=draw)
            self._sparsify(other, plain, draw)
            return other, start
        return apply_masks(other, self._random_masks(seed, number, ticket, draw)), start

    def _random_masks(
        self, seed: int, number: int, ticket: nn.Module, draw: int
    ) -> dict[str, Tensor]:
        """Of the pattern and the counts of a ticket's, at other places."""
        generator = torch.Generator().manual_seed(draw)
        kinds = self.states.kinds(seed, number)
        found = {}
        for layer, mask in masked_layers(ticket):
            shape = original_of(layer.module, layer.tensor).shape
            pattern, view = kinds[layer.key]
            matrices = View.read(view) if view else view_of(layer.module, shape)
            found[layer.key] = matrices.from_matrix(
                shuffled(matrices.to_matrix(mask.mask.cpu()), pattern, generator), shape
            ).to(mask.bits.device)
        return found

    def _trained(self, model: nn.Module, seed: int, number: int, arm: str, *, start: int) -> Trial:
        started = time.perf_counter()
        self._train(model, seed, number, start=start)
        trained = time.perf_counter()
        with seeded(drawn_seed("evaluate", seed, number)):
            metrics = measured(self.evaluate(model))
        asked = self.steps[number - 1].asked if number else DENSE
        return Trial(
            seed=seed,
            round=number,
            arm=arm,
            asked=asked,
            sparsity=report(model).sparsity,
            metrics=metrics,
            training=trained - started,
            evaluating=time.perf_counter() - trained,
        )

    def _train(self, model: nn.Module, seed: int, number: int, *, start: int) -> None:
        """Train; all arms of a round in one order, so that their differences pair."""
        with seeded(drawn_seed("train", seed, number)):
            if _takes_start(self.train):
                self.train(model, start=start)
            else:
                self.train(model)

    # -- pruning -------------------------------------------------------------------------------

    def _next_masks(self, model: nn.Module, seed: int, number: int) -> None:
        """Prune a trained model to the next round's level; only its masks go on."""
        self._prune(model, self.steps[number], seed, number)
        self.states.keep_masks(seed, number + 1, model)

    def _prune(self, model: nn.Module, step: Step, seed: int, number: int) -> None:
        self._sparsify(model, step.spec, drawn_seed("prune", seed, number))

    def _sparsify(self, model: nn.Module, spec: Any, draw: int) -> None:
        with seeded(draw):
            sparsify(
                model,
                spec,
                self.data,
                progress=False,
                max_batches=self.max_batches,
                reversible=False,
                seed=draw,
            )


def _takes_start(train: Train) -> bool:
    try:
        return "start" in inspect.signature(train).parameters
    except (TypeError, ValueError):  # builtins have none
        return False


def shuffled(mask: Tensor, pattern: str, generator: torch.Generator) -> Tensor:
    """Random masks of the same counts, (groups, rows, cols) bool as the given ones.

    Args:
        mask: True = kept.
        pattern: as a record names it, such as "2:4", "block:4x4 0.5" or "unstructured 0.5". Every
            m of an n:m pattern keep their count; of tiles, and of single weights, each matrix
            does, and each row where all rows have the same.
        generator: on the CPU.
    """
    kind = parse_pattern(pattern.split()[0]) if pattern else Unstructured()
    if isinstance(kind, NM):
        lanes = mask.reshape(-1, kind.m)
        return _permuted(lanes, generator).reshape(mask.shape)
    if isinstance(kind, Block):
        tiles = [one[:: kind.rows, :: kind.cols] for one in mask]
        mixed = torch.stack([_matrix(one, generator) for one in tiles])
        return mixed.repeat_interleave(kind.rows, 1).repeat_interleave(kind.cols, 2)
    return torch.stack([_matrix(one, generator) for one in mask])


def _matrix(mask: Tensor, generator: torch.Generator) -> Tensor:
    if len(set(mask.sum(1).tolist())) == 1:
        return _permuted(mask, generator)
    return _permuted(mask.reshape(1, -1), generator).view(mask.shape)


def _permuted(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Each row in a random order of its own."""
    order = torch.rand(rows.shape, generator=generator).argsort(1)
    return rows.gather(1, order)


# -- keeping ---------------------------------------------------------------------------------------


class _Store:
    """Trials of a search in a directory. `run.json` is the word on what counts: it is written after
    the states that a trial's successors need."""

    def __init__(self, home: Path, call: Mapping[str, Any], *, lasts: bool) -> None:
        self.home, self._call, self.lasts = home, call, lasts
        self.trials: list[Trial] = []
        self.rewound_to: int | None = None
        if lasts and (home / RUN).exists():
            self._read()

    def commit(self, trial: Trial) -> None:
        """A training is done."""
        self.trials.append(trial)
        if self.lasts:
            record = {
                "format": FORMAT,
                "call": dict(self._call),
                "rewound_to": self.rewound_to,
                "trials": [trial_data(one) for one in self.trials],
            }
            write_whole(self.home / RUN, json.dumps(record, indent=1, allow_nan=False) + "\n")

    def _read(self) -> None:
        path = self.home / RUN
        try:
            found = document(path.read_text("utf-8"), FORMAT, _WHAT)
            call, rows = item(found, "call", dict, _WHAT), item(found, "trials", list, _WHAT)
            self.trials = [read_row(Trial, row, _WHAT) for row in rows]
            self.rewound_to = item(found, "rewound_to", int, _WHAT)
        except (RunError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: {error}; remove the directory to begin anew") from None
        for name, now in self._call.items():
            if (then := call.get(name)) != now:
                raise RunError(
                    f"{self.home} holds a search with other {name}: {then!r:.200} then, "
                    f"{now!r:.200} now; give another path, or remove the directory"
                )
