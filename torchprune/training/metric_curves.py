"""Figures of a metric along levels of sparsity, by matplotlib without its global state."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchprune.errors import MissingExtraError
from torchprune.reports.figure import SUFFIXES
from torchprune.training.run_records import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Place = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A line through (x, y) places, with a band from `low` to `high` where they are given."""

    name: str
    places: Sequence[Place]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def check_suffix(path: str | os.PathLike[str] | None) -> None:
    """Raise RunError if a figure cannot be saved under that name."""
    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        raise RunError(f"{path}: a figure is saved as one of {', '.join(SUFFIXES)}")


def draw_curves(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    dense: float | None,
    purpose: str,
    path: str | os.PathLike[str] | None,
    ring: Place | None = None,
    falling: bool = False,
) -> Figure:
    """One panel of curves with bands. Values that are not finite are left out.

    Args:
        dense: the unpruned model's value, for a dashed line, or None.
        ring: a place to mark, or None.
        falling: x is the share of weights that are left: logarithmic, falling to the right.

    Raises:
        RunError: there is nothing to draw.
        MissingExtraError: the extra "figure" is absent.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
    except ImportError:
        raise MissingExtraError("matplotlib", "figure", purpose) from None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    drawn: set[float] = set()
    for curve in curves:
        lows, highs = (bound or [y for _, y in curve.places] for bound in (curve.low, curve.high))
        good = [
            (x, y, low, high)
            for (x, y), low, high in zip(curve.places, lows, highs, strict=True)
            if all(map(math.isfinite, (x, y)))
        ]
        if not good:
            continue
        xs, ys, below, above = zip(*good, strict=True)
        drawn |= set(xs)
        (line,) = axes.plot(xs, ys, marker="o", markersize=4, label=curve.name)
        if curve.low and all(map(math.isfinite, (*below, *above))):
            axes.fill_between(xs, below, above, alpha=0.18, color=line.get_color(), linewidth=0)
    if not drawn:
        raise RunError(f"no level has a finite {y_label!r} to draw")
    if dense is not None and math.isfinite(dense):
        axes.axhline(dense, color="0.4", linestyle="--", label="dense")
    if ring is not None and all(map(math.isfinite, ring)):
        axes.plot(*ring, "o", markersize=11, fillstyle="none", color="0.4", label="kept")
    if falling:
        axes.set_xscale("log")
        axes.invert_xaxis()
        axes.set_xticks(sorted(drawn))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", labelrotation=45, labelsize="small")
    else:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    if path is not None:
        figure.savefig(path, format=Path(path).suffix[1:].lower(), dpi=150)
    return figure
