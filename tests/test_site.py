"""The site: it builds without a warning, shows every public name, and loads nothing from elsewhere.

What would be wrong with it fails the build; that is tried once, on a small copy with such faults.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_layout import PUBLIC_PACKAGES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def build(source: Path, out: Path, *options: str, path: Path | None = None) -> tuple[int, str]:
    """As `make site` does: the exit code and what was said."""
    options = ("-b", "html", "-E", "-W", "--keep-going", "-q", *options)
    command = [sys.executable, "-m", "sphinx", *options, "-d", str(out / "doctrees")]
    environment = {**os.environ, "NO_COLOR": "1"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(source), str(out / "site")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    code, said = build(DOCS, out)
    assert code == 0, said
    return out / "site"


@dataclass
class Page(HTMLParser):
    """What a page loads, where it leads, and what can be led to in it."""

    text: str
    loads: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag in ("a", "area"):
            self.links += [given[name] for name in ("href",) if name in given]
        else:
            self.loads += [given[name] for name in ("src", "href", "data") if name in given]
            self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part]


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}


def is_outside(link: str) -> bool:
    parts = urlsplit(link)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def broken(pages: dict[Path, Page]) -> Iterator[str]:
    """Links to files or anchors that are not there, and outer ones that are no addresses."""
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if is_outside(link):
                if parts.scheme not in ("http", "https") or "." not in parts.netloc:
                    yield f"{path.name}: {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = target in pages or (target.is_file() and not parts.fragment)
            if not there or (
                parts.fragment and unquote(parts.fragment) not in pages[target].anchors
            ):
                yield f"{path.name}: {link}"


def test_all_links_of_the_site_lead_somewhere(pages: dict[Path, Page]) -> None:
    inside = [link for page in pages.values() for link in page.links if not is_outside(link)]
    assert len(inside) > 1000
    assert [link for link in broken(pages) if not link.endswith(": #")] == []


def test_a_link_that_leads_nowhere_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("", "utf-8")
    links = [
        "#here",
        "there.txt",
        "https://a.org/b#c",
        "#gone",
        "there.txt#x",
        "no.html",
        "https://a",
    ]
    text = '<p id="here">' + "".join(f'<a href="{link}">x</a>' for link in links)
    path = tmp_path / "page.html"
    assert [found.split()[1] for found in broken({path: Page(text)})] == links[3:]


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    loads = {link for page in pages.values() for link in page.loads}
    assert any(link.endswith(".js") or ".js?" in link for link in loads)
    assert [link for link in loads if is_outside(link)] == []
    for sheet in site.rglob("*.css"):
        text = sheet.read_text("utf-8")
        outer = re.findall(r"url\(\s*['\"]?(?:https?:)?//[^)]*|@import[^;]*", text)
        assert outer == [], f"{sheet.name}: {outer}"
    scripts = [path for path in site.rglob("*.js") if path.name != "searchindex.js"]
    calls = r"(?:fetch|importScripts|import)\(\s*['\"`](?:https?:)?//"
    assert [p.name for p in scripts if re.search(calls, p.read_text("utf-8"))] == []


def test_every_public_name_has_its_entry(pages: dict[Path, Page]) -> None:
    anchors = {path.stem: page.anchors for path, page in pages.items() if path.parent.name == "api"}
    for package in sorted(PUBLIC_PACKAGES):
        names = importlib.import_module(package).__all__
        assert [name for name in names if f"{package}.{name}" not in anchors[package]] == []


def test_every_page_is_in_the_navigation_and_can_be_searched(site: Path) -> None:
    index = (site / "index.html").read_text("utf-8")
    tree = index[index.index('class="sidebar-tree"') : index.index('class="main"')]
    search = (site / "searchindex.js").read_text("utf-8")
    for path in DOCS.rglob("*.md"):
        name = path.relative_to(DOCS).with_suffix("").as_posix()
        assert name == "README" or f'href="{name}.html"' in tree, name
        assert f'"{name}"' in search


def test_a_public_name_on_a_page_leads_to_its_entry(pages: dict[Path, Page]) -> None:
    (page,) = [page for path, page in pages.items() if path.name == "choosing-a-method.html"]
    assert "../api/torchprune.html#torchprune.WandaSpec" in page.links


FAULTY = {
    "README.md": "# Pages\n\n- [one](one.md)\n- [the names](api/planted.md)\n",
    "one.md": "# One\n\n## Part\n\n[x](gone.md), [y](#nowhere), [z](api/planted.md#no), "
    "![w](no.svg), [fine](#part)\n",
    "lost.md": "# Lost\n",
    "api/planted.md": "# planted\n",
}
PLANTED = '''"""A package with a name that says nothing, and a docstring that is wrong."""

from dataclasses import dataclass

__all__ = ["Sizes", "silent", "told", "wrong"]

@dataclass
class Sizes:
    wide: int = 1
def silent() -> None: ...
def told() -> None:
    """Says what it does."""
def wrong() -> None:
    """Says *it badly."""
'''


def test_what_is_wrong_fails_the_build(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    for name, text in FAULTY.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, "utf-8")
    for name in ("conf.py", "extensions", "_static"):
        copy = shutil.copytree if (DOCS / name).is_dir() else shutil.copyfile
        copy(DOCS / name, source / name)
    (tmp_path / "planted.py").write_text(PLANTED, "utf-8")
    code, said = build(source, tmp_path, "-D", "public_packages=planted", path=tmp_path)
    assert code != 0
    warned = [line for line in said.splitlines() if "WARNING" in line or "ERROR" in line]
    for fault in (
        r"one\.md:5: .*gone",
        r"one\.md:5: .*nowhere",
        r"one\.md:5: .*'no'",
        r"one\.md:5: .*no\.svg",
        r"lost\.md: .*in no navigation: link it from a README\.md of docs",
        r"planted\.silent is public and the reference does not tell of it",
        r"planted\.Sizes is public and the reference does not tell of it",
        r"planted\.wrong.* start-string without end-string",
    ):
        assert any(re.search(fault, line) for line in warned), f"{fault}\n{said}"
    assert not any("told" in line or "part" in line for line in warned), said


def test_the_figure_is_drawn_by_its_script(tmp_path: Path) -> None:
    script = DOCS / "figures" / "lockstep.py"
    drawn = tmp_path / "lockstep.svg"
    subprocess.run([sys.executable, str(script), "--output", str(drawn)], check=True)
    assert drawn.read_bytes() == (DOCS / "lockstep.svg").read_bytes()
    assert "prefers-color-scheme: dark" in drawn.read_text("utf-8")


def test_numbers_of_the_decision_table_are_on_the_pages_that_it_names() -> None:
    page = DOCS / "guides" / "choosing-a-method.md"
    part = page.read_text("utf-8").split("## By what you have")[1].split("\n## ")[0]
    rows = re.findall(r"^\|.*\|$", part, re.MULTILINE)[2:]
    assert len(rows) > 10
    for row in rows:
        measured = row.rsplit("|", 2)[1]
        linked = re.findall(r"\]\((\S+?\.md)\)", measured)
        told = "".join((page.parent / link).read_text("utf-8") for link in linked)
        numbers = re.findall(r"\d+\.\d+|\d{2,}", re.sub(r"\]\(.*?\)", "", measured))
        assert linked, row
        assert numbers, row
        assert [number for number in numbers if number not in told] == [], row


def test_a_method_of_your_own_takes_fifteen_lines() -> None:
    text = (DOCS / "guides" / "your-own-method.md").read_text("utf-8")
    block = re.search(r"^## In fifteen lines.*?^```python\n(.*?)^```", text, re.DOTALL | re.M)
    assert block is not None
    assert len([line for line in block[1].splitlines() if line]) <= 15
    assert "sparsify" in block[1]


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: p.stem)
def test_no_page_keeps_marks_of_a_merge(page: Path) -> None:
    assert not re.search(r"^(<{7}|={7}|>{7})( |$)", page.read_text("utf-8"), re.MULTILINE)
