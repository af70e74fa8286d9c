"""`prune_iteratively`: prune a little, train, measure, and again, as far as the metric allows."""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, SupportsFloat, TypeVar

from torch import nn
from tqdm import tqdm

from torchprune.calibration.survey import is_plain
from torchprune.checkpoint.checksums import of_content
from torchprune.checkpoint.whole_files import write_whole
from torchprune.errors import SpecError, TorchpruneError
from torchprune.masking.mask import masked_layers
from torchprune.masking.plain_state import slots_of
from torchprune.masking.targets import make_plan
from torchprune.reports.report import report
from torchprune.sparsify import sparsify
from torchprune.specs.functions import described
from torchprune.specs.spec import Spec
from torchprune.training.drawn_seeds import drawn_seed, seeded
from torchprune.training.kept_states import bring_back, discard, keep
from torchprune.training.level_history import History, LevelRow, check_rows, row_data
from torchprune.training.level_specs import AnySpec, Level, Step, described_levels, read_levels
from torchprune.training.run_records import RunError, document, item, judging, measured, read_row
from torchprune.training.stop_rules import Within

FORMAT = "torchprune iterative run 1"
RUN, HISTORY, START = "run.json", "history.json", "start"

T = TypeVar("T")
Train = Callable[[Any], object]
Evaluate = Callable[[Any], SupportsFloat | Mapping[str, SupportsFloat]]


def prune_iteratively(
    model: nn.Module,
    spec: AnySpec,
    levels: Iterable[Level],
    data: Iterable[Any] | None = None,
    *,
    train: Train,
    evaluate: Evaluate,
    stop: Within | None = None,
    metric: str | None = None,
    higher_is_better: bool = True,
    path: str | os.PathLike[str] | None = None,
    max_batches: int = 128,
    tokenizer: Any = None,
    progress: bool = True,
    seed: int = 0,
) -> History:
    """Prune a model in place to one level after the other, training and measuring it at each.

    >>> import torch, torchprune
    >>> from torchprune.training import Within
    >>> x = torch.randn(64, 8); y = x @ torch.randn(8, 4)
    >>> def fit(model):
    ...     optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    ...     for _ in range(50):
    ...         optimizer.zero_grad()
    ...         (model(x) - y).square().mean().backward()
    ...         optimizer.step()
    >>> def error(model):
    ...     return (model(x) - y).square().mean()
    >>> history = torchprune.prune_iteratively(
    ...     torch.nn.Linear(8, 4), torchprune.MagnitudeSpec(), [0, 0.25, 0.5], train=fit,
    ...     evaluate=error, higher_is_better=False, progress=False)
    >>> [f"{row.asked} {row.sparsity}" for row in history.rows]
    ['dense 0.0', '0.25 0.25', '0.5 0.5']

    Masks grow: what one level pruned stays pruned, and `train` keeps it zero without knowing of it
    (Zhu & Gupta, arXiv 1710.01878; Han et al., arXiv 1506.02626).

    Args:
        model: any module that `sparsify` takes, masked or not.
        spec: what chooses the weights or units; each level replaces its sparsity.
        levels: ascending; each one a sparsity, a pattern ("3:4"), a pair of both, or a whole spec;
            of `LayerSpec` numbers of blocks. A first level of 0 trains the model before anything is
            pruned. Or an object whose `levels` they are, such as `Iterative(...)`.
        data: calibration batches, as `sparsify` takes them, read anew at each level.
        train: model -> anything; trains it in place, with an optimizer of its own. Called with
            gradients cleared.
        evaluate: model -> a number, or metric name -> number. The dense model's comes first: what
            tolerances are counted from.
        stop: `Within(0.01)`; without, all levels are gone through and the model is left at the
            last.
        metric: which of several metrics judges.
        higher_is_better: whether that metric is good when it is high.
        path: a directory. After each level it holds all that it takes to go on: called again with
            the same arguments after a kill, the run continues from the last level that was
            finished, and ends with the same bits as one that was never interrupted. What `train`
            and `evaluate` do, and the data, are not compared; nor are the model's values.
        max_batches, tokenizer: for `sparsify`.
        progress: show a progress bar over the levels.
        seed: each level begins with the global generators of torch, numpy and Python seeded from
            this and its number; after the call they are as they were. Also for `sparsify`.

    Returns:
        a row for each level, and which of them the model was left at.

    Raises:
        SpecError, TargetError: levels or spec cannot be, do not ascend, or do not fit the model,
            which is then as it was.
        RunError: `evaluate` gave no number, the dense metric is NaN, or `path` holds another run or
            a damaged one.
        CheckpointError: a state under `path` is damaged, or the model cannot be saved.
        Exception: what `train` and `evaluate` raise; the model is then as they left it.
    """
    if not isinstance(model, nn.Module):
        raise SpecError(f"model must be a Module, got {type(model).__name__}")
    steps = read_levels(spec, levels)
    for name, function in (("train", train), ("evaluate", evaluate)):
        if not callable(function):
            raise SpecError(f"{name} must be a function of a model, got {function!r}")
    if not isinstance(stop, Within | None):
        raise SpecError(f"stop must be a Within(...) or None, got {stop!r}")
    trains_first = steps[0].amount == 0
    steps = steps[1:] if trains_first else steps
    if not steps:
        raise SpecError("levels hold no sparsity above 0")
    if isinstance(data, Iterator):  # which could be read at one level only
        data = list(islice(data, max_batches + 1))
    with _home(path) as home:
        call = {
            "model": _shape_of(model),
            "levels": ["train the dense model"] * trains_first + described_levels(steps),
            "stop": described(stop),
            "metric": described(metric),
            "higher_is_better": higher_is_better,
            "seed": seed,
        }
        store = _Store(home, call, lasts=path is not None, goes_back=stop is not None)
        run = _Run(
            model, steps, data, train, evaluate, stop, metric, higher_is_better, store,
            trains_first, max_batches, tokenizer, seed,
        )  # fmt: skip
        return run.history(progress=progress)


@contextmanager
def _home(path: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Where states are kept: for good, or as long as it takes."""
    if path is not None:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="torchprune-") as made:
        yield Path(made)


def _shape_of(model: nn.Module) -> str:
    """What a model's class and its tensors' names, shapes and dtypes come to."""
    lasting = (slot for slot in slots_of(model).values() if slot.kind != "transient")
    told = [[s.key, s.kind, str(s.tensor.dtype), list(s.tensor.shape)] for s in lasting]
    return f"{type(model).__name__} {of_content({'tensors': told})}"


# -- running ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Run:
    """One call: the levels of a model, each after the other."""

    model: nn.Module
    steps: Sequence[Step]
    data: Iterable[Any] | None
    train: Train
    evaluate: Evaluate
    stop: Within | None
    metric: str | None
    higher_is_better: bool
    store: _Store
    trains_first: bool
    max_batches: int
    tokenizer: Any
    seed: int

    def history(self, *, progress: bool) -> History:
        """Go through the levels that are left."""
        if self.store.begun:
            self.store.bring_back_last(self.model)
        rows = list(self.store.rows)
        self._check_fit(rows)
        if not self.store.begun:
            self.store.begin(self.model, goes_back=self.trains_first)
        label, total = type(self.steps[0].spec).__name__, 1 + len(self.steps)
        bar = tqdm(total=total, initial=len(rows), desc=label, unit="level", disable=not progress)
        with bar:
            while len(rows) < total and not self._ended(rows):
                rows.append(self._row(len(rows), rows, bar))
                bar.update()
                self.store.commit(self.model, rows, self._kept(rows), self._as_history(rows))
        kept = self._kept(rows)
        if kept != len(rows) - 1:
            self.store.bring_back(self.model, kept)
        return self._as_history(rows)

    def _ended(self, rows: Sequence[LevelRow]) -> bool:
        return self.stop is not None and self.stop.ends([row.within for row in rows])

    def _kept(self, rows: Sequence[LevelRow]) -> int:
        """The sparsest level within, which the dense one always is."""
        return max(i for i, row in enumerate(rows) if row.within)

    def _as_history(self, rows: Sequence[LevelRow]) -> History:
        kept, metric = self._kept(rows), judging(rows[0].metrics, self.metric)
        marked = tuple(replace(row, kept=i == kept) for i, row in enumerate(rows))
        return History(marked, metric, self.higher_is_better)

    def _check_fit(self, rows: Sequence[LevelRow]) -> None:
        """Raise what `sparsify` would, where that can be told before anything is done."""
        if not is_plain(self.model):
            return
        for step in self.steps[max(0, len(rows) - 1) :]:
            if isinstance(step.spec, Spec):
                make_plan(self.model, step.spec)

    def _row(self, at: int, before: Sequence[LevelRow], bar: Any) -> LevelRow:
        """Prune, train and measure: the level of that number; 0 is the dense model."""
        model = self.model
        step = self.steps[at - 1] if at else None
        asked = step.asked if step else "given" if any(masked_layers(model)) else "dense"
        with seeded(drawn_seed(self.seed, at)):
            bar.set_postfix_str(f"{asked}: pruning")
            _, pruning = _timed(lambda: None if step is None else self._prune(step, first=at == 1))
            bar.set_postfix_str(f"{asked}: training")
            model.zero_grad(set_to_none=True)
            trains = step is not None or self.trains_first
            _, training = _timed(lambda: self.train(model) if trains else None)
            bar.set_postfix_str(f"{asked}: measuring")
            metrics, evaluating = _timed(lambda: measured(self.evaluate(model)))
        counted = report(model)
        row = LevelRow(
            asked=asked,
            sparsity=counted.sparsity,
            share=counted.zeros / counted.parameters,
            metrics=metrics,
            pruning=pruning,
            training=training,
            evaluating=evaluating,
            within=True,
            kept=False,
        )
        return row if self.stop is None else self._judged(row, before)

    def _judged(self, row: LevelRow, before: Sequence[LevelRow]) -> LevelRow:
        assert self.stop is not None
        dense = (before or [row])[0]
        name = judging(dense.metrics, self.metric)
        check_rows([row], name)
        value, reference = row.metrics[name], dense.metrics[name]
        if reference != reference:
            raise RunError(f"the dense model's {name!r} is NaN, so nothing is within its tolerance")
        holds = self.stop.holds(value, reference, higher_is_better=self.higher_is_better)
        return replace(row, within=holds)

    def _prune(self, step: Step, *, first: bool) -> None:
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                sparsify(
                    self.model,
                    step.spec,
                    self.data,
                    progress=False,
                    max_batches=self.max_batches,
                    seed=self.seed,
                    tokenizer=self.tokenizer,
                )
        except TorchpruneError:
            if first and self.trains_first:  # refused: as if nothing had been called
                self.store.bring_back_start(self.model)
            raise
        for warning in said:
            warnings.warn(f"{step.asked}: {warning.message}", warning.category, stacklevel=6)


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return function(), time.perf_counter() - started


# -- keeping ---------------------------------------------------------------------------------------


class _Store:
    """States and rows of a run in a directory. `run.json` is the word on what counts: it is written
    after the state that it names, and states that it does not name are removed after it."""

    def __init__(
        self, home: Path, call: Mapping[str, Any], *, lasts: bool, goes_back: bool
    ) -> None:
        self._home, self._call, self._lasts, self._goes_back = home, call, lasts, goes_back
        self.begun, self.rows = False, list[LevelRow]()
        if lasts and (home / RUN).exists():
            self._read()

    def begin(self, model: nn.Module, *, goes_back: bool) -> None:
        """Keep the model as it was given, where it may be asked for again."""
        if self._lasts or goes_back:
            keep(model, self._home / START)
        self._write()

    def bring_back_start(self, model: nn.Module) -> None:
        bring_back(model, self._home / START)

    def bring_back(self, model: nn.Module, at: int) -> None:
        bring_back(model, self._home / _name(at))

    def bring_back_last(self, model: nn.Module) -> None:
        """Make the model what it was when the run was interrupted."""
        bring_back(model, self._home / (_name(len(self.rows) - 1) if self.rows else START))

    def commit(
        self, model: nn.Module, rows: Sequence[LevelRow], kept: int, history: History
    ) -> None:
        """A level is done."""
        last = len(rows) - 1
        needed = {last} if self._lasts else set[int]()
        if self._goes_back:
            needed.add(kept)
        if last in needed:
            keep(model, self._home / _name(last))
        self.rows = list(rows)
        self._write()
        if self._lasts:
            history.save(self._home / HISTORY)
        for at in range(last):
            if at not in needed:
                discard(self._home / _name(at))
        if last > 0:
            discard(self._home / START)

    def _write(self) -> None:
        if self._lasts:
            rows = [row_data(row) for row in self.rows]
            record = {"format": FORMAT, "call": dict(self._call), "rows": rows}
            write_whole(self._home / RUN, json.dumps(record, indent=1, allow_nan=False) + "\n")

    def _read(self) -> None:
        path = self._home / RUN
        try:
            found = document(path.read_text("utf-8"), FORMAT, "iterative run")
            call = item(found, "call", dict, "iterative run")
            rows = item(found, "rows", list, "iterative run")
            self.rows = [read_row(LevelRow, row, "iterative run") for row in rows]
        except (RunError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: {error}; remove the directory to begin anew") from None
        for name, now in self._call.items():
            if (then := call.get(name)) != now:
                raise RunError(
                    f"{self._home} holds a run with another {name}: {_short(then)} then, "
                    f"{_short(now)} now; give another path, or remove the directory"
                )
        self.begun = True


def _name(at: int) -> str:
    return f"level-{at:03d}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
