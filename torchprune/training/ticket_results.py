"""What a search for tickets found: trials by seed, round and arm, with intervals and a verdict."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from torchprune.checkpoint.whole_files import write_whole
from torchprune.masking.mask import masks as masks_of
from torchprune.reports.tables import Cells, Column, markdown, plain
from torchprune.training.metric_curves import Curve, check_suffix, draw_curves
from torchprune.training.run_records import (
    RunError,
    document,
    item,
    metrics_data,
    number_data,
    read_row,
    typed,
)
from torchprune.training.student_intervals import Interval, interval_of
from torchprune.training.ticket_states import TicketStates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "torchprune tickets 1"
RESULTS = "tickets.json"
_WHAT = "search for tickets"

DENSE, TICKET, REINIT, RANDOM = "dense", "ticket", "reinit", "random"
ARMS = {
    TICKET: "ticket",
    REINIT: "same masks, new weights",
    RANDOM: "random masks, same weights",
}


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        seed: the draw it belongs to.
        round: 0 is the dense model, the last the sparsest.
        arm: "dense", "ticket", "reinit" or "random".
        asked: the round's level.
        sparsity: zeros of all weights in the layers with masks, counted after training.
        metrics: what `evaluate` gave, by name.
        training, evaluating: wall seconds, informative.
    """

    seed: int
    round: int
    arm: str
    asked: str
    sparsity: float
    metrics: Mapping[str, float]
    training: float
    evaluating: float


@dataclass(frozen=True)
class Round:
    """One level over all seeds.

    Attributes:
        number: from 1, the densest.
        asked: the level.
        sparsity: the ticket's, mean over the seeds.
        arms: the metric of "ticket" and each baseline, with its interval.
        leads: how much better the ticket is than "dense" and each baseline, with the interval of
            the paired differences; positive is better, whichever way the metric is good.
        verdict: in words; "wins" where the ticket is not below the dense model within the interval,
            and above every baseline by more than the interval.
    """

    number: int
    asked: str
    sparsity: float
    arms: Mapping[str, Interval]
    leads: Mapping[str, Interval]
    verdict: str

    @property
    def left(self) -> float:
        """The share of weights that is left."""
        return 1 - self.sparsity

    @property
    def wins(self) -> bool:
        """Whether the verdict is that it does."""
        return self.verdict == "wins"


@dataclass(frozen=True)
class Tickets:
    """Trials in the order in which they ran, and what follows from them.

    `print(tickets)` shows a line for each round: means and intervals over the seeds, the paired
    differences, the verdict.

    Attributes:
        trials: every training.
        metric: the name of the metric that judges.
        higher_is_better: which way it is good.
        confidence: of the intervals.
        rewound_to: the step whose weights a ticket begins with; 0 is before the first.
        home: the directory with rewound weights and masks, or None where only results are known.
    """

    trials: Sequence[Trial]
    metric: str
    higher_is_better: bool = True
    confidence: float = 0.95
    rewound_to: int = 0
    home: Path | None = field(default=None, compare=False, repr=False)
    _dress: Callable[[int, int], nn.Module] | None = field(default=None, compare=False, repr=False)

    @property
    def seeds(self) -> list[int]:
        """The draws, in order."""
        return list(dict.fromkeys(trial.seed for trial in self.trials))

    @property
    def baselines(self) -> list[str]:
        """What tickets are held against beside the dense model."""
        return [arm for arm in (REINIT, RANDOM) if any(t.arm == arm for t in self.trials)]

    @property
    def dense(self) -> Interval:
        """The dense model's metric."""
        return self._interval(self._values(0, DENSE).values())

    @property
    def rounds(self) -> list[Round]:
        """Every level, the densest first."""
        numbers = sorted({t.round for t in self.trials if t.arm == TICKET})
        return [self._round(number) for number in numbers]

    @property
    def winner(self) -> Round | None:
        """The sparsest round whose ticket wins, or None."""
        return next((one for one in reversed(self.rounds) if one.wins), None)

    def model(self, seed: int | None = None, round: int | None = None) -> nn.Module:
        """A ticket as it is before its training: masked, with the rewound weights and buffers.

        Args:
            seed: default the first.
            round: default the sparsest that wins, or the last where none does.

        Raises:
            RunError: there is no such ticket, or it was not kept: these are results alone, or
                `load` was given no `make_model`.
        """
        seed = self.seeds[0] if seed is None else seed
        if round is None:
            round = (self.winner or self.rounds[-1]).number
        if not any((t.seed, t.round, t.arm) == (seed, round, TICKET) for t in self.trials):
            raise RunError(
                f"there is no ticket of seed {seed} and round {round}; seeds are {self.seeds}, "
                f"rounds 1 to {self.rounds[-1].number}"
            )
        if self._dress is None:
            raise RunError(
                "these are results alone: Tickets.load(directory, make_model), with the directory "
                "that was find_ticket's path, gives models too"
            )
        return self._dress(seed, round)

    def masks(self, seed: int | None = None, round: int | None = None) -> dict[str, Tensor]:
        """A ticket's masks, as `torchprune.masks` gives them; for what `model` takes."""
        return masks_of(self.model(seed, round))

    # -- what follows --------------------------------------------------------------------------

    def _values(self, round: int, arm: str) -> dict[int, float]:
        """The metric by seed."""
        return {
            t.seed: t.metrics[self.metric] for t in self.trials if (t.round, t.arm) == (round, arm)
        }

    def _interval(self, draws: Iterable[float]) -> Interval:
        return interval_of(list(draws), self.confidence)

    def _round(self, number: int) -> Round:
        own = [t for t in self.trials if (t.round, t.arm) == (number, TICKET)]
        arms = {arm: self._values(number, arm) for arm in (TICKET, *self.baselines)}
        sign, ticket = (1 if self.higher_is_better else -1), arms[TICKET]
        others = {DENSE: self._values(0, DENSE), **arms}
        leads = {
            arm: self._interval([sign * (ticket[s] - y) for s, y in values.items() if s in ticket])
            for arm, values in others.items()
            if arm != TICKET
        }
        return Round(
            number,
            own[0].asked,
            math.fsum(t.sparsity for t in own) / len(own),
            {arm: self._interval(values.values()) for arm, values in arms.items() if values},
            leads,
            _verdict(leads),
        )

    # -- showing -------------------------------------------------------------------------------

    def __str__(self) -> str:
        return f"{plain(self._columns(), self._lines())}\n{self._note()}"  # too wide for rich

    def to_markdown(self) -> str:
        """The table as GitHub's Markdown."""
        return markdown(self._columns(), self._lines())

    def _note(self) -> str:
        which = "initial weights" if self.rewound_to == 0 else f"weights of step {self.rewound_to}"
        return (
            f"{self.metric}, {'higher' if self.higher_is_better else 'lower'} is better, over "
            f"{len(self.seeds)} seeds, rewound to {which}; ± half of the "
            f"{100 * self.confidence:g} % interval. Leads are paired by seed, above 0 where the "
            "ticket is better."
        )

    def _columns(self) -> list[Column]:
        arms = (TICKET, *self.baselines)
        heads = ["left", *arms, *(f"lead on {arm}" for arm in (DENSE, *self.baselines))]
        return [Column("level"), *(Column(head, right=True) for head in heads), Column("verdict")]

    def _lines(self) -> list[Cells]:
        rest = [""] * (2 * len(self.baselines) + 2)
        lines: list[Cells] = [[DENSE, "100 %", str(self.dense), *rest]]
        for one in self.rounds:
            arms = [str(one.arms[arm]) for arm in (TICKET, *self.baselines)]
            leads = [one.leads[arm].text("+") for arm in (DENSE, *self.baselines)]
            lines.append([one.asked, f"{100 * one.left:.3g} %", *arms, *leads, one.verdict])
        return lines

    def figure(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The metric against the share of weights left, a band for each arm's interval.

        Args:
            path: where to save it, as .png, .svg or .pdf.

        Returns:
            a `matplotlib.figure.Figure`.

        Raises:
            RunError: there is nothing to draw, or another suffix.
            MissingExtraError: the extra "figure" is absent.
        """
        check_suffix(path)
        rounds, curves = self.rounds, list[Curve]()
        for arm in (TICKET, *self.baselines):
            found = [one.arms[arm] for one in rounds]
            places = [(one.left, y.mean) for one, y in zip(rounds, found, strict=True)]
            low, high = [y.low for y in found], [y.high for y in found]
            curves.append(Curve(ARMS[arm], places, low, high))
        return draw_curves(
            curves,
            x_label="weights left in the pruned layers",
            y_label=self.metric,
            dense=self.dense.mean,
            falling=True,
            purpose="Tickets.figure",
            path=path,
        )

    # -- files ---------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Every trial, as `from_json` reads it; inf and nan as strings."""
        record = {
            "format": FORMAT,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "confidence": self.confidence,
            "rewound_to": self.rewound_to,
            "trials": [trial_data(trial) for trial in self.trials],
        }
        return json.dumps(record, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Tickets:
        """The results that `to_json` wrote; without models.

        Raises:
            RunError: they are damaged, or something else.
        """
        found = document(text, FORMAT, _WHAT)
        metric, rows = item(found, "metric", str, _WHAT), item(found, "trials", list, _WHAT)
        trials = tuple(read_row(Trial, row, _WHAT) for row in rows)
        confidence = item(found, "confidence", float, _WHAT)
        _check(trials, metric, confidence)
        return cls(
            trials,
            metric,
            item(found, "higher_is_better", bool, _WHAT),
            confidence,
            typed(found.get("rewound_to"), "rewound_to", int, _WHAT),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON, whole or not at all."""
        write_whole(path, self.to_json() + "\n")

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        make_model: Callable[[], nn.Module] | None = None,
    ) -> Tickets:
        """Results from a file of `save`, or from the directory that was `find_ticket`'s path.

        Args:
            make_model: as `find_ticket` took it; with a directory, `model` and `masks` then work.

        Raises:
            RunError: they are damaged, or something else.
            OSError: they cannot be read.
        """
        home = Path(path) if Path(path).is_dir() else None
        file = Path(path) if home is None else home / RESULTS
        try:
            found = cls.from_json(file.read_text("utf-8"))
        except (RunError, UnicodeDecodeError) as error:
            raise RunError(f"{file}: {error}") from None
        if home is None or make_model is None:
            return found
        return found.with_states(TicketStates(home, make_model))

    def with_states(self, states: TicketStates) -> Tickets:
        """The same results, with what models are made from."""
        return Tickets(
            self.trials,
            self.metric,
            self.higher_is_better,
            self.confidence,
            self.rewound_to,
            states.home,
            states.ticket,
        )


def trial_data(trial: Trial) -> dict[str, object]:
    """A trial as JSON knows it."""
    told = {k: number_data(v) if type(v) is float else v for k, v in asdict(trial).items()}
    return {**told, "metrics": metrics_data(trial.metrics)}


def _check(trials: Sequence[Trial], metric: str, confidence: float) -> None:
    if not 0 < confidence < 1:
        raise RunError(f"a damaged {_WHAT}: confidence must be between 0 and 1, got {confidence}")
    seen: set[tuple[int, int, str]] = set()
    for trial in trials:
        place = (trial.seed, trial.round, trial.arm)
        if trial.arm not in (DENSE, *ARMS) or (trial.round == 0) != (trial.arm == DENSE):
            raise RunError(f"a damaged {_WHAT}: round {trial.round} has an arm {trial.arm!r:.80}")
        if place in seen:
            raise RunError(f"a damaged {_WHAT}: two trials are {place}")
        if metric not in trial.metrics:
            raise RunError(f"a damaged {_WHAT}: a trial has no metric {metric!r:.80}")
        seen.add(place)
    if not {DENSE, TICKET} <= {trial.arm for trial in trials}:
        raise RunError(f"a damaged {_WHAT}: it has no dense model, or no ticket")


def _verdict(leads: Mapping[str, Interval]) -> str:
    """What the intervals of the differences say.

    A single draw says nothing, and neither does NaN.
    """
    if not all(math.isfinite(lead.half) for lead in leads.values()):
        return "one seed tells nothing" if leads[DENSE].half == math.inf else "not finite"
    above = [arm for arm, lead in leads.items() if arm != DENSE and lead.low > 0]
    others = [arm for arm in leads if arm not in (DENSE, *above)]
    matches = leads[DENSE].high >= 0
    if matches and not others:
        return "wins"
    words = ["as good as dense" if matches else "below dense"]
    if above:
        words.append(f"above {' and '.join(above)}")
    if others:
        words.append(f"not above {' or '.join(others)}")
    return ", ".join(words)
