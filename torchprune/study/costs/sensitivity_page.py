"""How a sensitivity is shown: tables, heat maps, bars, and the overrides to copy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchprune.reports.pieces import Bar, Bars, Code, Fact, Grid, Heat, Page, Piece, Prose, Section
from torchprune.reports.tables import Cells, Column
from torchprune.study.costs.costs import MEANINGS, Cost, Costs, SensitivityError
from torchprune.study.costs.damage import Estimate

_SHOWN = 40
"""Layers in the printed table; the page and the JSON hold all."""

_ASKED = (0.5, 0.6, 0.7)
"""Sparsities for which a page gives overrides, those that the levels reach."""

UNITS = {
    "kl": "nats a row of the outputs",
    "loss": "difference of loss",
    "change": "share of the outputs' square",
    "predicted": "predicted",
    "taylor": "loss, first order",
    "error": "share of the layer's outputs' square",
    "squared": "square sum a batch",
}


def title_of(result: Costs) -> str:
    """What was measured, in a line."""
    what = "layers" if result.units == "weights" else result.units
    how = f"{result.mode}, {result.windows} {'windows' if result.mode == 'exact' else 'batches'}"
    return (
        f"Sensitivity of {len(result.rows)} {what if result.units != 'weights' else 'trials'}"
        f" ({how}): {MEANINGS[result.metric]}"
    )


# -- tables ----------------------------------------------------------------------------------------


def layer_table(result: Costs, shown: int = _SHOWN) -> tuple[list[Column], list[Cells], str]:
    """A line for each layer or unit, the costliest first, and what is said of those left out."""
    lines = _lines(result)
    order = sorted(lines, key=lambda line: -_worst(line, result.metric))
    columns = [Column("layer" if result.levels else "unit"), Column("kind")]
    columns += [Column(head, right=True) for head in _heads(result)]
    rest = "" if len(order) <= shown else f"and {len(order) - shown} that cost less"
    return columns, [_cells(line, result) for line in order[:shown]], rest


def _lines(result: Costs) -> list[list[Cost]]:
    """The rows of each layer, or each unit's own."""
    if not result.levels:
        return [[row] for row in result.rows]
    return [[row for row in result.rows if row.name == name] for name in result.layers]


def _heads(result: Costs) -> list[str]:
    if result.levels:
        return list(result.levels)
    return [MEANINGS[measure] for measure in result.measures]


def _cells(line: Sequence[Cost], result: Costs) -> Cells:
    first = line[0]
    if result.levels:
        by_level = {row.level: row.value(result.metric) for row in line}
        return [first.name, first.kind, *(_text(by_level.get(y)) for y in result.levels)]
    values = [_text(first.value(measure)) for measure in result.measures]
    return [_unit(first), first.kind, *values]


def _unit(row: Cost) -> str:
    return f"{row.name} {row.level}".rstrip()


def _text(found: Estimate | None) -> str:
    return "" if found is None else str(found)


def _worst(line: Sequence[Cost], metric: str) -> float:
    values = [row.value(metric) for row in line]
    return max((v.mean for v in values if v is not None), default=-math.inf)


# -- heat maps -------------------------------------------------------------------------------------


def heats(result: Costs) -> list[Heat]:
    """By kind and depth at each level, and by level and layer; of units, by group and unit."""
    if not result.levels:
        return [_unit_heat(result)]
    depths = sorted({row.depth for row in result.rows if row.depth is not None})
    found = [_kind_heat(result, level, depths) for level in result.levels] if depths else []
    return [*found, _layer_heat(result)]


def _kind_heat(result: Costs, level: str, depths: Sequence[int]) -> Heat:
    kinds = list(dict.fromkeys(row.kind for row in result.rows if row.depth is not None))
    sums: dict[tuple[str, int], float] = {}
    for row in result.rows:
        value = row.value(result.metric)
        if row.level == level and row.depth is not None and value is not None:
            at = (row.kind, row.depth)
            sums[at] = sums.get(at, 0.0) + value.mean
    return _heat(
        f"Kinds by depth at {level}",
        result,
        [str(depth) for depth in depths],
        kinds,
        [[sums.get((kind, depth)) for depth in depths] for kind in kinds],
    )


def _layer_heat(result: Costs) -> Heat:
    values = {(row.name, row.level): row.value(result.metric) for row in result.rows}
    return _heat(
        "Layers by level",
        result,
        list(result.levels),
        result.layers,
        [[_mean(values.get((n, level))) for level in result.levels] for n in result.layers],
    )


def _unit_heat(result: Costs) -> Heat:
    names = result.layers
    columns = list(dict.fromkeys(row.level for row in result.rows))
    values = {(row.name, row.level): row.value(result.metric) for row in result.rows}
    rows = [[_mean(values.get((name, unit))) for unit in columns] for name in names]
    return _heat(f"{result.units} by group", result, [c or "all" for c in columns], names, rows)


def _heat(
    title: str,
    result: Costs,
    columns: Sequence[str],
    rows: Sequence[str],
    values: Sequence[Sequence[float | None]],
) -> Heat:
    known = [v for row in values for v in row if v is not None]
    positive = [v for v in known if v > 0]
    wide = bool(positive) and max(positive) > 30 * min(positive)
    return Heat(title, UNITS[result.metric], columns, rows, values, logarithmic=wide)


def _mean(found: Estimate | None) -> float | None:
    return None if found is None else found.mean


# -- the page --------------------------------------------------------------------------------------


def page_of(result: Costs, data: Mapping[str, Any]) -> Page:
    """All of a result as a page, with its JSON."""
    sections = [
        Section("Where it hurts", heats(result), "Darker costs less: what may go first."),
        Section("One by one", [_bars(result), _grid(result)], "Sort by cost, filter by kind."),
        Section("By kind", [_kind_grid(result)]),
    ]
    if code := _codes(result):
        sections.append(Section("Overrides", code, "Paste one into the spec that was asked about."))
    return Page(
        "Sensitivity",
        _lead(result),
        sections,
        _facts(result),
        tuple(result.notes),
        data=data,
    )


def _lead(result: Costs) -> str:
    lines = sorted(_lines(result), key=lambda line: _worst(line, result.metric))
    one = "layer" if result.levels else result.units.removesuffix("s")
    least, most = _unit_name(lines[0][0], result), _unit_name(lines[-1][0], result)
    return (
        f"What pruning one {one} alone costs: {most} costs most, {least} least. Costs of single "
        "ones do not add up exactly when several go together."
    )


def _unit_name(row: Cost, result: Costs) -> str:
    return row.name if result.levels else _unit(row)


def _facts(result: Costs) -> list[Fact]:
    facts = [
        Fact("trials", str(len(result.rows)), f"of {len(result.layers)} names"),
        Fact("measured by", result.metric, UNITS[result.metric]),
        Fact("windows", str(result.windows), result.mode),
    ]
    if result.dense_loss is not None:
        facts.append(Fact("dense loss", f"{result.dense_loss:.4g}"))
    return facts


def _bars(result: Costs) -> Bars:
    level = result.levels[-1] if result.levels else None
    bars = []
    for row in result.rows:
        value = row.value(result.metric)
        if value is None or (level is not None and row.level != level):
            continue
        off, mean = value.error, value.mean
        low, high = (None, None) if off is None else (mean - off, mean + off)
        bars.append(Bar(_unit_name(row, result), mean, low, high, row.kind))
    title = "Cost" if level is None else f"Cost at {level}"
    note = "Error bars: one standard error over windows." if result.mode == "exact" else ""
    return Bars(title, UNITS[result.metric], bars, note)


def _grid(result: Costs) -> Grid:
    measures = result.measures
    columns = [Column("name"), Column("kind"), Column("level"), Column("zeros", right=True)]
    columns += [Column(MEANINGS[measure], right=True) for measure in measures]
    rows, raw = [], []
    for row in result.rows:
        values = [row.value(measure) for measure in measures]
        rows.append([row.name, row.kind, row.level, f"{row.sparsity:.1%}", *map(_text, values)])
        raw.append([row.name, row.kind, row.level, row.sparsity, *map(_mean, values)])
    return Grid("All trials", columns, rows, raw)


def _kind_grid(result: Costs) -> Grid:
    kinds = result.kinds()
    levels = list(result.levels) or [""]
    count = {
        kind: len({_unit_name(r, result) for r in result.rows if r.kind == kind}) for kind in kinds
    }
    columns = [Column("kind"), Column("how many", right=True)]
    columns += [Column(level or "sum", right=True) for level in levels]
    rows = [
        [kind, str(count[kind]), *(f"{sums[y]:.4g}" if y in sums else "" for y in levels)]
        for kind, sums in kinds.items()
    ]
    raw = [
        [kind, float(count[kind]), *(sums.get(y) for y in levels)] for kind, sums in kinds.items()
    ]
    return Grid("Sums of single costs", columns, rows, raw)


def _codes(result: Costs) -> list[Piece]:
    if result.units != "weights":
        return []
    least = min((row.sparsity for row in result.rows), default=0.0)
    most = max((row.sparsity for row in result.rows), default=0.0)
    found: list[Piece] = []
    try:
        for sparsity in _ASKED:
            if least <= sparsity <= most:
                lines = (f"    {k!r}: {v!r}," for k, v in result.overrides(sparsity).items())
                text = "overrides = {\n" + "\n".join(lines) + "\n}"
                found.append(Code(f"{sparsity:.0%} in all", text, "python"))
    except SensitivityError as error:
        return [Prose(str(error))]
    return found
