"""Tables of text: with rich where it is installed, plain, or Markdown."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

Cells = Sequence[str]

WIDTH = 140
"""Characters in a line of a table by rich; columns that fold take what the others leave."""


@dataclass(frozen=True)
class Column:
    """A heading, and how its cells lie.

    Attributes:
        right: numbers, to the right.
        fold: long text, broken where the table gets too wide.
    """

    head: str
    right: bool = False
    fold: bool = False


def by_rich(columns: Sequence[Column], rows: Sequence[Cells], total: Cells = ()) -> str | None:
    """The table, `total` below a rule; None where the cli extra's rich is not installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(
            column.head,
            justify="right" if column.right else "left",
            overflow="fold" if column.fold else "ellipsis",
        )
    for row in rows:
        table.add_row(*map(Text, row))
    if total:
        table.add_section()
        table.add_row(*map(Text, total))
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().rstrip() + "\n"


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
