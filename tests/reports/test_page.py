"""A page as a document: whole, without a network, and whatever its names are."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shown_pages import HOSTILE, every_piece, many_layers

import torchprune
from torchprune.errors import MissingExtraError
from torchprune.reports import page as pages
from torchprune.reports.charts import chart_of
from torchprune.reports.page import joined, page_html, save_page, save_result
from torchprune.reports.pieces import Bar, Bars, Grid, Heat, Line, Lines, Page, Pair, Pairs, Section
from torchprune.reports.pieces import Spot as At
from torchprune.reports.tables import Column
from torchprune.reports.wording import PageError, as_json

ROOT = Path(torchprune.__file__).parent.parent
ASSETS = Path(torchprune.__file__).parent / "reports" / "assets"


class Document(HTMLParser):
    """What a browser would find: tags with the names of their attributes, scripts, texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.headings: list[int] = []
        self._open: dict[str, str | None] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "script":
            self._open = dict(attrs)
            self.scripts.append((self._open, ""))
        self.links += [str(v) for k, v in attrs if k in ("href", "src", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.scripts[-1] = (self._open, self.scripts[-1][1] + data)
        else:
            self.texts.append(data)

    def json(self, **attributes: str) -> list[Any]:
        def refused(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        return [
            json.loads(text, parse_constant=refused)
            for found, text in self.scripts
            if found.items() >= attributes.items()
        ]


PLAIN = Document(page_html(every_piece()))


@settings(max_examples=30)
@given(
    st.text(st.characters(), max_size=30),
    st.floats(allow_nan=True, allow_infinity=True),
)
@example(HOSTILE, math.nan)
@example("<!--<script>", math.inf)
@example("]]>\u2029<\x85>\x0c\ufffe", -math.inf)
@example("{{ page }}{% raw %}", 1e308)
def test_no_name_and_no_number_changes_what_the_page_is(word: str, value: float) -> None:
    """The same tags with the same attributes as with a plain word, and JSON that is JSON."""
    page = every_piece(f"w{word}", value)
    html = page_html(page)
    found = Document(html)
    assert found.tags == PLAIN.tags
    assert found.headings == PLAIN.headings
    run = [text for attributes, text in found.scripts if "type" not in attributes]
    assert run == [text for attributes, text in PLAIN.scripts if "type" not in attributes]
    (data,) = found.json(id="data")
    assert data == as_json(page.data)
    assert len(found.json(**{"class": "drawn"})) == 6
    html.encode("utf-8")


def test_the_page_holds_its_words() -> None:
    text = " ".join(Document(page_html(every_piece("ж<b>&"))).texts)
    assert text.count("ж<b>&") > 40
    html = page_html(many_layers())
    assert "model.layers.42.down_proj" in html
    assert "covered 94 % of the blocks&#39; weights" in html
    order = ('<h2 id="warnings"', '<dl class="facts"', '<h2 id="again"', '<h2 id="s1"')
    places = [html.index(part) for part in order]
    assert places == sorted(places)


def test_headings_come_in_order() -> None:
    for page in (every_piece(), many_layers(), joined("all", many_layers(3), every_piece())):
        levels = Document(page_html(page)).headings
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_a_page_asks_no_network_and_stays_small() -> None:
    html = page_html(many_layers())
    assert len(html.encode()) < 1_200_000
    found = Document(html)
    assert [link for link in found.links if not link.startswith(("#", "data:,"))] == []
    assert not [tag for tag in found.tags if tag[0] in ("img", "iframe", "object", "embed")]
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert policy[1].count("&#39;sha256-") + policy[1].count("'sha256-") == 3


def test_every_chart_says_what_it_shows_and_has_its_table() -> None:
    html = page_html(many_layers())
    assert html.count('class="drawing"') == 3
    assert html.count('<details class="values" open>') == 3
    labels = re.findall(r'class="drawing" role="img" aria-label="([^"]+)"', html)
    assert "Bar chart of 301 values (relative squared error). Least " in labels[0]
    assert "43 rows by 7 columns" in labels[1]
    assert " without a value" in labels[1]
    assert "wanda: 14 at 30.00 %, then 60 at 70.00 %" in labels[2]
    assert "dense: 12.1" in labels[2]


def test_values_that_are_not_finite_are_told_and_not_drawn() -> None:
    chart = chart_of(Bars("t", "u", [Bar("a", math.nan), Bar("b", 2.0, 1.0, math.inf)]))
    assert [bar["value"] for bar in chart.data["bars"]] == [None, 2.0]
    assert chart.data["bars"][1]["high"] is None
    assert [row[1] for row in chart.table.rows] == ["nan", "2"]
    assert "All are 2." in chart.summary
    heat = chart_of(Heat("t", "u", ["x", "y"], ["r"], [[None, math.inf]], True))
    assert heat.data["values"] == [[None, None]]
    assert heat.data["logarithmic"] is False
    assert heat.note == "Blank: no value."
    lines = chart_of(Lines("t", "x", "y", [Line("l", [At(0.1, math.nan), At(0.2, 3.0)])], math.inf))
    assert len(lines.data["lines"][0]["spots"]) == 1
    assert lines.data["level"] is None
    assert [row[2] for row in lines.table.rows] == ["nan", "3", "inf"]


@pytest.mark.parametrize(
    ("piece", "told"),
    [
        (Heat("h", "u", ["x"], ["r"], [[1.0, 2.0]]), "expected 1 rows of 1 values"),
        (Heat("h", "u", ["x"], ["r", "s"], [[1.0]]), "expected 2 rows of 1 values"),
        (Grid("g", [Column("a")], [("x", "y")]), "expected 1 cells in a row"),
        (Grid("g", [Column("a")], [("x",)], [(1.0,), (2.0,)]), "as many rows of raw"),
        ("text", "cannot show a str"),
    ],
)
def test_pieces_that_contradict_themselves_are_refused(piece: Any, told: str) -> None:
    with pytest.raises(PageError, match=told):
        page_html(Page("t", "", [Section("s", [piece])]))


def test_a_refused_page_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    save_page(Page("first", "", ()), path)
    before = path.read_bytes()
    with pytest.raises(PageError, match=r"data\['x'\]\[1\]: expected what JSON can hold.*Tensor"):
        save_page(Page("second", "", (), data={"x": [1, torch.zeros(1)]}), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_result_is_saved_as_its_suffix_says(tmp_path: Path) -> None:
    page = Page("t", "", (), data={"a": math.inf})
    save_result(tmp_path / "x.JSON", page)
    assert json.loads((tmp_path / "x.JSON").read_text()) == {"a": "inf"}
    drawn: list[str] = []
    save_result(tmp_path / "x.svg", page, drawn.append)
    assert drawn == [str(tmp_path / "x.svg")]
    with pytest.raises(PageError, match=r"saved as one of \.html, \.json$"):
        save_result(tmp_path / "x.svg", page)
    with pytest.raises(PageError, match=r"x\.txt: .*\.pdf"):
        save_result(tmp_path / "x.txt", page, drawn.append)


def test_pages_are_joined_with_all_that_they_hold() -> None:
    one, two = many_layers(2), every_piece("b")
    pairs = Pairs("p", [Pair("a", "b", "c")])
    page = joined("all", one, two, Section("own", ()), pairs, two)
    assert [s.title for s in page.sections][-2:] == ["own", "What the models write"]
    assert [part.title for part in page.parts] == ["title b", "title b"]
    assert page.warnings == [*one.warnings, "title b: b", "title b: b"]
    assert list(page.data) == [one.title, "title b", "p", "title b (2)"]
    (data,) = Document(page_html(page)).json(id="data")
    assert data["p"] == {"pairs": [{"prompt": "a", "dense": "b", "pruned": "c"}]}
    assert data[one.title]["worst"] == "inf"


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pages._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"torchprune\[page\]"):
        save_page(Page("t", "", ()), tmp_path / "x.html")
    pages._template.cache_clear()
    assert list(tmp_path.iterdir()) == []


def test_the_chart_library_is_the_one_that_is_named() -> None:
    for where, name in ((ASSETS, "echarts.min.js"),):
        named = re.search(rf"^([0-9a-f]{{64}})  {name}$", (where / "SOURCES.md").read_text(), re.M)
        assert named is not None
        assert hashlib.sha256((where / name).read_bytes()).hexdigest() == named[1]
    head = (ASSETS / "echarts.min.js").read_text("utf-8")[:6000]
    assert "Apache License, Version 2.0" in head
    assert "BSD 3-Clause" in head
    assert "</script" not in (ASSETS / "echarts.min.js").read_text("utf-8").lower()


def test_a_wheel_brings_what_a_page_is_made_of(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("torchprune", "export"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assets = {f"torchprune/reports/assets/{path.name}" for path in ASSETS.iterdir()}
    assert len(assets) == 8
    assert assets <= inside
