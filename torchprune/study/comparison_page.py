"""How a comparison is shown on a page: a metric's curve, bars and damage beside a baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torchprune.reports.figure import Series
from torchprune.reports.pieces import Bar, Bars, Grid, Line, Lines, Piece, Section, Spot
from torchprune.reports.tables import Column
from torchprune.reports.wording import number

Range = tuple[float, float, float]
"""A mean, and the least and greatest value over the draws."""


def metric_section(
    metric: str,
    series: Sequence[Series],
    values: Mapping[str, Range],
    *,
    kinds: Mapping[str, str],
    dense: float | None,
    x_label: str,
    ratios: Mapping[str, Range],
    baseline: str,
) -> Section:
    """A metric of all specs: against sparsity, each by itself, and as damage beside a baseline.

    Args:
        series: what is drawn against sparsity; empty where nothing is finite.
        values: label -> the metric.
        kinds: label -> the method, to filter by.
        dense: the unpruned model's value, or None.
        ratios: label -> damage as a share of the baseline's; empty where there is none.
    """
    pieces: list[Piece] = []
    if series:
        heights = [p.y for one in series for p in one.points] + ([] if dense is None else [dense])
        lines = [
            Line(
                f"{one.method} {one.pattern}",
                [Spot(p.x, p.y, p.low, p.high) for p in one.points],
                one.lined,
            )
            for one in series
        ]
        pieces.append(
            Lines(
                f"{metric} against sparsity",
                x_label,
                metric,
                lines,
                level=dense if dense is not None and math.isfinite(dense) else None,
                logarithmic=min(heights) > 0 and max(heights) > 3 * min(heights),
                percent=True,
                note="Means over the draws of calibration data; whiskers are their range.",
            )
        )
    bars = [Bar(label, *ends, kind=kinds[label]) for label, ends in values.items()]
    dense_bar = [] if dense is None else [Bar("dense", dense, kind="dense")]
    pieces.append(Bars(f"{metric} of each spec", metric, [*dense_bar, *bars]))
    if ratios:
        pieces.append(_damage(ratios, baseline))
    return Section(metric, pieces)


def _damage(ratios: Mapping[str, Range], baseline: str) -> Grid:
    rows = [(label, *map(number, ends)) for label, ends in ratios.items()]
    raw = [(label, *ends) for label, ends in ratios.items()]
    heads = [Column(head, right=True) for head in ("mean", "low", "high")]
    title = f"Damage as a share of that of {baseline} (0 is the dense model)"
    return Grid(title, [Column("", fold=True), *heads], rows, raw)
