"""How well models predict one text, window by window, with the error of the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from torchprune.reports.pieces import Bar, Bars, Fact, Page, Prose, Section
from torchprune.reports.wording import number
from torchprune.study.tasks.evaluation import perplexity

NORMAL = 1.96
"""Standard errors on each side of a mean that hold the true one 19 times of 20."""


@dataclass(frozen=True)
class Mean:
    """A mean over windows, and the ends of its 95 % interval; they are the mean of one window."""

    value: float
    low: float
    high: float


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of at least one value, with the interval that its standard error gives.

    >>> mean_of([2.0]), round(mean_of([1.0, 2.0, 3.0]).high, 3)
    (Mean(value=2.0, low=2.0, high=2.0), 3.132)
    """
    mean = fmean(values)
    reach = NORMAL * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Mean(mean, mean - reach, mean + reach)


def window_losses(
    model: nn.Module,
    ids: Tensor,
    *,
    seqlen: int,
    windows: int | None = None,
    progress: bool = False,
) -> list[float]:
    """The nats per token of each of the text's first windows, as `perplexity` reads them.

    Args:
        ids: (n,) the text's tokens.
        windows: read at most so many; None for all.

    Raises:
        EvaluationError: as `perplexity` does.
    """
    whole = len(ids) // seqlen
    count = max(1, whole if windows is None else min(windows, whole))
    starts = tqdm(range(count), desc="perplexity", unit="window", disable=not progress)
    return [
        perplexity(model, ids[i * seqlen : (i + 1) * seqlen], seqlen=seqlen).nats_per_token
        for i in starts
    ]


def quality_page(losses: Mapping[str, Sequence[float]], *, seqlen: int, text: str) -> Page:
    """The perplexity of each model with its interval, and what the last has lost to the first.

    Args:
        losses: model's name -> the nats per token of the same windows; the dense model first.
        text: what the text is called.
    """
    means = {name: mean_of(values) for name, values in losses.items()}
    count = len(next(iter(losses.values())))
    bars = [Bar(n, _exp(m.value), _exp(m.low), _exp(m.high)) for n, m in means.items()]
    ends = [f"{number(bar.low)} to {number(bar.high)}" for bar in bars]
    pieces: list[Bars | Prose] = [Bars("Perplexity", "perplexity", bars, note="Less is better.")]
    data: dict[str, Any] = {
        "text": text,
        "seqlen": seqlen,
        "windows": count,
        "nats_per_token": {name: list(values) for name, values in losses.items()},
        "perplexity": {b.name: {"value": b.value, "low": b.low, "high": b.high} for b in bars},
    }
    if len(losses) > 1:
        (first, before), *_, (last, after) = losses.items()
        lost = mean_of([b - a for a, b in zip(before, after, strict=True)])
        pieces.append(Prose(_told(lost, first, last)))
        data["lost"] = {"value": lost.value, "low": lost.low, "high": lost.high}
    return Page(
        "Perplexity",
        f"How well the models predict {text}: {count} windows of {seqlen:,} tokens. Intervals are "
        "of the mean over windows, 19 times of 20.",
        [Section("Perplexity of both" if len(losses) > 1 else "Perplexity of the text", pieces)],
        facts=[
            Fact(f"perplexity, {bar.name}", number(bar.value), end)
            for bar, end in zip(bars, ends, strict=True)
        ],
        data=data,
    )


def _told(lost: Mean, first: str, last: str) -> str:
    sure = lost.low > 0 or lost.high < 0
    return (
        f"On the same windows {last} needs {lost.value:.4f} nats per token more than {first} "
        f"(95 % interval {lost.low:.4f} to {lost.high:.4f})"
        + ("." if sure else ": as far as this text can tell, no difference.")
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
