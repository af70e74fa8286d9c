"""Figures of a metric against sparsity, or by layer, by matplotlib without its global state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchprune.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
_LINED, _ALONE = "osXP", "D^v<>*hp"


@dataclass(frozen=True)
class Point:
    """A place on the x axis, the mean there, and the range of the draws."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """The results of one method in one pattern; `lined`: joined by a line."""

    method: str
    pattern: str
    lined: bool
    points: Sequence[Point]


def draw(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    dense: float | None,
    path: str | os.PathLike[str] | None,
) -> Figure:
    """One panel: colours are methods, markers patterns, bars the range of the draws.

    The y axis is logarithmic where positive values spread over more than a decade.

    Args:
        dense: the unpruned model's value, for a dashed line, or None.
        path: where to save it, in the format its suffix names, or None.

    Raises:
        MissingExtraError: the extra "figure" is absent.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise MissingExtraError("matplotlib", "figure", "Comparison.figure") from None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    cycle = rcParams["axes.prop_cycle"].by_key()["color"]
    methods = list(dict.fromkeys(s.method for s in series))
    markers = _markers(series)
    for each in series:
        points = sorted(each.points, key=lambda p: p.x)
        below, above = [p.y - p.low for p in points], [p.high - p.y for p in points]
        axes.errorbar(
            [p.x for p in points],
            [p.y for p in points],
            yerr=[below, above] if any(below + above) else None,
            color=cycle[methods.index(each.method) % len(cycle)],
            marker=markers[each.pattern],
            linestyle="-" if each.lined else "none",
            capsize=3,
            label=f"{each.method} {each.pattern}",
        )
    if dense is not None:
        axes.axhline(dense, color="0.4", linestyle="--", label="dense")
    values = [p.y for s in series for p in s.points] + ([] if dense is None else [dense])
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    if path is not None:
        figure.savefig(path, format=Path(path).suffix[1:].lower(), dpi=150)
    return figure


def draw_layers(
    kinds: Sequence[str],
    panels: Mapping[str, Sequence[float | None]],
    *,
    path: str | os.PathLike[str] | None,
) -> Figure:
    """A panel for each quantity, a bar for each layer in order; colours are the layers' kinds.

    Quantities with no value at all get no panel; those that are
    positive and spread over more than a decade get a logarithmic axis.

    Args:
        path: where to save it, in the format its suffix names, or None.

    Raises:
        MissingExtraError: the extra "figure" is absent.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "figure", "Report.figure") from None
    shown = {k: values for k, values in panels.items() if any(v is not None for v in values)}
    known = list(dict.fromkeys(kinds))
    cycle = rcParams["axes.prop_cycle"].by_key()["color"]
    figure = Figure(figsize=(6.8, 1.0 + 2.0 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, values) in zip(grid, shown.items(), strict=True):
        for kind in known:
            at = [i for i, v in enumerate(values) if kinds[i] == kind and v is not None]
            colour = cycle[known.index(kind) % len(cycle)]
            axes.bar(at, [values[i] or 0.0 for i in at], width=0.9, color=colour, label=kind)
        heights = [v for v in values if v is not None]
        if min(heights) > 0 and max(heights) > 10 * min(heights):
            axes.set_yscale("log")
        axes.set_ylabel(title)
        axes.grid(axis="y", alpha=0.3)
    grid[-1].set_xlabel("layer, in the order of the model")
    if 1 < len(known) <= len(cycle):
        grid[0].legend(fontsize="x-small", ncols=min(len(known), 4), loc="lower left")
    if path is not None:
        figure.savefig(path, format=Path(path).suffix[1:].lower(), dpi=150)
    return figure


def _markers(series: Sequence[Series]) -> dict[str, str]:
    """Each pattern's own, from one set where lines join them and from another where none do."""
    found: dict[str, str] = {}
    for lined, shapes in ((True, _LINED), (False, _ALONE)):
        patterns = dict.fromkeys(s.pattern for s in series if s.lined == lined)
        found |= {p: shapes[i % len(shapes)] for i, p in enumerate(patterns)}
    return found
