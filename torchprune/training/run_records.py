"""What runs of several trainings write down: JSON that is read back with its damage named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, SupportsFloat, TypeVar

from torch import Tensor

from torchprune.errors import TorchpruneError
from torchprune.reports.result_text import result_of

T = TypeVar("T")


class RunError(TorchpruneError, ValueError):
    """A run of several trainings cannot be made, gone on with or read, or lacks what is asked."""


def measured(found: object) -> dict[str, float]:
    """What an `evaluate` gave, as metrics by name; a number alone is called "value".

    Raises:
        RunError: it is neither a number nor a mapping of metric name -> number.
    """
    if isinstance(found, Mapping) and found:
        return {str(name): _number(value) for name, value in found.items()}
    return {"value": _number(found)}


def _number(value: object) -> float:
    if not isinstance(value, SupportsFloat) or (isinstance(value, Tensor) and value.numel() != 1):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RunError(
            f"evaluate must give a number or a mapping of metric name -> number, got {got}"
        )
    return float(value.detach() if isinstance(value, Tensor) else value)


def judging(metrics: Mapping[str, float], asked: str | None) -> str:
    """The name of the metric that judges: the one asked for, or the only one.

    Raises:
        RunError: there is no such metric, or there are several and none was asked for.
    """
    known = ", ".join(map(repr, metrics))
    if asked is None:
        if len(metrics) > 1:
            raise RunError(
                f"evaluate gives several metrics ({known}): say which one judges, metric="
            )
        return next(iter(metrics))
    if asked not in metrics:
        raise RunError(f"evaluate gives no metric {asked!r}; it gives {known}")
    return asked


# -- JSON ------------------------------------------------------------------------------------------


def number_data(value: float) -> float | str:
    """A number as JSON knows it; inf and nan as strings."""
    return value if math.isfinite(value) else str(value)


def metrics_data(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Metrics as JSON knows them."""
    return {name: number_data(value) for name, value in metrics.items()}


def document(text: str, form: str, what: str) -> dict[str, Any]:
    """The JSON object of that format in a text.

    Raises:
        RunError: it is damaged, or something else.
    """
    return result_of(text, form, what, RunError)


def item(data: Mapping[str, Any], name: str, kind: type[T], what: str) -> T:
    """A value of a JSON object.

    Raises:
        RunError: it is absent, or of another kind.
    """
    if name not in data:
        raise RunError(f"a damaged {what}: {name!r} is absent")
    return typed(data[name], name, kind, what)


def typed(value: object, name: str, kind: type[T], what: str) -> T:
    """The value, if it is of that kind; floats may be written as strings, or whole.

    Raises:
        RunError: it is of another kind.
    """
    if kind is float and isinstance(value, str) and value in ("inf", "-inf", "nan"):
        value = float(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise RunError(f"a damaged {what}: {name} must be a {kind.__name__}, got {value!r:.80}")
    return value


def read_row(kind: type[T], data: object, what: str) -> T:
    """A frozen row of numbers, strings and metrics, as `dataclasses.asdict` wrote it.

    Raises:
        RunError: a field is absent, unknown or of another kind.
    """
    told = typed(data, "a row", dict, what)
    kinds: dict[str, Any] = {f.name: f.type for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := told.keys() - kinds.keys():
        raise RunError(f"a damaged {what}: a row holds {min(unknown)!r:.80}")
    values: dict[str, Any] = {}
    for name, hint in kinds.items():
        if hint == "Mapping[str, float]":
            found = item(told, name, dict, what)
            values[name] = {k: typed(v, f"metric {k!r:.80}", float, what) for k, v in found.items()}
        else:
            values[name] = item(told, name, _KINDS[hint], what)
    return kind(**values)


_KINDS: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool}
