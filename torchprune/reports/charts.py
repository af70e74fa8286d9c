"""Pieces of a page that are drawn, as the drawing script takes them, with their text and table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torchprune.reports.pieces import Bars, Grid, Heat, Line, Lines, Spot
from torchprune.reports.tables import Column
from torchprune.reports.wording import PageError, number, percent

Drawn = Bars | Heat | Lines


@dataclass(frozen=True)
class Chart:
    """A drawing.

    Attributes:
        summary: what it shows, for who cannot see it.
        data: what the script draws, ready for JSON.
        table: all its values.
        kinds: what bars can be filtered by.
        note: what a reader must know of the drawing itself.
    """

    kind: str
    summary: str
    data: dict[str, Any]
    table: Grid
    kinds: Sequence[str] = ()
    note: str = ""


def chart_of(piece: Drawn) -> Chart:
    """What is drawn for a piece."""
    if isinstance(piece, Bars):
        return _bars(piece)
    return _heat(piece) if isinstance(piece, Heat) else _lines(piece)


def _bars(piece: Bars) -> Chart:
    ranged = any(bar.low is not None or bar.high is not None for bar in piece.bars)
    kinds = list(dict.fromkeys(bar.kind for bar in piece.bars if bar.kind))
    unit = f" ({piece.unit})" if piece.unit else ""
    columns = [
        Column("name", fold=True),
        *([Column("kind")] if kinds else []),
        Column(f"value{unit}", right=True),
        *([Column("low", right=True), Column("high", right=True)] if ranged else []),
    ]
    raw = [
        (
            bar.name,
            *([bar.kind] if kinds else []),
            bar.value,
            *([bar.low, bar.high] if ranged else []),
        )
        for bar in piece.bars
    ]
    bars = [
        {
            "name": short,
            "full": bar.name,
            "kind": bar.kind,
            "value": _finite(bar.value),
            "low": _finite(bar.low),
            "high": _finite(bar.high),
            "text": number(bar.value),
            "range": f"{number(bar.low)} to {number(bar.high)}" if bar.low != bar.high else "",
        }
        for bar, short in zip(piece.bars, shortened([b.name for b in piece.bars]), strict=True)
    ]
    known = [(bar.value, bar.name) for bar in piece.bars if math.isfinite(bar.value)]
    summary = f"Bar chart of {_count(len(bars), 'value')}{unit}. {_extremes(known)}"
    return Chart(
        "bars",
        summary.strip(),
        {"unit": piece.unit, "bars": bars},
        _grid(piece.title, columns, raw),
        kinds if len(kinds) > 1 else (),
    )


def _heat(piece: Heat) -> Chart:
    _check_heat(piece)
    shown = [[_finite(v) for v in row] for row in piece.values]
    known = [
        (value, f"{row}, {column}")
        for row, values in zip(piece.rows, shown, strict=True)
        for column, value in zip(piece.columns, values, strict=True)
        if value is not None
    ]
    holes = len(piece.rows) * len(piece.columns) - len(known)
    unit = f" ({piece.unit})" if piece.unit else ""
    summary = (
        f"Heat map of {_count(len(piece.rows), 'row')} by {_count(len(piece.columns), 'column')}"
        f"{unit}. {_extremes(known)}" + (f" {holes} without a value." if holes else "")
    )
    positive = [value for value, _ in known if value > 0]
    data = {
        "unit": piece.unit,
        "rows": shortened(piece.rows),
        "columns": shortened(piece.columns),
        "values": shown,
        "texts": [["" if v is None else _brief(v) for v in row] for row in piece.values],
        "logarithmic": piece.logarithmic and bool(positive),
        "least": min(positive, default=None),
    }
    columns = [Column("", fold=True), *(Column(head, right=True) for head in piece.columns)]
    raw = [(row, *values) for row, values in zip(piece.rows, piece.values, strict=True)]
    note = "Blank: no value." if holes else ""
    return Chart("heat", summary.strip(), data, _grid(piece.title, columns, raw), note=note)


def _lines(piece: Lines) -> Chart:
    told = percent if piece.percent else number
    spots = [spot for line in piece.lines for spot in line.spots]
    ranged = any(spot.low is not None or spot.high is not None for spot in spots)
    columns = [
        Column("line", fold=True),
        Column(piece.x_label, right=True),
        Column(piece.y_label, right=True),
        *([Column("low", right=True), Column("high", right=True)] if ranged else []),
    ]
    raw: list[list[float | str | None]] = []
    cells: list[list[str]] = []
    for line in piece.lines:
        for spot in line.spots:
            ends = [spot.low, spot.high] if ranged else []
            x = told(spot.x) if math.isfinite(spot.x) else number(spot.x)
            raw.append([line.name, spot.x, spot.y, *ends])
            cells.append([line.name, x, number(spot.y), *map(number, ends)])
    if piece.level is not None:
        blank: list[float | str | None] = [None] * (len(columns) - 3)
        raw.append([piece.level_name, None, piece.level, *blank])
        cells.append([piece.level_name, "", number(piece.level), *("" for _ in blank)])
    drawn = [
        {
            "name": line.name,
            "joined": line.joined,
            "spots": [
                [s.x, s.y, _finite(s.low), _finite(s.high), told(s.x), number(s.y)]
                for s in sorted(_good(line.spots), key=lambda s: s.x)
            ],
        }
        for line in piece.lines
    ]
    heights = [spot.y for line in piece.lines for spot in _good(line.spots)]
    level = _finite(piece.level)
    data = {
        "x": piece.x_label,
        "y": piece.y_label,
        "lines": drawn,
        "level": level,
        "level_name": piece.level_name,
        "level_text": number(level),
        "logarithmic": piece.logarithmic and min([*heights, *_some(level)], default=0) > 0,
        "percent": piece.percent,
    }
    parts = [_line_told(line, told) for line in piece.lines]
    if level is not None:
        parts.append(f"{piece.level_name}: {number(level)}")
    summary = f"Line chart of {piece.y_label} against {piece.x_label}. {'; '.join(parts)}"
    return Chart("lines", f"{summary.strip()}.", data, Grid(piece.title, columns, cells, raw))


def _line_told(line: Line, told: Any) -> str:
    spots = sorted(_good(line.spots), key=lambda s: s.x)
    if not spots:
        return f"{line.name}: no value"
    ends = [spots[0]] if len(spots) == 1 else [spots[0], spots[-1]]
    return f"{line.name}: " + ", then ".join(f"{number(s.y)} at {told(s.x)}" for s in ends)


def shortened(names: Sequence[str]) -> list[str]:
    """Names without the dotted path that all of them begin with.

    >>> shortened(["model.layers.0.up", "model.layers.1.up"]), shortened(["a.b"])
    (['0.up', '1.up'], ['a.b'])
    """
    if len(names) < 2:
        return list(names)
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    cut = first.rfind(".", 0, same) + 1
    return [name[cut:] or name for name in names]


def _grid(title: str, columns: Sequence[Column], raw: Sequence[Sequence[Any]]) -> Grid:
    rows = [[v if isinstance(v, str) else number(v) for v in row] for row in raw]
    return Grid(title, columns, rows, raw)


def _extremes(known: Sequence[tuple[float, str]]) -> str:
    if not known:
        return "No value is finite."
    (least, at_least), (most, at_most) = min(known), max(known)
    if least == most:
        return f"All are {number(least)}."
    return (
        f"Least {number(least)} ({at_least}), greatest {number(most)} ({at_most}), median "
        f"{number(median(value for value, _ in known))}."
    )


def _brief(value: float) -> str:
    """What fits a cell; the table has all digits."""
    return number(float(f"{value:.2g}")) if math.isfinite(value) else number(value)


def _check_heat(piece: Heat) -> None:
    shape = {len(row) for row in piece.values}
    if len(piece.values) != len(piece.rows) or shape - {len(piece.columns)}:
        raise PageError(
            f"heat map {piece.title!r:.80}: expected {len(piece.rows)} rows of "
            f"{len(piece.columns)} values, got {len(piece.values)} of {sorted(shape)}"
        )


def _good(spots: Iterable[Spot]) -> list[Spot]:
    return [spot for spot in spots if math.isfinite(spot.x) and math.isfinite(spot.y)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _some(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
