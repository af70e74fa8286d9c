"""Numbers and bytes as a page says them, and values as JSON holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchprune.errors import TorchpruneError


class PageError(TorchpruneError, ValueError):
    """A page cannot be made of what it was given, or not under that name."""


def number(value: float | None) -> str:
    """Four digits; whole numbers up to a billion in full; "" for None.

    >>> number(106168320), number(0.50001), number(1234.56), number(1.5e-7), number(float("nan"))
    ('106,168,320', '0.5', '1,235', '1.5e-07', 'nan')
    """
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(float(value))
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def size(count: float) -> str:
    """Bytes in decimal units.

    >>> size(999), size(269_000_000), size(5_100_000_000)
    ('999 B', '269 MB', '5.1 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


def percent(share: float) -> str:
    """Two digits, and never all or nothing for what is not.

    >>> percent(0.5), percent(0.99999), percent(0.000001), percent(1.0)
    ('50.00 %', '99.99 %', '0.01 %', '100.00 %')
    """
    shown = min(max(share, 1e-4), 0.9999) if 0 < share < 1 else share
    return f"{100 * shown:.2f} %"


def as_json(value: Any, where: str = "data") -> Any:
    """The value as JSON holds it: mappings, lists, texts, numbers; inf and nan as texts.

    Raises:
        PageError: something in it is none of these.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(k): as_json(v, f"{where}[{k!r:.80}]") for k, v in value.items()}
    if isinstance(value, Sequence):
        return [as_json(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise PageError(
        f"{where}: expected what JSON can hold (numbers, texts, lists, mappings), got "
        f"{type(value).__name__}"
    )
