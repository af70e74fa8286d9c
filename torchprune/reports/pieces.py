"""What a page shows, as plain values: results build these, and `page` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchprune.reports.tables import Cells, Column


@dataclass(frozen=True)
class Fact:
    """One figure of the headline: "zeros", "50.0 %", "of 106,168,320 weights"."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Prose:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Grid:
    """A table; `raw` are the cells as numbers to sort by, where they are numbers."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Cells]
    raw: Sequence[Sequence[float | str | None]] = ()


@dataclass(frozen=True)
class Bar:
    """One bar: its value, the ends of its error bar where it has one, and a kind to filter by."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars that a reader can sort and filter; `unit` is said at the axis."""

    title: str
    unit: str
    bars: Sequence[Bar]
    note: str = ""


@dataclass(frozen=True)
class Heat:
    """A heat map; None is a hole. `logarithmic` colours by orders of magnitude."""

    title: str
    unit: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    logarithmic: bool = False
    note: str = ""


@dataclass(frozen=True)
class Spot:
    """A place on a line, with the ends of its error bar where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """A named line; `joined` false leaves its spots alone."""

    name: str
    spots: Sequence[Spot]
    joined: bool = True


@dataclass(frozen=True)
class Lines:
    """Lines over a common axis, such as quality against sparsity; `level` is a dashed line."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    level: float | None = None
    level_name: str = "dense"
    logarithmic: bool = False
    percent: bool = False
    note: str = ""


@dataclass(frozen=True)
class Code:
    """Text to copy: a command, a TOML file, overrides in Python."""

    title: str
    text: str
    language: str = ""


@dataclass(frozen=True)
class Pair:
    """What two models wrote for one prompt."""

    prompt: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class Pairs:
    """Generations side by side."""

    title: str
    pairs: Sequence[Pair]


Piece = Prose | Grid | Bars | Heat | Lines | Code | Pairs


@dataclass(frozen=True)
class Section:
    """A heading, one sentence of what is to be seen, and the pieces."""

    title: str
    pieces: Sequence[Piece]
    summary: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        lead: one or two sentences that a manager understands.
        warnings: shown first.
        command: how to do it again, "" where nobody knows.
        data: all of it, ready for JSON, embedded in the page.
        parts: pages shown below this one's sections, as `page.joined` puts them.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    facts: Sequence[Fact] = ()
    warnings: Sequence[str] = ()
    command: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[Page] = ()
