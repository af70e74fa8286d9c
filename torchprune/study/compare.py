"""`compare`: prune fresh models by several specs and put what is left of each side by side."""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchprune.calibration.batches import Batch, read_batches
from torchprune.calibration.items import is_dataset
from torchprune.checkpoint.whole_files import write_whole
from torchprune.errors import CalibrationError, SpecError
from torchprune.reports.report import report
from torchprune.sparsify import sparsify
from torchprune.specs.functions import described
from torchprune.specs.patterns import NM
from torchprune.specs.spec import Spec
from torchprune.structure.budget_spec import AMOUNTS, BudgetSpec
from torchprune.structure.specs import LayerSpec, StructuredSpec
from torchprune.study.comparison_rows import ComparisonError, Row
from torchprune.study.results import Comparison
from torchprune.study.tasks.evaluation import Perplexity

AnySpec = Spec | StructuredSpec | LayerSpec | BudgetSpec
Measured = SupportsFloat | Mapping[str, SupportsFloat]


def compare(
    model_factory: Callable[[], nn.Module],
    specs: Mapping[str, AnySpec] | Sequence[AnySpec],
    data: Iterable[Any] | Mapping[str, Iterable[Any]] | None,
    eval_fn: Callable[[nn.Module], Measured],
    *,
    dense: bool = True,
    strict: bool = False,
    max_batches: int = 128,
    progress: bool = True,
    path: str | os.PathLike[str] | None = None,
) -> Comparison:
    """Prune a fresh model by every spec, and measure what is left.

    >>> from torchprune import MagnitudeSpec, WandaSpec, compare
    >>> def make():
    ...     _ = torch.manual_seed(0)
    ...     return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> x = torch.randn(64, 16) * torch.arange(16)  # inputs of unequal size
    >>> y = make()(x)
    >>> def error(model):
    ...     return {"error": (model(x) - y).square().mean()}
    >>> found = compare(make, [MagnitudeSpec(), WandaSpec()], [x], error, progress=False)
    >>> found.labels
    ['magnitude unstructured 0.5', 'wanda unstructured 0.5']
    >>> found.ratio("error", "magnitude unstructured 0.5")["wanda unstructured 0.5"].mean < 1
    True

    Args:
        model_factory: makes the model anew, with the same weights each time, such as
            `lambda: copy.deepcopy(model)`. At most one of its models is in use at a time.
        specs: label -> spec, or specs alone, which are then labelled by what they ask for.
        data: calibration batches as `sparsify` takes them, read once; or draw name -> batches, and
            every spec is run on each draw (a spec that needs no data once, its row repeated). None
            as for `sparsify`.
        eval_fn: model -> a number, or metric name -> number. A `Perplexity` is a metric of its
            name; another number is called "value".
        dense: measure the unpruned model too.
        strict: raise what a spec fails with; otherwise it becomes a row with the error's text, and
            the others go on.
        max_batches: read at most so many batches of each draw.
        progress: show a progress bar over the runs.
        path: a JSON file that is written after each result. Rows it already holds, of an equal spec
            (by its `repr`; functions in it by their names and code) on a draw of the same name and
            equal batches, are not run again; failed ones are. Other rows stay in the file. The
            model and `eval_fn` are not compared: give another path when they change.

    Returns:
        the rows, in the order of the specs. Their seconds are informative and no benchmark: single
        runs, one after the other, on a machine that may be busy.

    Raises:
        SpecError: there are no specs, something among them is none, or two have one label.
        CalibrationError: data is no iterable of batches, or is empty.
        ComparisonError: the factory gave no module or the same one twice, `eval_fn` gave no number,
            or the file at `path` is damaged or something else.
        Exception: what measuring the dense model raises, and with `strict` what a spec does.
    """
    named, draws = _labelled(specs), _draws(data, max_batches, digest=path is not None)
    runs = [_Run(label, spec, draw) for label, spec in named.items() for draw in draws]
    make, store = _Factory(model_factory), _Store(path)
    if dense and store.dense is None:
        store.keep_dense(_metrics(eval_fn(make())))
    bar = tqdm(total=len(runs), desc="comparing", unit="run", disable=not progress)
    rows: list[Row] = []
    with bar:
        for run in runs:
            bar.set_postfix_str(run.label)
            row = store.find(run.row) or run.repeated(rows)
            if row is None:
                row = run.result(make, eval_fn, max_batches, strict=strict)
            rows.append(row)
            store.keep(row)
            bar.update()
    return Comparison(tuple(rows), store.dense if dense else None)


# -- what is asked for -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draw:
    """Calibration data by name; `digest` is of its batches."""

    name: str
    data: list[Any] | None
    digest: str


def _draws(data: Any, max_batches: int, *, digest: bool) -> list[_Draw]:
    if data is None:
        return [_Draw("", None, "")]
    if not isinstance(data, Mapping):
        return [_draw("", data, max_batches, digest)]
    if not data:
        raise CalibrationError("data maps no draw to batches; expected draw name -> batches")
    return [_draw(str(name), batches, max_batches, digest) for name, batches in data.items()]


def _draw(name: str, data: Any, max_batches: int, digest: bool) -> _Draw:
    taken = data
    whole = isinstance(data, Tensor | Mapping | str | bytes) or is_dataset(data)
    if isinstance(data, Iterable) and not whole:
        taken = list(islice(data, max(0, max_batches) + 1))  # one more, so that `sparsify` says so
    try:
        batches = read_batches(taken, nn.Module(), max_batches).batches
    except CalibrationError as error:
        raise CalibrationError(f"draw {name!r}: {error}" if name else str(error)) from None
    return _Draw(name, taken, _digest(batches) if digest else "")


def _digest(batches: Sequence[Batch]) -> str:
    """Of all that the model is called with."""
    state = hashlib.sha256()
    for batch in batches:
        for name, value in (*enumerate(batch.args), *batch.kwargs.items()):
            if isinstance(value, Tensor):
                state.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
                state.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
            else:
                state.update(f"{name} {value!r};".encode())
    return state.hexdigest()


def _labelled(specs: Any) -> dict[str, AnySpec]:
    if isinstance(specs, Mapping):
        pairs = list(specs.items())
    elif isinstance(specs, Sequence) and not isinstance(specs, str):
        pairs = [(_label(spec), spec) for spec in specs]
    else:
        raise SpecError(f"specs must be label -> spec or a list of specs, got {specs!r}")
    if not pairs:
        raise SpecError("there are no specs to compare")
    found: dict[str, AnySpec] = {}
    for label, spec in pairs:
        if not isinstance(label, str):
            raise SpecError(f"a spec's label must be a string, got {label!r}")
        _check(label, spec)
        if label in found:
            raise SpecError(f"two specs are {label!r}; give labels: {{label: spec}}")
        found[label] = spec
    return found


def _check(label: str, spec: Any) -> None:
    if not isinstance(spec, AnySpec) or type(spec) in (Spec, StructuredSpec):
        raise SpecError(f"specs[{label!r}] must be a spec such as WandaSpec(), got {spec!r}")


def _label(spec: Any) -> str:
    """What a spec asks for: method, pattern, how much, and options that are not its defaults."""
    _check("?", spec)
    if isinstance(spec, LayerSpec):
        amount = str(spec.drop)
    elif isinstance(spec, BudgetSpec):
        amount = f"{spec.amount} {getattr(spec, spec.amount):.4g}"
    elif isinstance(spec, Spec) and isinstance(spec.pattern, NM):
        amount = ""
    else:
        amount = f"{spec.sparsity:.4g}"
    return " ".join(filter(None, (_method(spec), _pattern(spec), amount, _options(spec))))


def _method(spec: AnySpec) -> str:
    if isinstance(spec, Spec):
        return spec.label
    if isinstance(spec, BudgetSpec):
        return spec.method
    return spec.score_name if isinstance(spec, StructuredSpec) else spec.score


def _pattern(spec: AnySpec) -> str:
    if isinstance(spec, BudgetSpec):
        return "+".join(one.method for one in spec.kinds)
    return str(spec.goal.pattern) if isinstance(spec, Spec) else spec.method


def _options(spec: AnySpec) -> str:
    """The options that are not those of a spec with the same goal and score alone."""
    values = {f.name: getattr(spec, f.name) for f in fields(spec)}
    needed = [f.name for f in fields(spec) if f.default is f.default_factory is MISSING]
    told = ("sparsity", "pattern", "drop", "score", *AMOUNTS, *needed)
    if isinstance(spec, BudgetSpec) and all(one == type(one)() for one in spec.kinds):
        told = (*told, "over")  # the kinds are in the pattern
    goal = {k: v for k, v in values.items() if k in told}
    usual = type(spec)(**goal)
    return ", ".join(f"{k}={v}" for k, v in values.items() if v != getattr(usual, k))


# -- running ---------------------------------------------------------------------------------------


class _Factory:
    """Makes models, and sees that each is another one."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make, self._made = make, list[weakref.ref[nn.Module]]()

    def __call__(self) -> nn.Module:
        model = self._make()
        if not isinstance(model, nn.Module):
            raise ComparisonError(f"model_factory must make a Module, got {type(model).__name__}")
        if any(made() is model for made in self._made):
            raise ComparisonError(
                "model_factory gave the same model twice, and it is pruned by now; make a new one "
                "in each call, such as lambda: copy.deepcopy(model)"
            )
        self._made.append(weakref.ref(model))
        return model


@dataclass(frozen=True)
class _Run:
    """One spec on one draw."""

    label: str
    spec: AnySpec
    draw: _Draw

    @property
    def row(self) -> Row:
        """Its row, without results."""
        return Row(
            label=self.label,
            method=_method(self.spec),
            options=_options(self.spec),
            pattern=_pattern(self.spec),
            draw=self.draw.name,
            spec=described(self.spec),
            data=self.draw.digest if self.spec.needs_data else "",
        )

    def repeated(self, rows: Sequence[Row]) -> Row | None:
        """The result of an earlier draw, for a spec that needs no data."""
        for row in rows:
            if row.label == self.label and not (self.spec.needs_data or row.error):
                note = f"needs no data: draws repeat {row.draw!r}"
                return replace(row, draw=self.draw.name, notes=(*row.notes, note))
        return None

    def result(
        self,
        make: _Factory,
        eval_fn: Callable[[nn.Module], Measured],
        max_batches: int,
        *,
        strict: bool,
    ) -> Row:
        """Prune and measure."""
        try:
            model = make()
            started = time.perf_counter()
            sparsify(model, self.spec, self.draw.data, progress=False, max_batches=max_batches)
            seconds = time.perf_counter() - started
            counted = report(model)
            metrics = _metrics(eval_fn(model))
        except ComparisonError:
            raise
        except Exception as error:
            if strict:
                raise
            return replace(
                self.row, error=f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
        return replace(
            self.row,
            sparsity=counted.sparsity,
            share=counted.zeros / counted.parameters,
            metrics=metrics,
            seconds=seconds,
            peak_held_bytes=counted.peak_held_bytes,
            notes=(*counted.notes, *counted.warnings),
        )


def _metrics(found: object) -> dict[str, float]:
    if isinstance(found, Perplexity):
        return {"perplexity": float(found)}
    if isinstance(found, Mapping) and found:
        return {str(name): _number(value) for name, value in found.items()}
    return {"value": _number(found)}


def _number(value: object) -> float:
    if not isinstance(value, SupportsFloat) or (isinstance(value, Tensor) and value.numel() != 1):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ComparisonError(
            f"eval_fn must give a number or a mapping of metric name -> number, got {got}"
        )
    return float(value.detach() if isinstance(value, Tensor) else value)


# -- keeping ---------------------------------------------------------------------------------------


class _Store:
    """Results so far, in a file where there is one."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else Path(path)
        self._earlier, self.dense = self._read()
        self._rows = list(self._earlier)
        if self._path is not None and not self._path.exists():
            self._write()  # that it cannot be written shows before the work and not after it

    def find(self, wanted: Row) -> Row | None:
        """What an earlier call found for the same spec on the same draw, under its label now."""
        run = (wanted.spec, wanted.draw, wanted.data)
        found = [y for y in self._earlier if (y.spec, y.draw, y.data) == run and y.error is None]
        found.sort(key=lambda row: row.label != wanted.label)
        return replace(found[0], label=wanted.label) if found else None

    def keep_dense(self, metrics: Mapping[str, float]) -> None:
        """Add the unpruned model's metrics."""
        self.dense = metrics
        self._write()

    def keep(self, row: Row) -> None:
        """Add a result, in place of an earlier one of that label and draw."""
        if row not in self._rows:
            names = (row.label, row.draw)
            self._rows = [y for y in self._rows if (y.label, y.draw) != names] + [row]
            self._write()

    def _read(self) -> tuple[Sequence[Row], Mapping[str, float] | None]:
        if self._path is None or not self._path.exists():
            return (), None
        try:
            found = Comparison.from_json(self._path.read_text("utf-8"))
        except (ComparisonError, UnicodeDecodeError) as error:
            raise ComparisonError(
                f"{self._path}: {error}; name another file, or remove this one"
            ) from None
        return found.rows, found.dense

    def _write(self) -> None:
        if self._path is not None:
            write_whole(self._path, Comparison(self._rows, self.dense).to_json() + "\n")
