"""What was re-checked of a saved artifact: one check a law, as values, a table, JSON and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torchprune.checkpoint.whole_files import write_whole
from torchprune.errors import InputError
from torchprune.reports.page import save_page
from torchprune.reports.pieces import Fact, Grid, Page, Section
from torchprune.reports.tables import Column, by_rich, plain

State = Literal["holds", "broken", "not applicable"]

SHOWN = 20
"""Breaches of one law that are kept; the others are counted."""

_COLUMNS = [Column("law"), Column("verdict"), Column("what was checked", fold=True)]


@dataclass(frozen=True)
class Breach:
    """One place where a law is broken: the module or file, what was expected, what was got."""

    where: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class Check:
    """One law.

    Attributes:
        law: its name.
        said: what was checked, or why nothing could be.
        numbers: how much was, such as layers and weights.
        breaches: the first of them; `more` are not shown.
    """

    law: str
    state: State
    said: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    breaches: Sequence[Breach] = ()
    more: int = 0


class Breaches:
    """Breaches of one law as they are found; the first `SHOWN` are kept."""

    def __init__(self) -> None:
        self.kept: list[Breach] = []
        self.count = 0

    def add(self, where: str, expected: object, got: object) -> None:
        """Note a breach."""
        self.count += 1
        if len(self.kept) < SHOWN:
            self.kept.append(Breach(f"{where:.200}", f"{expected!s:.400}", f"{got!s:.600}"))

    def judge(self, law: str, said: str, **numbers: float) -> Check:
        """The check that they make up: broken if there is one."""
        state: State = "broken" if self.count else "holds"
        more = self.count - len(self.kept)
        return Check(law, state, said, numbers, tuple(self.kept), more)


def unchecked(law: str, why: str) -> Check:
    """A law that says nothing of this artifact, and why."""
    return Check(law, "not applicable", why)


def broken(law: str, where: str, expected: object, got: object) -> Check:
    """A law with one breach, beyond which nothing can be looked at."""
    found = Breaches()
    found.add(where, expected, got)
    return found.judge(law, "as far as it could be read")


@dataclass(frozen=True)
class Proof:
    """All laws of one artifact. Print it.

    Attributes:
        directory: what was read.
        kind: what it is, in words.
        weights, layers: of the pruned layers.
        seconds: that it took.
    """

    directory: str
    kind: str
    checks: Sequence[Check]
    weights: int
    layers: int
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether no law is broken, and some law was looked at."""
        return not self.broken and any(check.state == "holds" for check in self.checks)

    @property
    def broken(self) -> list[str]:
        """The names of broken laws."""
        return [check.law for check in self.checks if check.state == "broken"]

    @property
    def verdict(self) -> str:
        """The last line."""
        if self.broken:
            return f"broken: {', '.join(self.broken)} ({self.directory})"
        held = sum(check.state == "holds" for check in self.checks)
        if not held:
            return f"nothing proved: no law that was asked says anything of {self.directory}"
        laws = f"{held} law{'s' * (held != 1)}"
        return f"proved: {laws} over {self.weights:,} weights in {self.layers:,} layers"

    def __str__(self) -> str:
        rows = [(check.law, check.state, _said(check)) for check in self.checks]
        table = by_rich(_COLUMNS, rows) or plain(_COLUMNS, rows)
        return "\n".join([f"{self.directory}: {self.kind}", table.rstrip(), *self.wrongs(), ""]) + (
            self.verdict
        )

    def wrongs(self) -> list[str]:
        """A line for every breach that was kept."""
        lines = []
        for check in self.checks:
            lines += [f"{check.law}: {breach}" for breach in check.breaches]
            if check.more:
                lines.append(f"{check.law}: and {check.more:,} more")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts (JSON-ready)."""
        return {
            "directory": self.directory,
            "kind": self.kind,
            "holds": self.holds,
            "verdict": self.verdict,
            "weights": self.weights,
            "layers": self.layers,
            "seconds": round(self.seconds, 3),
            "checks": [{**asdict(check), "numbers": dict(check.numbers)} for check in self.checks],
        }

    def page(self) -> Page:
        """The proof as a page."""
        rows = [(check.law, check.state, _said(check)) for check in self.checks]
        sections = [Section("Laws", [Grid("Laws", _COLUMNS, rows)])]
        wrong = [
            (check.law, breach.where, breach.expected, breach.got)
            for check in self.checks
            for breach in check.breaches
        ]
        if wrong:
            heads = [Column("law"), *(Column(c, fold=True) for c in ("where", "expected", "got"))]
            sections.append(Section("What is broken", [Grid("Breaches", heads, wrong)]))
        held = sum(check.state == "holds" for check in self.checks)
        asked = sum(check.state != "not applicable" for check in self.checks)
        return Page(
            title=f"Proof of {Path(self.directory).name}",
            lead=f"{self.verdict[0].upper()}{self.verdict[1:]}.",
            sections=sections,
            facts=[
                Fact("laws", f"{held} of {asked}", "hold"),
                Fact("weights", f"{self.weights:,}", f"in {self.layers:,} pruned layers"),
            ],
            warnings=self.wrongs(),
            command=f"torchprune verify {self.directory}",
            data=self.to_dict(),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the proof as `.html` or `.json`, whole or not at all.

        Raises:
            InputError: another ending.
        """
        kind = Path(path).suffix.lower()
        if kind == ".html":
            save_page(self.page(), path)
        elif kind == ".json":
            write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")
        else:
            raise InputError(f"{path}: a proof is written as .html or .json, got {kind!r}")


def _said(check: Check) -> str:
    found = _numbers(check.numbers)
    return f"{check.said} ({found})" if found else check.said


def _numbers(numbers: Mapping[str, float]) -> str:
    shown = (
        f"{value:,}" if isinstance(value, int) else f"{value:.3g}" for value in numbers.values()
    )
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in zip(numbers, shown, strict=True)
    )
