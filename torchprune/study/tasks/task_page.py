"""An evaluation as a page and as a figure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torchprune.errors import MissingExtraError
from torchprune.reports.pieces import Bar, Bars, Fact, Grid, Page, Section
from torchprune.reports.tables import Column
from torchprune.study.tasks.evaluation import EvaluationError
from torchprune.study.tasks.score_rows import ScoreRow, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAR = 1.96
"""Standard errors to each side of a bar: 95 %."""


class Shown(Protocol):
    """What is shown of an evaluation."""

    @property
    def rows(self) -> list[ScoreRow]: ...
    @property
    def dense_scores(self) -> Sequence[Scores] | None: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def level(self) -> float: ...
    @property
    def command(self) -> str: ...
    def columns(self) -> list[Column]: ...
    def cells(self) -> list[list[str]]: ...
    def notes(self) -> list[str]: ...
    def to_dict(self) -> dict[str, Any]: ...


def page_of(found: Shown) -> Page:
    """Headline, a chart for each metric, and the table."""
    compared = [row for row in found.rows if row.adjusted is not None]
    sure = [row for row in compared if (row.adjusted or 0.0) < found.level]
    examples = max((row.n for row in found.rows), default=0)
    facts = [
        Fact("tasks", str(len({row.task for row in found.rows}))),
        Fact("examples", f"{examples:,}", "in the largest task"),
    ]
    if found.dense_scores is not None:
        facts.append(Fact("differences found", f"{len(sure)} of {len(compared)}", "after Holm"))
    return Page(
        title="Evaluation",
        lead=_lead(compared, sure),
        sections=[
            Section("Scores", _charts(found), "Bars reach 1.96 standard errors to both sides."),
            Section(
                "Differences" if compared else "Table", [_grid(found)], " ".join(found.notes())
            ),
        ],
        facts=facts,
        warnings=_warnings(found),
        command=found.command,
        data=found.to_dict(),
    )


def _lead(compared: list[ScoreRow], sure: list[ScoreRow]) -> str:
    if not compared:
        return "What the model scores on each task."
    if not sure:
        return (
            "On none of the tasks could a difference between the pruned and the dense model be "
            "shown; the table says how large one would have to be."
        )
    named = ", ".join(f"{row.task} {row.metric}: {row.verdict}" for row in sure[:3])
    rest = f", and {len(sure) - 3} more" if len(sure) > 3 else ""
    return f"Beside the dense model the pruned one differs on {named}{rest}."


def _charts(found: Shown) -> list[Bars]:
    charts = []
    for metric in dict.fromkeys(row.metric for row in found.rows):
        rows = [row for row in found.rows if row.metric == metric]
        dense = {(d.task, d.metric): d for d in found.dense_scores or ()}
        bars = []
        for row in rows:
            if (other := dense.get((row.task, metric))) is not None:
                bars.append(_bar(f"{row.task}, dense", other.value, other.stderr, "dense"))
            kind = "pruned" if dense else ""
            name = f"{row.task}, pruned" if dense else row.task
            bars.append(_bar(name, row.value, row.stderr, kind))
        charts.append(Bars(metric, metric, [bar for bar in bars if math.isfinite(bar.value)]))
    return charts


def _bar(name: str, value: float, stderr: float, kind: str) -> Bar:
    if math.isnan(stderr):
        return Bar(name, value, kind=kind)
    return Bar(name, value, value - BAR * stderr, value + BAR * stderr, kind)


def _grid(found: Shown) -> Grid:
    raw: list[list[float | str | None]] = []
    for row in found.rows:
        head: list[float | str | None] = [row.task, row.metric, row.n]
        if found.dense_scores is None:
            raw.append([*head, row.value])
        else:
            figures = (row.dense, row.value, row.difference, row.p, row.adjusted)
            raw.append([*head, *figures, row.verdict])
    return Grid("Every metric", found.columns(), found.cells(), raw)


def _warnings(found: Shown) -> list[str]:
    said = []
    if limit := found.settings.get("limit"):
        said.append(f"Only the first {limit} examples of each task were read.")
    few = [f"{row.task} {row.metric}" for row in found.rows if 0 < row.n < 30]
    if few:
        said.append(f"Fewer than 30 examples: {', '.join(few)}.")
    bare = [f"{row.task} {row.metric}" for row in found.rows if not row.n]
    if bare:
        said.append(f"Without scores of single examples, so without error bars: {', '.join(bare)}.")
    return said


def figure_of(found: Shown, path: str | os.PathLike[str] | None) -> Figure:
    """Differences from the dense model, each in half widths of its interval, for metrics have
    different units: an interval that leaves out the line at 0 excludes no difference.
    """
    rows = [row for row in found.rows if row.p is not None and _is_drawable(row)]
    if not rows:
        raise EvaluationError("nothing to draw: no metric was compared with a dense model's")
    try:
        from matplotlib.figure import Figure as Drawing
    except ImportError:
        raise MissingExtraError("matplotlib", "figure", "drawing an evaluation") from None
    drawing = Drawing(figsize=(7, 1.2 + 0.35 * len(rows)), layout="constrained")
    axes = drawing.add_subplot()
    for y, row in enumerate(rows):
        half = ((row.high or 0.0) - (row.low or 0.0)) / 2
        ends = [(end or 0.0) / half for end in (row.low, row.difference, row.high)]
        sure = (row.adjusted or 0.0) < found.level
        axes.plot([ends[0], ends[2]], [y, y], color="C3" if sure else "C7")
        axes.plot([ends[1]], [y], "o", color="C3" if sure else "C7")
    axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), [f"{row.task} {row.metric}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("pruned less dense, in half widths of the interval")
    if path is not None:
        drawing.savefig(path)
    return drawing


def _is_drawable(row: ScoreRow) -> bool:
    ends = (row.low, row.high)
    return all(end is not None and math.isfinite(end) for end in ends) and row.low != row.high
