"""Frozen dataclasses read back from JSON, each value held to the type that its field declares."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def read_as(kind: type[T], found: Any, where: str = "") -> T:
    """A dataclass of JSON's values.

    >>> from torchprune.study.speed.spreads import Ratio
    >>> read_as(Ratio, {"value": 1.0, "low": 1, "high": 2.0})
    Ratio(value=1.0, low=1.0, high=2.0)

    Raises:
        TypeError: a value of another type, a field that is absent, or one that is not known; with
            the path to it.
    """
    if not isinstance(found, dict):
        raise TypeError(f"{where or kind.__name__}: expected an object, got {found!r:.60}")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(typing.cast(Any, kind))}
    if strange := sorted(set(found) - set(known)):
        raise TypeError(f"{where or kind.__name__}: it has no {', '.join(strange)}")
    made = {}
    for name, field in known.items():
        if name in found:
            made[name] = _value(hints[name], found[name], f"{where}.{name}".lstrip("."))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise TypeError(f"{where or kind.__name__}: {name} is absent")
    return kind(**made)


def _value(kind: Any, found: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        if found is None and type(None) in inner:
            return None
        (kind,) = (k for k in inner if k is not type(None))
        return _value(kind, found, where)
    if origin is tuple and isinstance(found, list):
        return tuple(_value(inner[0], one, f"{where}[{k}]") for k, one in enumerate(found))
    if origin is Mapping and isinstance(found, dict):
        return {str(k): _value(inner[1], v, f"{where}[{k!r}]") for k, v in found.items()}
    if is_dataclass(kind) and isinstance(kind, type):
        return read_as(kind, found, where)
    if kind is float and type(found) in (int, float) and math.isfinite(found):
        return float(found)
    if isinstance(kind, type) and type(found) is kind:
        return found
    raise TypeError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {found!r:.60}")
