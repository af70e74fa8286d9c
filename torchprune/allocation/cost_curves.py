"""Costs at a few sparsities read as curves, so that a budget can be spent by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchprune.allocation.budget import Share
from torchprune.checkpoint.checked_files import read_json
from torchprune.errors import CheckpointError, SpecError

FORMAT = "torchprune sensitivity 1"

Points = Sequence[tuple[float, float]]
"""(sparsity, cost), one layer's."""

_LEAST = 1e-9
"""Of a curve's greatest cost: less is taken for noise around nothing."""


def cost_at(points: Points, sparsity: float) -> float:
    """The cost at a sparsity: between measured ones its logarithm is linear, and goes on so beyond
    them; a cost is never less than one at a lower sparsity.

    Raises:
        SpecError: there are less than two sparsities.
    """
    rising = _rising(points)
    if len(rising) < 2:
        raise SpecError(
            "a budget can be shared by costs measured at two sparsities or more, got "
            f"{[s for s, _ in points]}"
        )
    at = next((i for i, (s, _) in enumerate(rising[1:-1], 1) if sparsity <= s), len(rising) - 1)
    (s, a), (t, b) = rising[at - 1 : at + 1]
    return math.exp(a + (b - a) * (sparsity - s) / (t - s))


def _rising(points: Points) -> list[tuple[float, float]]:
    """(sparsity, logarithm of the cost), both rising."""
    least = max((abs(cost) for _, cost in points), default=0.0) * _LEAST or 1e-30
    found: list[tuple[float, float]] = []
    for sparsity, cost in sorted(dict(points).items()):
        log = math.log(max(cost, least))
        found.append((sparsity, max(log, found[-1][1]) if found else log))
    return found


def curve_of(points: Points, share: Share, levels: int) -> list[tuple[int, float]]:
    """The cost at counts from the least to the greatest allowed."""
    return [(count, cost_at(points, count / share.total)) for count in counts_of(share, levels)]


def counts_of(share: Share, levels: int) -> list[int]:
    """About so many counts, evenly from the least to the greatest allowed."""
    last = max(1, levels - 1)
    return sorted({share.low + round((share.high - share.low) * i / last) for i in range(levels)})


def read_costs(path: Path, metric: str | None) -> dict[str, list[tuple[float, float]]]:
    """The costs by layer in a file that `sensitivity` wrote.

    Args:
        metric: which of the measures; None: what the file ranks by.

    Raises:
        CheckpointError: the file is damaged, something else, or holds no such measure.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file; sensitivity(path=) writes one")
    data = read_json(path)
    if data.get("format") != FORMAT or data.get("units") != "weights":
        raise CheckpointError(f"{path}: no sensitivity to the weights of layers")
    name = data.get("metric") if metric is None else metric
    found: dict[str, list[tuple[float, float]]] = {}
    try:
        for row in data["rows"]:
            value = row[name]["mean"] if isinstance(row[name], Mapping) else row[name]
            if value is not None:
                found.setdefault(row["name"], []).append((row["zeros"] / row["size"], _real(value)))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r:.80})") from None
    if not found:
        raise CheckpointError(f"{path}: nothing in it was measured as {name!r}")
    return found


def _real(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no finite number")
    return float(value)
