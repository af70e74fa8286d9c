"""Tables of text: with rich where it is installed, plain, or Markdown."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Cells = Sequence[str]

WIDTH = 140
"""Characters in a line of a table by rich, in a terminal at most its own; columns that fold take
what the others leave."""

_FOLDED = 20
"""Characters that a column that folds should have."""


@dataclass(frozen=True)
class Column:
    """A heading, and how its cells lie.

    Attributes:
        right: numbers, to the right.
        fold: long text, broken where the table gets too wide.
        spare: left out, the last first, of a terminal that has no room for all.
    """

    head: str
    right: bool = False
    fold: bool = False
    spare: bool = False


def by_rich(columns: Sequence[Column], rows: Sequence[Cells], total: Cells = ()) -> str | None:
    """The table, `total` below a rule; None where the cli extra's rich is not installed.

    In a terminal that is too narrow for it, what all rows have in common is said once, below, and
    so is what was left out.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return None
    width, common = _width(), ""
    if _wanted(columns, [*rows, total]) > width:
        columns, rows, total, common = _without_common(columns, rows, total)
        columns, rows, total, left_out = _without_spare(columns, rows, total, width)
        common += left_out
    narrow = _wanted(columns, [*rows, total]) > width
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(
            column.head,
            justify="right" if column.right else "left",
            overflow="fold" if column.fold or narrow else "ellipsis",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    if total:
        table.add_section()
        table.add_row(*map(Text, total))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    lines = console.export_text().rstrip().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n" + common


def _width() -> int:
    return min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH


def _wanted(columns: Sequence[Column], lines: Sequence[Cells]) -> int:
    """How wide a table is in which nothing has to give way."""
    found = 0
    for place, column in enumerate(columns):
        longest = max(len(column.head), *(len(line[place]) for line in lines if line))
        found += (min(longest, _FOLDED) if column.fold else longest) + 3
    return found


def _without_common(
    columns: Sequence[Column], rows: Sequence[Cells], total: Cells
) -> tuple[list[Column], list[Cells], Cells, str]:
    """The table without columns that say the same in all rows, and a line that says it."""
    told: dict[int, str] = {}
    for place in range(1, len(columns)):
        cells = {row[place] for row in rows}
        if len(rows) > 1 and len(cells) == 1 and not (total and total[place]):
            told[place] = cells.pop()
    left = [place for place in range(len(columns)) if place not in told]
    said = ", ".join(f"{columns[place].head} {cell}" for place, cell in told.items() if cell)
    return (
        [columns[place] for place in left],
        [[row[place] for place in left] for row in rows],
        [total[place] for place in left] if total else (),
        f"in all rows: {said}\n" if said else "",
    )


def _without_spare(
    columns: Sequence[Column], rows: Sequence[Cells], total: Cells, width: int
) -> tuple[Sequence[Column], Sequence[Cells], Cells, str]:
    """The table with as many of its spare columns as there is room for, and a line about others."""
    gone: list[str] = []
    while _wanted(columns, [*rows, total]) > width:
        spare = [place for place, column in enumerate(columns) if column.spare]
        if not spare:
            break
        gone.append(columns[spare[-1]].head)
        columns, total = _without(columns, spare[-1]), _without(total, spare[-1])
        rows = [_without(row, spare[-1]) for row in rows]
    said = f"no room here for: {', '.join(reversed(gone))}\n" if gone else ""
    return columns, rows, total, said


def _without(cells: Sequence[Any], place: int) -> list[Any]:
    return [*cells[:place], *cells[place + 1 :]]


def plain(columns: Sequence[Column], rows: Sequence[Cells]) -> str:
    """The table with its columns aligned by spaces, every row one line.

    >>> print(plain([Column("layer"), Column("zeros", right=True)], [("up", "96"), ("down", "8")]))
    layer  zeros
    up        96
    down       8
    """
    lines = [[column.head for column in columns], *(list(map(_one_line, row)) for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    )


def markdown(columns: Sequence[Column], rows: Sequence[Cells]) -> str:
    r"""The table as GitHub's Markdown.

    >>> print(markdown([Column("layer"), Column("zeros", right=True)], [("a|b", "96")]))
    | layer | zeros |
    |---|---:|
    | a\|b | 96 |
    """
    rule = "|" + "".join("---:|" if column.right else "---|" for column in columns)
    lines = [[column.head for column in columns], *rows]
    head, *body = ("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)
    return "\n".join([head, rule, *body])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return re.sub(r"[\\`*<|]", r"\\\g<0>", _one_line(text))
