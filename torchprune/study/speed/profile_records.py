"""What a profile holds: contenders, their cells, and what was counted and timed beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torchprune.errors import TorchpruneError
from torchprune.reports.tables import Cells, Column
from torchprune.study.speed.spreads import Latency, Ratio

FORMAT = "torchprune profile 1"


class ProfileError(TorchpruneError, ValueError):
    """A model cannot be profiled, or a profile cannot be read, or holds not what is asked of it."""


@dataclass(frozen=True)
class Contender:
    """One model in one form.

    Attributes:
        name: "dense" and "dense FORM" are the model compared against.
        form: its form's name; `what` it is in words.
        skips_zeros: whether its products leave zeros out.
        held: bytes of all its weights, and masks; None where it was not made.
        read: of these, what a call reads whole (tables of embeddings are not); None where nobody
            can see into it.
        prepare_seconds: to make it, with compiling on the first call of each size.
        note: what else is to be said; `missing`: why it was not made, or "".
    """

    name: str
    form: str
    what: str
    skips_zeros: bool = False
    held: int | None = None
    read: int | None = None
    prepare_seconds: float | None = None
    note: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Cell:
    """One contender at one number of rows.

    Attributes:
        latency: None where it does not run, which `missing` explains.
        ratio: its time over that of the profile's base; None for the base.
        peak: bytes that one call holds at most beyond weights and inputs; None where not seen.
    """

    contender: str
    rows: int
    latency: Latency | None = None
    ratio: Ratio | None = None
    peak: int | None = None
    missing: str = ""

    @property
    def throughput(self) -> float | None:
        """Rows a second."""
        return None if self.latency is None else self.rows / self.latency.median


@dataclass(frozen=True)
class FlopCount:
    """Floating point operations of a call with so many rows, and those that are by zeros."""

    rows: int
    total: int
    by_zeros: int


@dataclass(frozen=True)
class LayerTime:
    """One layer in one contender: seconds in a call of the model with so many rows."""

    layer: str
    kind: str
    contender: str
    rows: int
    latency: Latency
    flops: int


@dataclass(frozen=True)
class Inside:
    """How much of the base's time is in its linear layers and convolutions, 0 to 1."""

    rows: int
    share: float


@dataclass(frozen=True)
class Prospect:
    """What a kernel measured here would make of the model: its time over the base's.

    Attributes:
        kernel: such as "bitmask 70 %".
        layers: how many layers it would compute; all else stays as measured.
        bytes: of the kernel's weights over the dense ones.
    """

    rows: int
    kernel: str
    ratio: Ratio
    layers: int
    bytes: float


@dataclass(frozen=True)
class Verdict:
    """A sentence that follows from the numbers.

    Attributes:
        kind: "faster", "slower", "same" or "unclear" of a contender; "zeros", "bound", "memory",
            "prospect" or "nothing" of the model.
        contender: "" where it is of none; rows: 0 where of all.
    """

    kind: str
    text: str
    contender: str = ""
    rows: int = 0


@dataclass(frozen=True)
class Measured:
    """What was measured, and what it says.

    Attributes:
        model: its class; parameters, zeros: of the model given, masks applied.
        unit: what a row is, "token" or "row".
        base: the contender to whose time ratios are.
        machine: processor, threads, versions, date and others, as text.
        peak_how: how peak memory was measured.
    """

    model: str
    unit: str
    base: str
    parameters: int
    zeros: int
    contenders: tuple[Contender, ...]
    cells: tuple[Cell, ...]
    flops: tuple[FlopCount, ...] = ()
    inside: tuple[Inside, ...] = ()
    layers: tuple[LayerTime, ...] = ()
    prospects: tuple[Prospect, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    peak_how: str = ""

    @property
    def rows(self) -> list[int]:
        """The numbers of rows that were asked for."""
        return sorted({cell.rows for cell in self.cells})

    def cell(self, contender: str, rows: int) -> Cell:
        """One cell.

        Raises:
            ProfileError: there is none.
        """
        for cell in self.cells:
            if (cell.contender, cell.rows) == (contender, rows):
                return cell
        names = ", ".join(repr(c.name) for c in self.contenders)
        raise ProfileError(
            f"there is no cell of {contender!r} at {rows} rows; contenders are {names}, rows "
            f"{', '.join(map(str, self.rows))}"
        )

    def contender(self, name: str) -> Contender:
        """One contender.

        Raises:
            ProfileError: there is none of that name.
        """
        for one in self.contenders:
            if one.name == name:
                return one
        raise ProfileError(
            f"there is no contender {name!r}; there are "
            + ", ".join(repr(c.name) for c in self.contenders)
        )

    # -- as text -----------------------------------------------------------------------------------

    @property
    def lines(self) -> list[Cell]:
        """The cells of the table: all but those of contenders that are missing, which have one."""
        absent = {one.name for one in self.contenders if one.missing}
        once = {c.contender: c for c in reversed(self.cells) if c.contender in absent}
        return [c for c in self.cells if c.contender not in absent] + [*reversed(once.values())]

    def table(self) -> tuple[list[Column], list[Cells]]:
        """Columns, and a line for each contender and number of rows."""
        columns = [
            Column("form", fold=True),
            Column(f"{self.unit}s", right=True),
            *(Column(head, right=True) for head in ("ms", "10 to 90 %", f"times {self.base}")),
            Column(f"{self.unit}s/s", right=True, spare=True),
            Column("peak MiB", right=True, spare=True),
            Column("weights MB", right=True),
            Column("note", fold=True),
        ]
        return columns, [self._line(cell) for cell in self.lines]

    def _line(self, cell: Cell) -> list[str]:
        one = self.contender(cell.contender)
        held = "" if one.held is None else f"{one.held / 1e6:.1f}"
        note = "; ".join(filter(None, (cell.missing, one.note)))
        if cell.latency is None:
            rows = "" if one.missing else f"{cell.rows}"
            return [cell.contender, rows, "", "", "", "", "", held, note]
        low, high = cell.latency.low * 1e3, cell.latency.high * 1e3
        return [
            cell.contender,
            f"{cell.rows}",
            f"{cell.latency.median * 1e3:.4g}",
            f"{low:.4g} to {high:.4g}",
            "1" if cell.ratio is None else str(cell.ratio),
            f"{cell.throughput:.4g}",
            "" if cell.peak is None else f"{cell.peak / 2**20:.1f}",
            held,
            note,
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts (JSON-ready)."""
        return {"format": FORMAT, **asdict(self)}
