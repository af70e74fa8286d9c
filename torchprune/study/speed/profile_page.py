"""A profile as a page and as a figure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchprune.errors import MissingExtraError
from torchprune.reports.pieces import (
    Bar,
    Bars,
    Fact,
    Grid,
    Heat,
    Line,
    Lines,
    Page,
    Piece,
    Prose,
    Section,
    Spot,
)
from torchprune.reports.tables import Column
from torchprune.study.speed.profile_records import Measured, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HELPFUL = ("faster", "slower", "same", "unclear", "bound", "zeros", "memory")


def page_of(profile: Measured) -> Page:
    """Headline figures, what the numbers say, the table, figures by rows, layers, the machine."""
    said = [v for v in profile.verdicts if v.kind in _HELPFUL]
    sections = [
        Section("What the numbers say", [_sentence(v) for v in said]),
        Section("Speed", [*_by_rows(profile), *_speedups(profile)], _protocol(profile)),
        Section("All numbers", [_grid(profile), *_flops(profile)]),
    ]
    if ahead := [v for v in profile.verdicts if v.kind in ("prospect", "nothing")]:
        prose = [_sentence(v) for v in ahead]
        told = "Kernels timed here on the shapes of these layers, added up; measured, not promised."
        sections.append(Section("What would bring more", [*prose, *_prospects(profile)], told))
    if profile.layers:
        sections.append(Section("Layer by layer", _layers(profile)))
    facts = [Column("what"), Column("is", fold=True)]
    rows = [*profile.machine.items(), ("peak memory by", profile.peak_how)]
    notes = [Prose(note) for note in profile.notes]
    sections.append(Section("Measured on", [Grid("Machine", facts, rows), *notes]))
    return Page(
        title=f"Profile of {profile.model}",
        lead=_lead(profile),
        sections=[section for section in sections if section.pieces],
        facts=_facts(profile),
        warnings=[
            f"{c.name} was not measured: {c.missing}" for c in profile.contenders if c.missing
        ],
        data=profile.to_dict(),
    )


def _sentence(verdict: Verdict) -> Prose:
    return Prose(f"{verdict.text[:1].upper()}{verdict.text[1:]}.")


def _lead(profile: Measured) -> str:
    best = _best(profile)
    if best is None:
        return f"No form of this {profile.model} is faster than {profile.base}."
    name, rows, value = best
    return (
        f"At best this {profile.model} is {1 / value:.2f} times as fast as {profile.base}: as "
        f"{name}, with {rows} {profile.unit}{'s' * (rows != 1)} a call."
    )


def _best(profile: Measured) -> tuple[str, int, float] | None:
    """The contender, rows and ratio that gain most among those known to gain."""
    fast = {(v.contender, v.rows) for v in profile.verdicts if v.kind == "faster"}
    cells = [
        (c.contender, c.rows, c.ratio.value)
        for c in profile.cells
        if c.ratio is not None and (c.contender, c.rows) in fast
    ]
    return min(cells, key=lambda cell: cell[2]) if cells else None


def _facts(profile: Measured) -> list[Fact]:
    found = [Fact("parameters", f"{profile.parameters:,}", f"{profile.zeros:,} are zero")]
    if counted := [f for f in profile.flops if f.total]:
        share = max(f.by_zeros / f.total for f in counted)
        found.append(Fact("arithmetic by zeros", f"{share:.0%}", "of all FLOPs"))
    if best := _best(profile):
        name, rows, value = best
        found.append(Fact("fastest", f"{1 / value:.2f} x", f"{name}, {rows} {profile.unit}s"))
    sizes = [(c.held, c.name) for c in profile.contenders if c.held]
    if sizes:
        held, name = min(sizes)
        found.append(Fact("smallest", f"{held / 1e6:.1f} MB", f"{name}, weights"))
    return found


def _protocol(profile: Measured) -> str:
    rounds = [c.latency.rounds for c in profile.cells if c.latency is not None]
    return (
        f"Medians of {min(rounds)} to {max(rounds)} rounds in which all forms took turns; bars are "
        "95 % intervals of ratios, and the 10th to the 90th percentile of times."
        if rounds
        else ""
    )


def _by_rows(profile: Measured) -> list[Piece]:
    lines = []
    for one in profile.contenders:
        spots = [
            Spot(c.rows, y.median * 1e3, y.low * 1e3, y.high * 1e3)
            for c in profile.cells
            if c.contender == one.name and (y := c.latency) is not None
        ]
        if spots:
            lines.append(Line(one.name, spots))
    label = f"{profile.unit}s a call"
    return [Lines("Time of a call", label, "ms", lines, logarithmic=True)] if lines else []


def _speedups(profile: Measured) -> list[Piece]:
    found: list[Piece] = []
    for rows in profile.rows:
        bars = [
            Bar(c.contender, y.value, y.low, y.high, "dense" * c.contender.startswith("dense"))
            for c in profile.cells
            if c.rows == rows and (y := c.ratio) is not None
        ]
        if bars:
            title = f"{rows} {profile.unit}{'s' * (rows != 1)}"
            found.append(Bars(title, f"times {profile.base}'s time", bars, "below 1 is faster"))
    return found


def _grid(profile: Measured) -> Grid:
    columns, rows = profile.table()
    raw: list[list[float | str | None]] = []
    for cell in profile.lines:
        y, ratio = cell.latency, cell.ratio
        held = profile.contender(cell.contender).held
        raw.append(
            [
                cell.contender,
                cell.rows,
                None if y is None else y.median,
                None if y is None else y.high - y.low,
                None if ratio is None else ratio.value,
                cell.throughput,
                cell.peak,
                held,
                cell.missing,
            ]
        )
    return Grid("Every form at every number of rows", columns, rows, raw)


def _flops(profile: Measured) -> list[Piece]:
    if not profile.flops:
        return []
    columns = [Column(f"{profile.unit}s", right=True)]
    columns += [Column(head, right=True) for head in ("FLOPs", "by zeros", "share")]
    rows = [
        (f"{f.rows}", f"{f.total:,}", f"{f.by_zeros:,}", f"{f.by_zeros / max(1, f.total):.1%}")
        for f in profile.flops
    ]
    return [Grid("Arithmetic of a call", columns, rows)]


def _prospects(profile: Measured) -> list[Piece]:
    found: list[Piece] = []
    for rows in sorted({p.rows for p in profile.prospects}):
        bars = [
            Bar(p.kernel, p.ratio.value, p.ratio.low, p.ratio.high)
            for p in profile.prospects
            if p.rows == rows
        ]
        title = f"Expected at {rows} {profile.unit}{'s' * (rows != 1)}"
        found.append(Bars(title, f"times {profile.base}'s time", bars, "below 1 is faster"))
    return found


def _layers(profile: Measured) -> list[Piece]:
    """A heat map for each number of rows, layers by contenders."""
    found: list[Piece] = []
    for rows in sorted({y.rows for y in profile.layers}):
        here = [y for y in profile.layers if y.rows == rows]
        names = list(dict.fromkeys(y.layer for y in here))
        columns = list(dict.fromkeys(y.contender for y in here))
        times = {(y.layer, y.contender): y.latency.median * 1e3 for y in here}
        values = [[times.get((name, column)) for column in columns] for name in names]
        title = f"{rows} {profile.unit}{'s' * (rows != 1)}"
        found.append(Heat(title, "ms", columns, names, values, logarithmic=True))
    return found


def draw_lines(profile: Measured, path: str | os.PathLike[str] | None) -> Figure:
    """Latency against rows, on logarithmic axes; see `Profile.figure`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "figure", "Profile.figure") from None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for line in (y for piece in _by_rows(profile) if isinstance(piece, Lines) for y in piece.lines):
        below = [spot.y - (spot.low or spot.y) for spot in line.spots]
        above = [(spot.high or spot.y) - spot.y for spot in line.spots]
        axes.errorbar(
            [spot.x for spot in line.spots],
            [spot.y for spot in line.spots],
            yerr=[below, above],
            marker=_marker(profile, line.name),
            capsize=3,
            label=line.name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(profile.rows, [str(rows) for rows in profile.rows])
    axes.set_xlabel(f"{profile.unit}s a call")
    axes.set_ylabel("milliseconds a call")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    if path is not None:
        figure.savefig(path, format=Path(path).suffix[1:].lower(), dpi=150)
    return figure


def _marker(profile: Measured, name: str, markers: Sequence[str] = "osXPD^v<>*hp") -> str:
    names = [c.name for c in profile.contenders]
    return markers[names.index(name) % len(markers)]
