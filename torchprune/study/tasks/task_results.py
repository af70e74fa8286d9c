"""What `evaluate` found: scores by task, beside the dense model's on the same examples."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torchprune.checkpoint.whole_files import write_whole
from torchprune.errors import did_you_mean
from torchprune.reports.page import save_page
from torchprune.reports.pieces import Page
from torchprune.reports.result_text import result_of
from torchprune.reports.tables import Column, by_rich, markdown, plain
from torchprune.study.tasks.evaluation import EvaluationError
from torchprune.study.tasks.paired import Link, PairedTest, holm, paired_test
from torchprune.study.tasks.score_rows import ScoreRow, Scores, on_examples_of, row_of
from torchprune.study.tasks.task_page import figure_of, page_of
from torchprune.study.tasks.verdicts import in_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "torchprune evaluation 1"


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model, beside the dense model's where it was given.

    `print(evaluation)` shows a table, `rows` are its lines.

    Attributes:
        scores, dense_scores: by task and metric, every example's; the latter None without a dense
            model.
        settings: what was asked: limit, num_fewshot, chat, seed, models' digests, versions.
        level: differences with a corrected p below it count; intervals hold 1 - level.
        command: how to do it again, "" where nobody knows.
    """

    scores: Sequence[Scores]
    dense_scores: Sequence[Scores] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    level: float = 0.05
    command: str = ""

    @cached_property
    def rows(self) -> list[ScoreRow]:
        """One for each score; p values are corrected for all of them."""
        dense = [self._dense_of(s) for s in self.scores]
        pairs = list(zip(self.scores, dense, strict=True))
        testable = [(s, d) for s, d in pairs if d is not None and s.totals and d.totals]
        found = [self._test(s, d, len(testable)) for s, d in testable]
        adjusted = iter(zip(found, holm([test.p for test in found]), strict=True))
        rows = []
        for s, d in pairs:
            tested = next(adjusted) if d is not None and s.totals and d.totals else None
            rows.append(row_of(s, d, tested, self.level))
        return rows

    def score(self, task: str, metric: str | None = None) -> float:
        """A task's value; of its first metric unless one is named.

        Raises:
            EvaluationError: there is none.
        """
        found = [s for s in self.scores if s.task == task and metric in (None, s.metric)]
        if not found:
            wanted = task if metric is None else f"{task} {metric}"
            known = [s.task if metric is None else f"{s.task} {s.metric}" for s in self.scores]
            raise EvaluationError(f"there is no {wanted!r}{did_you_mean(wanted, known)}")
        return found[0].value

    def __str__(self) -> str:
        columns, rows = self.columns(), self.cells()
        table = by_rich(columns, rows) or plain(columns, rows)
        return "\n".join([table.rstrip(), *self.notes()])

    def to_markdown(self) -> str:
        """The table as GitHub's Markdown."""
        return markdown(self.columns(), self.cells())

    def columns(self) -> list[Column]:
        """The table's."""
        head = [Column("task"), Column("metric"), Column("n", right=True)]
        if self.dense_scores is None:
            return [*head, Column("value", right=True)]
        figures = ("dense", "pruned", "difference", "p", "p (Holm)")
        return [*head, *(Column(name, right=True) for name in figures), Column("", fold=True)]

    def cells(self) -> list[list[str]]:
        """The table's lines."""
        return [self._line(row) for row in self.rows]

    def notes(self) -> list[str]:
        """What the figures mean."""
        if self.dense_scores is None:
            return ["± is one standard error over the examples"]
        tests = sum(row.p is not None for row in self.rows)
        share = f"{1 - self.level:.0%}"
        lines = [f"± is one standard error over the examples, the interval holds {share}"]
        if tests > 1:
            lines.append(
                f"{tests} tests were made together: p (Holm) and the verdicts are corrected for it"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts; inf and nan as strings."""
        record = {
            "format": FORMAT,
            "level": self.level,
            "command": self.command,
            "settings": dict(self.settings),
            "rows": [asdict(row) for row in self.rows],
            "scores": [asdict(s) for s in self.scores],
            "dense_scores": None
            if self.dense_scores is None
            else [asdict(s) for s in self.dense_scores],
        }
        return dict(_plain(record))

    def to_json(self) -> str:
        """Everything, as `from_json` reads it."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The evaluation that `to_json` wrote.

        Raises:
            EvaluationError: it is damaged, or something else.
        """
        found = result_of(text, FORMAT, "evaluation", EvaluationError)
        try:
            dense = found["dense_scores"]
            return cls(
                tuple(map(_read_scores, _as(list, found["scores"]))),
                None if dense is None else tuple(map(_read_scores, _as(list, dense))),
                _as(dict, found["settings"]),
                _number(found["level"]),
                _as(str, found["command"]),
            )
        except KeyError as error:
            raise EvaluationError(f"a damaged evaluation: {error} is absent") from None
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"a damaged evaluation: {error}") from None

    def page(self) -> Page:
        """What a page shows of it."""
        return page_of(self)

    def figure(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Every row's difference from the dense model with its interval, in its half widths.

        Raises:
            EvaluationError: there is nothing to draw.
            MissingExtraError: the extra "figure" is absent.
        """
        return figure_of(self, path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it whole: `.html` a page, `.json` all of it, `.md` the table, `.png`, `.svg` or
        `.pdf` the figure.

        Raises:
            EvaluationError: another suffix.
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".html":
            save_page(self.page(), path)
        elif suffix == ".json":
            write_whole(path, self.to_json() + "\n")
        elif suffix == ".md":
            write_whole(path, self.to_markdown() + "\n")
        elif suffix in (".png", ".svg", ".pdf"):
            self.figure(path)
        else:
            raise EvaluationError(
                f"{path}: an evaluation is saved as .html, .json, .md, .png, .svg or .pdf"
            )

    def _dense_of(self, own: Scores) -> Scores | None:
        if self.dense_scores is None:
            return None
        alike = [d for d in self.dense_scores if (d.task, d.metric) == (own.task, own.metric)]
        return on_examples_of(own, alike[0]) if alike else None

    def _test(self, own: Scores, dense: Scores, tests: int) -> PairedTest:
        seed = int(self.settings.get("seed", 0))
        return paired_test(
            own.totals,
            dense.totals,
            own.weights,
            own.link,
            level=self.level,
            tests=tests,
            seed=seed,
        )

    def _line(self, row: ScoreRow) -> list[str]:
        head = [row.task, row.metric, f"{row.n:,}" if row.n else ""]
        value = in_unit(row.value, row.stderr, row.binary)
        if self.dense_scores is None:
            return [*head, value]
        dense = "" if row.dense is None else in_unit(row.dense, math.nan, row.binary)
        if row.p is None or row.adjusted is None:
            return [*head, dense, value, "", "", "", row.verdict]
        difference = in_unit(row.difference or 0.0, math.nan, row.binary, sign="+")
        return [*head, dense, value, difference, f"{row.p:.2g}", f"{row.adjusted:.2g}", row.verdict]


# -- JSON ------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _read_scores(found: Any) -> Scores:
    item = _as(dict, found)
    link = _as(str, item["link"])
    if link not in get_args(Link):
        raise ValueError(f"the link {link!r} is none of {', '.join(get_args(Link))}")
    totals, weights = (tuple(map(_number, _as(list, item[k]))) for k in ("totals", "weights"))
    ids = tuple(_as(str, name) for name in _as(list, item["ids"]))
    if not len(totals) == len(weights) == len(ids):
        raise ValueError(f"{len(totals)} totals, {len(weights)} weights and {len(ids)} ids")
    better = item["higher_is_better"]
    return Scores(
        _as(str, item["task"]),
        _as(str, item["metric"]),
        totals,
        weights,
        ids,
        link,
        None if item["figure"] is None else _number(item["figure"]),
        None if better is None else _as(bool, better),
        _as(str, item["task_id"]),
    )


def _number(value: Any) -> float:
    if value in ("inf", "-inf", "nan"):
        return float(value)
    return float(value if type(value) is int else _as(float, value))


def _as(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r:.60}")
    return value
