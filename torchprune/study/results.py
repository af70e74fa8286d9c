"""What `compare` found: a row for each spec and draw, as text, Markdown, JSON and a figure."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torchprune.errors import did_you_mean
from torchprune.reports.figure import SUFFIXES, Point, Series, draw
from torchprune.reports.page import save_result
from torchprune.reports.pieces import Fact, Grid, Page, Section
from torchprune.reports.result_text import result_of
from torchprune.reports.tables import Column, by_rich, markdown, plain
from torchprune.reports.wording import number
from torchprune.study.comparison_page import metric_section
from torchprune.study.comparison_rows import (
    ComparisonError,
    Row,
    Spread,
    mean_of,
    plain_metrics,
    read_metrics,
    read_rows,
    spread_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "torchprune comparison 1"

_X_LABELS = {"sparsity": "sparsity of the pruned layers", "share": "zeros of all parameters"}


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of the specs, each spec's draws together.

    `print(comparison)` shows a line for each label, with the mean and the range over its draws.

    Attributes:
        dense: the unpruned model's metrics, or None where it was not measured.
    """

    rows: Sequence[Row]
    dense: Mapping[str, float] | None

    @property
    def labels(self) -> list[str]:
        """The specs' names, in order."""
        return list(dict.fromkeys(row.label for row in self.rows))

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, in the order in which they came."""
        measured = [self.dense or {}, *(row.metrics for row in self.rows)]
        return list(dict.fromkeys(name for metrics in measured for name in metrics))

    def spread(self, metric: str) -> dict[str, Spread]:
        """A metric over each label's draws; labels without a result are left out.

        Raises:
            ComparisonError: there is no such metric.
        """
        self._check(metric)
        found = {label: self._values(label, metric) for label in self.labels}
        return {label: spread_of(y.values()) for label, y in found.items() if y}

    def ratio(self, metric: str, baseline_label: str) -> dict[str, Spread]:
        """r = (value - dense) / (baseline - dense) for each label: its damage beside a baseline's.

        Below 1 is better than the baseline, 0 is the dense model. Values and baselines of the same
        draw are paired; labels without such a pair are left out.

        Raises:
            ComparisonError: no such metric or label, the dense model was not measured, or the
                baseline failed, is not finite or equals the dense model.
        """
        self._check(metric)
        if self.dense is None or metric not in self.dense:
            raise ComparisonError(
                f"a ratio of {metric!r} needs the dense model's: compare(..., dense=True)"
            )
        if baseline_label not in self.labels:
            raise ComparisonError(
                f"no row is labelled {baseline_label!r}{did_you_mean(baseline_label, self.labels)};"
                f" there are {', '.join(map(repr, self.labels))}"
            )
        dense, baseline = self.dense[metric], self._values(baseline_label, metric)
        if not baseline:
            errors = (row.error for row in self.rows if row.label == baseline_label and row.error)
            why = next(errors, "it was not measured")
            raise ComparisonError(f"the baseline {baseline_label!r} has no {metric!r}: {why}")
        for value in baseline.values():
            if value == dense or not math.isfinite(value - dense):
                raise ComparisonError(
                    f"no ratio to the baseline {baseline_label!r}: its {metric!r} is {value:g}, "
                    f"the dense model's {dense:g}; they must differ and be finite"
                )
        found = {}
        for label in self.labels:
            values = self._values(label, metric)
            pairs = [(values[d], baseline[d]) for d in baseline if d in values]
            if pairs:
                found[label] = spread_of([(v - dense) / (b - dense) for v, b in pairs])
        return found

    def __str__(self) -> str:
        columns, rows = self._columns(), self._cells()
        table = by_rich(columns, rows) or plain(columns, rows)
        notes = ((label, self._notes(label)) for label in self.labels)
        return "\n".join([table.rstrip(), *(f"{label}: {note}" for label, note in notes if note)])

    def to_markdown(self) -> str:
        """The table as GitHub's Markdown, with a column of notes."""
        notes = [*([""] if self.dense is not None else []), *map(self._notes, self.labels)]
        rows = [[*line, note] for line, note in zip(self._cells(), notes, strict=True)]
        return markdown([*self._columns(), Column("note")], rows)

    def to_json(self) -> str:
        """Everything, as `from_json` reads it; inf and nan as strings."""
        record = {
            "format": FORMAT,
            "dense": None if self.dense is None else plain_metrics(self.dense),
            "rows": [{**asdict(y), "metrics": plain_metrics(y.metrics)} for y in self.rows],
        }
        return json.dumps(record, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The comparison that `to_json` wrote.

        Raises:
            ComparisonError: it is damaged, or something else.
        """
        found = result_of(text, FORMAT, "comparison", ComparisonError)
        try:
            dense = None if found["dense"] is None else read_metrics(found["dense"])
            return cls(read_rows(found["rows"]), dense)
        except KeyError as error:
            raise ComparisonError(f"a damaged comparison: {error} is absent") from None
        except (TypeError, ValueError) as error:
            raise ComparisonError(f"a damaged comparison: {error}") from None

    def figure(
        self,
        metric: str,
        path: str | os.PathLike[str] | None = None,
        *,
        x: Literal["sparsity", "share"] = "sparsity",
    ) -> Figure:
        """A metric against sparsity: a line for each method, n:m patterns as markers alone.

        Means over the draws, with bars for their range; the dense model is a dashed line. Runs
        that failed and values that are not finite are left out.

        Args:
            path: where to save it, as .png, .svg or .pdf.
            x: "sparsity", of the layers with masks, or "share", zeros of all parameters, which is
                the one to compare where some specs mask whole units.

        Returns:
            a `matplotlib.figure.Figure`.

        Raises:
            ComparisonError: no such metric, nothing to draw, or another suffix.
            MissingExtraError: the extra "figure" is absent.
        """
        if x not in _X_LABELS:
            raise ComparisonError(f'x must be "sparsity" or "share", got {x!r}')
        if path is not None and Path(path).suffix.lower() not in SUFFIXES:
            raise ComparisonError(f"{path}: a figure is saved as one of {', '.join(SUFFIXES)}")
        series = self._series(metric, x)
        if not series:
            raise ComparisonError(f"no row has a finite {metric!r} to draw")
        dense = (self.dense or {}).get(metric)
        return draw(
            series,
            x_label=_X_LABELS[x],
            y_label=metric,
            dense=dense if dense is not None and math.isfinite(dense) else None,
            path=path,
        )

    def page(self, *, baseline: str | None = None) -> Page:
        """The degradation curve, bars and damage of each metric, and the table of all specs.

        Args:
            baseline: the label whose damage the others are measured by; by default the first that
                can be, where the dense model was measured.

        Raises:
            ComparisonError: the baseline named has no damage to measure by.
        """
        failed = [row for row in self.rows if row.error is not None]
        notes = ["", *map(self._notes, self.labels)][self.dense is None :]
        rows = [[*line, note] for line, note in zip(self._cells(), notes, strict=True)]
        columns = [*self._columns(), Column("note", fold=True)]
        draws = len({(row.draw, row.data) for row in self.rows if row.data} or {""})
        what = "a dense model and " if self.dense is not None else ""
        return Page(
            title="Comparison",
            lead=f"{what}{len(self.labels)} ways to prune it, each on {draws} "
            f"{'draw' if draws == 1 else 'draws'} of calibration data.".capitalize(),
            sections=[
                *(self._section(metric, baseline) for metric in self.metrics),
                Section("All specs", [Grid("Means, and ranges over the draws", columns, rows)]),
            ],
            facts=self._facts(),
            warnings=[f"{row.label} {row.draw} failed: {row.error}" for row in failed],
            data=json.loads(self.to_json()),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page (.html), the JSON of `to_json` (.json) or a figure (.png, .svg, .pdf).

        The figure is of the first metric; `figure` draws any.

        Raises:
            PageError: another suffix.
            MissingExtraError: the extra "page", or for a figure "figure", is absent.
            OSError: it cannot be written; what was there before stays.
        """
        save_result(path, self.page(), lambda to: self.figure(next(iter(self.metrics), ""), to))

    def _facts(self) -> list[Fact]:
        """Of the first metric: the dense model's value and the range of the pruned ones'."""
        if not self.metrics:
            return []
        metric = self.metrics[0]
        spreads = {k: s.mean for k, s in self.spread(metric).items() if math.isfinite(s.mean)}
        found = (
            []
            if metric not in (self.dense or {})
            else [
                Fact(f"{metric}, dense", number((self.dense or {})[metric]), "the unpruned model")
            ]
        )
        if spreads:
            low, high = min(spreads, key=spreads.__getitem__), max(spreads, key=spreads.__getitem__)
            found.append(Fact(f"{metric}, least", number(spreads[low]), low))
            found.append(Fact(f"{metric}, greatest", number(spreads[high]), high))
        return found

    def _section(self, metric: str, baseline: str | None) -> Section:
        structured = any(
            row.pattern in ("heads", "neurons", "channels", "layers") for row in self.rows
        )
        x: Literal["sparsity", "share"] = "share" if structured else "sparsity"
        measured = self.dense is not None and metric in self.dense
        ratios: Mapping[str, Spread] = {}
        used = baseline or ""
        for label in [baseline] if baseline is not None else self.labels if measured else []:
            try:
                ratios, used = self.ratio(metric, label), label
                break
            except ComparisonError:
                if baseline is not None:
                    raise
        return metric_section(
            metric,
            self._series(metric, x),
            {label: (s.mean, s.low, s.high) for label, s in self.spread(metric).items()},
            kinds={row.label: row.method for row in self.rows},
            dense=(self.dense or {}).get(metric),
            x_label=_X_LABELS[x],
            ratios={label: (s.mean, s.low, s.high) for label, s in ratios.items()},
            baseline=used,
        )

    def _series(self, metric: str, x: Literal["sparsity", "share"]) -> list[Series]:
        """Means and ranges of what is finite, by method and pattern."""
        spreads = {k: s for k, s in self.spread(metric).items() if math.isfinite(s.high - s.low)}
        series: dict[tuple[str, str], list[Point]] = {}
        for label, y in spreads.items():
            good = [row for row in self.rows if row.label == label and metric in row.metrics]
            where = spread_of(getattr(row, x) for row in good).mean
            method = " ".join(filter(None, (good[0].method, good[0].options)))
            points = series.setdefault((method, good[0].pattern), [])
            points.append(Point(where, y.mean, y.low, y.high))
        return [
            Series(method, pattern, re.fullmatch(r"\d+:\d+", pattern) is None, points)
            for (method, pattern), points in series.items()
        ]

    def _check(self, metric: str) -> None:
        if metric not in self.metrics:
            raise ComparisonError(
                f"there is no metric {metric!r}{did_you_mean(metric, self.metrics)}; "
                f"measured: {', '.join(map(repr, self.metrics)) or 'none'}"
            )

    def _values(self, label: str, metric: str) -> dict[str, float]:
        """By draw."""
        rows = (row for row in self.rows if row.label == label and metric in row.metrics)
        return {row.draw: row.metrics[metric] for row in rows}

    def _columns(self) -> list[Column]:
        return [
            Column("", fold=True),
            Column("method", spare=True),
            Column("pattern", spare=True),
            Column("sparsity", right=True),
            Column("of model", right=True, spare=True),
            *(Column(name, right=True) for name in self.metrics),
            Column("seconds", right=True),
            Column("MiB held", right=True, spare=True),
        ]

    def _cells(self) -> list[list[str]]:
        dense = self.dense or {}
        lines = [self._line(label) for label in self.labels]
        if self.dense is not None:
            figures = [f"{dense[m]:.4g}" if m in dense else "" for m in self.metrics]
            lines.insert(0, ["dense", "", "", "", "", *figures, "", ""])
        return lines

    def _line(self, label: str) -> list[str]:
        rows = [row for row in self.rows if row.label == label]
        good = [row for row in rows if row.error is None]
        values = [self._values(label, metric) for metric in self.metrics]
        return [
            label,
            rows[0].method,
            rows[0].pattern,
            mean_of((row.sparsity for row in good), ".2%"),
            mean_of((row.share for row in good), ".2%"),
            *(str(spread_of(v.values())) if v else "" for v in values),
            mean_of((row.seconds for row in good), ".1f"),
            f"{max(row.peak_held_bytes for row in good) / 2**20:.1f}" if good else "",
        ]

    def _notes(self, label: str) -> str:
        """The notes of all draws, and which of them failed of what."""
        rows = [row for row in self.rows if row.label == label]
        failed: dict[str, list[str]] = {}
        for row in rows:
            if row.error is not None:
                failed.setdefault(row.error, []).append(row.draw)
        errors = [
            f"failed: {error}" if len(on) == len(rows) else f"failed on {', '.join(on)}: {error}"
            for error, on in failed.items()
        ]
        return "; ".join(dict.fromkeys([*(n for row in rows for n in row.notes), *errors]))
