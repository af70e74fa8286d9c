"""A metric's scores example by example, and the line of a table that they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torchprune.study.tasks.evaluation import EvaluationError
from torchprune.study.tasks.paired import Link, PairedTest, is_binary, stderr_of, value_of
from torchprune.study.tasks.verdicts import verdict


@dataclass(frozen=True)
class Scores:
    """One metric of one task, example by example.

    Attributes:
        totals, weights: of each example; the metric is of the sum of totals over that of weights:
            that share itself ("mean"), its exponential ("exp"), or it over ln 2 ("bits").
        ids: what tells the examples apart, with a digest of each; both models' are matched by it.
        figure: the metric, where it cannot be had from numbers by example; these are then empty.
        higher_is_better: None where nobody knows.
        task_id: a digest of what was asked: a result is only taken up for the same.
    """

    task: str
    metric: str
    totals: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    ids: tuple[str, ...] = ()
    link: Link = "mean"
    figure: float | None = None
    higher_is_better: bool | None = None
    task_id: str = ""

    @property
    def value(self) -> float:
        return value_of(self.totals, self.weights, self.link) if self.totals else self.figure or 0.0

    @property
    def stderr(self) -> float:
        """Over examples; NaN without them."""
        return stderr_of(self.totals, self.weights, self.link) if self.totals else math.nan

    @property
    def binary(self) -> bool:
        """Whether every example is right or wrong."""
        return bool(self.totals) and self.link == "mean" and is_binary(self.totals)


@dataclass(frozen=True)
class ScoreRow:
    """A metric of a task, and what became of it beside the dense model.

    Attributes:
        stderr: of the value over examples; NaN where there are none.
        n: examples.
        binary: whether all scores are right or wrong, and the metric a share.
        dense, difference: the dense model's value, and the value less it; None without one.
        low, high: the interval of confidence of the difference.
        p, adjusted: of no difference, by itself and corrected for all rows (Holm).
        shows: the smallest difference that these examples would show.
        verdict: all of it in words.
    """

    task: str
    metric: str
    value: float
    stderr: float
    n: int
    binary: bool
    dense: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted: float | None = None
    shows: float | None = None
    verdict: str = ""


def on_examples_of(own: Scores, dense: Scores) -> Scores:
    """The dense model's scores of a model's own examples, in their order.

    Raises:
        EvaluationError: some are missing, were other texts, or weigh otherwise.
    """
    where = f"{own.task} {own.metric}"
    if own.link != dense.link or bool(own.totals) != bool(dense.totals):
        raise EvaluationError(f"{where}: the two results are not of the same kind")
    known = {name: i for i, name in enumerate(dense.ids)}
    missing = sum(name not in known for name in own.ids)
    if missing:
        raise EvaluationError(
            f"{where}: {missing} of the {len(own.ids)} examples are not among the "
            f"{len(dense.ids)} of the dense result; evaluate it with the same task files and limit"
        )
    places = [known[name] for name in own.ids]
    weights = tuple(dense.weights[i] for i in places)
    if weights != own.weights:
        raise EvaluationError(f"{where}: the examples weigh otherwise in the dense result")
    return Scores(
        **{
            **vars(dense),
            "totals": tuple(dense.totals[i] for i in places),
            "weights": weights,
            "ids": own.ids,
        }
    )


def row_of(
    own: Scores, dense: Scores | None, tested: tuple[PairedTest, float] | None, level: float
) -> ScoreRow:
    """A score beside the dense model's, with its test and the corrected p where it was tested."""
    binary = own.binary and (dense is None or dense.binary)
    common: dict[str, Any] = {
        "task": own.task,
        "metric": own.metric,
        "value": own.value,
        "stderr": own.stderr,
        "n": len(own.totals),
        "binary": binary,
    }
    if dense is None or tested is None:
        why = "" if dense is None else "not tested: no score of each example"
        other = None if dense is None else dense.value
        gap = None if other is None else own.value - other
        return ScoreRow(**common, dense=other, difference=gap, verdict=why)
    test, adjusted = tested
    return ScoreRow(
        **common,
        dense=dense.value,
        difference=test.difference,
        low=test.low,
        high=test.high,
        p=test.p,
        adjusted=adjusted,
        shows=test.shows,
        verdict=verdict(
            test,
            adjusted,
            n=len(own.totals),
            changed=sum(a != b for a, b in zip(own.totals, dense.totals, strict=True)),
            level=level,
            binary=binary,
            higher_is_better=own.higher_is_better,
        ),
    )
