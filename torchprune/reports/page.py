"""A page as one file of HTML that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torchprune.errors import MissingExtraError
from torchprune.reports.charts import Chart, chart_of
from torchprune.reports.figure import SUFFIXES
from torchprune.reports.pieces import (
    Bars,
    Code,
    Fact,
    Grid,
    Heat,
    Lines,
    Page,
    Pairs,
    Piece,
    Prose,
    Section,
)
from torchprune.reports.whole_texts import write_whole
from torchprune.reports.wording import PageError, as_json

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

LONG_TABLE = 12
"""Rows from which on a table has a field to filter it by."""

_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@runtime_checkable
class Shown(Protocol):
    """A result that builds a page."""

    def page(self) -> Page: ...


def save_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        MissingExtraError: the extra "page" is absent.
        PageError: what the page holds cannot be shown, or its data are none that JSON can hold.
        OSError: it cannot be written; what was there before stays.
    """
    write_whole(path, page_html(page))


def page_html(page: Page) -> str:
    """The page as one document: styles, scripts, charts and data are in it.

    Its content security policy allows no request at all and no script but its own.

    Raises:
        MissingExtraError: the extra "page" is absent.
        PageError: as `save_page`.
    """
    template = _template()
    scripts = {name: _asset(name) for name in ("theme.js", "echarts.min.js", "page.js")}
    text = template.render(
        page=page,
        view=_Views(),
        styles=_markup(_asset("page.css")),
        scripts={name.split(".")[0]: _markup(text) for name, text in scripts.items()},
        hashes=" ".join(f"'sha256-{_digest(text)}'" for text in scripts.values()),
        data=_script(as_json(page.data)),
        version=_version(),
        long_table=LONG_TABLE,
    )
    return text.lstrip()


def save_result(
    path: str | os.PathLike[str], page: Page, figure: Callable[[str], Any] | None = None
) -> None:
    """Save a result as its suffix says: a page, its data as JSON, or a figure.

    Args:
        figure: draws it to a path that ends in .png, .svg or .pdf; None where there is none.

    Raises:
        PageError: another suffix.
        MissingExtraError: the extra "page" or "figure" is absent.
        OSError: it cannot be written; what was there before stays.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".html":
        save_page(page, path)
    elif suffix == ".json":
        write_whole(path, json.dumps(as_json(page.data), indent=1, allow_nan=False) + "\n")
    elif suffix in SUFFIXES and figure is not None:
        figure(os.fspath(path))
    else:
        known = [".html", ".json", *(SUFFIXES if figure is not None else ())]
        raise PageError(f"{path}: it is saved as one of {', '.join(known)}")


def joined(title: str, first: Page | Shown, *others: Page | Shown | Section | Pairs) -> Page:
    """Several pages as one: the first leads, each of the others is a part below it.

    Warnings of all come first; a command of a part stays with it. A section or generations by
    themselves follow the sections of the first. `data` holds each page's under its title.

    >>> page = joined("all", Page("one", "first", ()), Page("two", "second", (), warnings=["hot"]))
    >>> page.title, page.lead, [part.title for part in page.parts], page.warnings
    ('all', 'first', ['two'], ['two: hot'])
    """
    head = first if isinstance(first, Page) else first.page()
    sections, parts = list(head.sections), list(head.parts)
    warnings, data = list(head.warnings), {head.title: head.data}
    for other in others:
        if isinstance(other, Section):
            sections.append(other)
        elif isinstance(other, Pairs):
            sections.append(generations(other))
            data[_new(other.title, data)] = {"pairs": [vars(pair) for pair in other.pairs]}
        else:
            part = other if isinstance(other, Page) else other.page()
            warnings += [f"{part.title}: {warning}" for warning in part.warnings]
            data[_new(part.title, data)] = part.data
            parts.append(replace(part, warnings=()))
    return replace(head, title=title, sections=sections, parts=parts, warnings=warnings, data=data)


def led_by(head: Page, *first: Page | Pairs) -> Page:
    """A page whose reader sees other things first: their figures and sections come before its own.

    >>> first = Page("b", "", [Section("quality", ())])
    >>> [y.title for y in led_by(Page("a", "", [Section("layers", ())]), first).sections]
    ['quality', 'layers']
    """
    sections, facts = list[Section](), list[Fact]()
    warnings, data = list[str](), dict[str, Any]()
    for one in first:
        if isinstance(one, Pairs):
            sections.append(generations(one))
            data[_new(one.title, data)] = {"pairs": [vars(pair) for pair in one.pairs]}
        else:
            sections += one.sections
            facts += one.facts
            warnings += one.warnings
            data[_new(one.title, data)] = one.data
    return replace(
        head,
        sections=[*sections, *head.sections],
        facts=[*facts, *head.facts],
        warnings=[*head.warnings, *warnings],
        data={**head.data, **{_new(name, head.data): found for name, found in data.items()}},
    )


def generations(pairs: Pairs) -> Section:
    """What both models wrote, as a section."""
    return Section(
        "What the models write",
        [pairs],
        "The same prompts, continued by the dense and by the pruned model.",
    )


def _new(title: str, taken: Mapping[str, Any]) -> str:
    names = [title, *(f"{title} ({i})" for i in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


# -- what the template asks ------------------------------------------------------------------------


class _Views:
    """How each piece is shown; it also gives out the ids."""

    def __init__(self) -> None:
        self._count = 0

    def new_id(self) -> str:
        self._count += 1
        return f"p{self._count}"

    @staticmethod
    def kind(piece: Piece) -> str:
        for kind in (Prose, Grid, Code, Pairs):
            if isinstance(piece, kind):
                return kind.__name__.lower()
        if isinstance(piece, Bars | Heat | Lines):
            return "chart"
        raise PageError(f"a page cannot show a {type(piece).__name__}")

    @staticmethod
    def chart(piece: Bars | Heat | Lines) -> _DrawnChart:
        chart = chart_of(piece)
        return _DrawnChart(chart, _script(_cleaned(as_json(chart.data))))

    @staticmethod
    def rows(grid: Grid) -> list[list[tuple[str, str]]]:
        """For each cell its text, and what it is sorted by."""
        wrong = [i for i, row in enumerate(grid.rows) if len(row) != len(grid.columns)]
        if wrong or (grid.raw and len(grid.raw) != len(grid.rows)):
            raise PageError(
                f"table {grid.title!r:.80}: expected {len(grid.columns)} cells in a row and as many"
                f" rows of raw values as rows, got other ones (rows {wrong[:4]})"
            )
        raw: Sequence[Sequence[Any]] = grid.raw or grid.rows
        return [
            [(clean(cell), _sort_key(value)) for cell, value in zip(cells, values, strict=True)]
            for cells, values in zip(grid.rows, raw, strict=True)
        ]

    @staticmethod
    def facts(facts: Sequence[Fact]) -> Sequence[Fact]:
        return [Fact(*map(clean, (f.label, f.value, f.note))) for f in facts]


@dataclass(frozen=True)
class _DrawnChart:
    chart: Chart
    script: Markup


def clean(text: object) -> str:
    """A text without what HTML cannot hold, each such character as U+FFFD."""
    return _UNSEEN.sub("\ufffd", str(text))


def _cleaned(value: Any) -> Any:
    """The same with every text as `clean` has it."""
    if isinstance(value, dict):
        return {k: _cleaned(v) for k, v in value.items()}
    if isinstance(value, list):
        return list(map(_cleaned, value))
    return clean(value) if isinstance(value, str) else value


def _sort_key(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else repr(float(value))


def _script(value: Any) -> Markup:
    """JSON that no name in it can end, or turn into markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _markup(text)


# -- the template ----------------------------------------------------------------------------------


@cache
def _template() -> Template:
    try:
        from jinja2 import DictLoader, Environment, StrictUndefined
    except ImportError:
        raise MissingExtraError("jinja2", "page", "a page of HTML") from None
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=DictLoader({"page": _asset("page.html")}),
        finalize=lambda value: value if hasattr(value, "__html__") else clean(value),
    )
    return environment.get_template("page")


def _markup(text: str) -> Markup:
    from markupsafe import Markup

    return Markup(text)  # our own files, and JSON without markup


@cache
def _asset(name: str) -> str:
    return files("torchprune.reports").joinpath("assets", name).read_text("utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _version() -> str:
    try:
        return version("torchprune")
    except PackageNotFoundError:
        return ""
