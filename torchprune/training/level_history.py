"""What iterative pruning found: a row for each level, as table, figure and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchprune.checkpoint.whole_files import write_whole
from torchprune.reports.figure import SUFFIXES
from torchprune.reports.page import save_page
from torchprune.reports.pieces import Fact, Grid, Line, Lines, Page, Section, Spot
from torchprune.reports.tables import Cells, Column, by_rich, markdown, plain
from torchprune.reports.wording import number, percent
from torchprune.training.metric_curves import Curve, check_suffix, draw_curves
from torchprune.training.run_records import (
    RunError,
    document,
    item,
    metrics_data,
    number_data,
    read_row,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "torchprune history 1"
_WHAT = "history"


@dataclass(frozen=True)
class LevelRow:
    """One level: the model pruned, trained and measured.

    Attributes:
        asked: the level; "dense" for the model as it was given (and trained, if the first level is
            0).
        sparsity: zeros of all weights in the layers with masks, counted after training.
        share: these zeros of all the model's parameters, pruned layers and others.
        metrics: what `evaluate` gave, by name.
        pruning, training, evaluating: wall seconds, informative: one run, on a machine that may be
            busy.
        within: whether the metric is within the stop rule's tolerance; True without one.
        kept: whether it is the level that the model was left at.
    """

    asked: str
    sparsity: float
    share: float
    metrics: Mapping[str, float]
    pruning: float
    training: float
    evaluating: float
    within: bool
    kept: bool


@dataclass(frozen=True)
class History:
    """Rows in ascending order of their levels, the dense model's first.

    Attributes:
        metric: the name of the metric that judges.
        higher_is_better: which way it is good.
    """

    rows: Sequence[LevelRow]
    metric: str
    higher_is_better: bool = True

    @property
    def kept(self) -> LevelRow:
        """The row of the level that the model was left at."""
        return next(row for row in self.rows if row.kept)

    @property
    def best(self) -> LevelRow:
        """The row of the best metric; of equals the sparsest. NaN is worst."""
        sign = 1 if self.higher_is_better else -1

        def goodness(at: int) -> tuple[bool, float, int]:
            value = sign * self.rows[at].metrics[self.metric]
            return value == value, value if value == value else 0.0, at

        return self.rows[max(range(len(self.rows)), key=goodness)]

    def __str__(self) -> str:
        columns, rows = self._columns(), [self._cells(row) for row in self.rows]
        return (by_rich(columns, rows) or plain(columns, rows)).rstrip()

    def to_markdown(self) -> str:
        """The table as GitHub's Markdown."""
        return markdown(self._columns(), [self._cells(row) for row in self.rows])

    def to_json(self) -> str:
        """Everything, as `from_json` reads it; inf and nan as strings."""
        record = {
            "format": FORMAT,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "rows": [row_data(row) for row in self.rows],
        }
        return json.dumps(record, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> History:
        """The history that `to_json` wrote.

        Raises:
            RunError: it is damaged, or something else.
        """
        found = document(text, FORMAT, _WHAT)
        rows = tuple(read_row(LevelRow, one, _WHAT) for one in item(found, "rows", list, _WHAT))
        metric = item(found, "metric", str, _WHAT)
        check_rows(rows, metric)
        if sum(row.kept for row in rows) != 1:
            raise RunError("a damaged history: exactly one row must be kept")
        return cls(rows, metric, item(found, "higher_is_better", bool, _WHAT))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON, whole or not at all; with .html a page, with .png, .svg, .pdf a figure.

        Raises:
            MissingExtraError: the extra "page" or "figure" is absent.
            OSError: it cannot be written; what was there before stays.
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".html":
            save_page(self.page(), path)
        elif suffix in SUFFIXES:
            self.figure(path)
        else:
            write_whole(path, self.to_json() + "\n")

    def page(self) -> Page:
        """The degradation curve of each metric, and the table of the levels."""
        kept, dense = self.kept, self.rows[0]
        curves = [self._curve(metric) for metric in dense.metrics]
        judged = f"{self.metric} {number(kept.metrics[self.metric])}"
        outside = [row.asked for row in self.rows if not row.within]
        return Page(
            title="Pruning level by level",
            lead=f"{len(self.rows)} levels; the model was left at {kept.asked}: "
            f"{percent(kept.sparsity)} of the pruned layers' weights are zero, {judged}.",
            sections=[
                Section("Quality against sparsity", curves),
                Section("Levels", [self._grid()]),
            ],
            facts=[
                Fact("kept level", kept.asked, f"{percent(kept.share)} of all parameters are zero"),
                Fact(f"{self.metric}, kept", number(kept.metrics[self.metric])),
                Fact(f"{self.metric}, dense", number(dense.metrics[self.metric])),
            ],
            warnings=[f"outside the tolerance: level {level}" for level in outside],
            data=json.loads(self.to_json()),
        )

    def _curve(self, metric: str) -> Lines:
        dense, *pruned = self.rows
        spots = [Spot(row.sparsity, row.metrics[metric]) for row in pruned if metric in row.metrics]
        return Lines(
            f"{metric} against sparsity",
            "sparsity of the pruned layers",
            metric,
            [Line("pruned", spots)],
            level=dense.metrics[metric],
            percent=True,
        )

    def _grid(self) -> Grid:
        raw: list[list[float | str | None]] = [
            [
                row.asked,
                row.sparsity,
                row.share,
                *row.metrics.values(),
                row.pruning,
                row.training,
                row.evaluating,
                "",
            ]
            for row in self.rows
        ]
        return Grid("Every level", self._columns(), [self._cells(row) for row in self.rows], raw)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """The history in a file of `save`.

        Raises:
            RunError: it is damaged, or something else.
            OSError: it cannot be read.
        """
        try:
            return cls.from_json(Path(path).read_text("utf-8"))
        except (RunError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: {error}") from None

    def figure(
        self, path: str | os.PathLike[str] | None = None, *, metric: str | None = None
    ) -> Figure:
        """The degradation curve: a metric against the sparsity of the layers with masks.

        The dense model is a dashed line, the kept level a ring. Values that are not finite are left
        out.

        Args:
            path: where to save it, as .png, .svg or .pdf.
            metric: another metric than the one that judges.

        Returns:
            a `matplotlib.figure.Figure`.

        Raises:
            RunError: there is no such metric, nothing to draw, or another suffix.
            MissingExtraError: the extra "figure" is absent.
        """
        check_suffix(path)
        name = self.metric if metric is None else metric
        check_rows(self.rows, name)
        dense, *pruned = self.rows
        return draw_curves(
            [Curve("pruned", [(row.sparsity, row.metrics[name]) for row in pruned])],
            x_label="sparsity of the pruned layers",
            y_label=name,
            dense=dense.metrics[name],
            ring=None if dense.kept else (self.kept.sparsity, self.kept.metrics[name]),
            purpose="History.figure",
            path=path,
        )

    def _columns(self) -> list[Column]:
        numbers = ["sparsity", "of all", *self.rows[0].metrics, *_SECONDS]
        return [Column("level"), *(Column(head, right=True) for head in numbers), Column("")]

    def _cells(self, row: LevelRow) -> Cells:
        seconds = [row.pruning, row.training, row.evaluating]
        mark = " ".join(
            word for word, so in (("kept", row.kept), ("outside", not row.within)) if so
        )
        return [
            row.asked,
            f"{100 * row.sparsity:.2f} %",
            f"{100 * row.share:.2f} %",
            *(f"{value:.4g}" for value in row.metrics.values()),
            *(f"{value:.1f}" for value in seconds),
            mark,
        ]


_SECONDS = ("s to prune", "s to train", "s to measure")


def row_data(row: LevelRow) -> dict[str, object]:
    """A row as JSON knows it."""
    told = {k: number_data(v) if type(v) is float else v for k, v in asdict(row).items()}
    return {**told, "metrics": metrics_data(row.metrics)}


def check_rows(rows: Sequence[LevelRow], metric: str) -> None:
    """Raise RunError unless there are rows, and each has the metric."""
    if not rows:
        raise RunError("a damaged history: it has no rows")
    for row in rows:
        if metric not in row.metrics:
            raise RunError(
                f"level {row.asked}: there is no metric {metric!r:.80}, only "
                f"{', '.join(map(repr, row.metrics))}"
            )
