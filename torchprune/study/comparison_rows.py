"""The rows of a comparison: a spec on a draw of data, what was measured, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchprune.errors import TorchpruneError

_TEXTS = ("label", "method", "options", "pattern", "draw", "spec", "data")
_NUMBERS = ("sparsity", "share", "seconds")


class ComparisonError(TorchpruneError, ValueError):
    """A comparison cannot be made, resumed or read, or holds not what is asked of it."""


@dataclass(frozen=True)
class Row:
    """One spec on one draw of calibration data.

    Attributes:
        label: the spec's name in the comparison.
        method: how weights were chosen; for whole units, the score.
        options: the spec's other options that are not its defaults.
        pattern: which weights are zero together: a pattern, or "heads", "neurons", "channels",
            "layers".
        draw: the draw's name, "" where there is only one.
        sparsity: zeros of all weights in the layers with masks, counted by `report`; None if the
            run failed.
        share: these zeros of all the model's parameters, pruned layers and others; None likewise.
        metrics: what `eval_fn` gave, by name; empty if the run failed.
        seconds: wall time of `sparsify`, informative: one run, on a machine that may be busy.
        peak_held_bytes: the most that waiting calibration batches held; 0 without calibration.
        notes: the report's notes and warnings.
        error: why the run failed, or None.
        spec: the spec's `repr`.
        data: a digest of the calibration batches, "" without data.
    """

    label: str
    method: str
    options: str
    pattern: str
    draw: str
    spec: str
    data: str = ""
    sparsity: float | None = None
    share: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    peak_held_bytes: int = 0
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Spread:
    """A figure over the draws: its mean, and its least and greatest value."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high or math.isnan(self.mean):
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


def spread_of(values: Iterable[float]) -> Spread:
    """Over the draws; of one value or more."""
    some = list(values)
    low, high = min(some), max(some)
    return Spread(min(max(sum(some) / len(some), low), high), low, high)  # however it rounds


def mean_of(values: Iterable[float | None], form: str) -> str:
    """In that form, of what is known; "" of nothing."""
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if known else ""


def plain_metrics(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """As JSON has them: what is not finite as a word."""
    return {name: v if math.isfinite(v) else str(v) for name, v in metrics.items()}


def read_metrics(found: Any) -> dict[str, float]:
    """What `plain_metrics` wrote."""
    return {
        name: float(value) if value in ("inf", "-inf", "nan") else _number(value)
        for name, value in _as(dict, found).items()
    }


def read_rows(found: Any) -> tuple[Row, ...]:
    """Rows of the JSON; KeyError, TypeError or ValueError for another thing."""
    return tuple(_read_row(item) for item in _as(list, found))


def _read_row(found: Any) -> Row:
    item = _as(dict, found)
    texts: dict[str, Any] = {name: _as(str, item[name]) for name in _TEXTS}
    numbers: dict[str, Any] = {
        name: None if item[name] is None else _number(item[name]) for name in _NUMBERS
    }
    return Row(
        **texts,
        **numbers,
        metrics=read_metrics(item["metrics"]),
        peak_held_bytes=_as(int, item["peak_held_bytes"]),
        notes=tuple(_as(str, note) for note in _as(list, item["notes"])),
        error=None if item["error"] is None else _as(str, item["error"]),
    )


def _number(value: Any) -> float:
    return float(value if type(value) is int else _as(float, value))


def _as(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r:.60}")
    return value
