"""The navigation of the site is the links of each folder's README.md, in their order.

A page that none of them names fails the build. GitHub shows the same README.md, so that the two
cannot differ.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

LOG = logging.getLogger(__name__)
FIRST, LAST = "start", "api/README"
"""Pages of the site that stand before and after what docs/README.md names."""

Sections = dict[str, list[str]]


def sections_of(text: str, folder: PurePosixPath, root: bool) -> Sections:
    """What a README.md names, by heading: pages (docnames) of its folder; of all, for the root."""
    found: Sections = {}
    heading = ""
    for line in text.splitlines():
        if title := re.match(r"## +(.*)", line):
            heading = title[1]
        for link in re.findall(r"\]\(([^)\s#:]+)\.md(?:#[^)\s]*)?\)", line):
            page = PurePosixPath(_plain(folder / link))
            if root or page.parent == folder:
                found.setdefault(heading, []).append(str(page))
    return found


def _plain(path: PurePosixPath) -> str:
    """Without `..`."""
    parts: list[str] = []
    for part in path.parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def trees(sections: Sections, known: set[str], own: str) -> str:
    """Hidden toctrees of the sections; a page stands where it is named first."""
    told, said = "", {own}
    for caption, pages in sections.items():
        new = [page for page in dict.fromkeys(pages) if page in known and page not in said]
        said |= set(new)
        lines = "".join(f"/{page}\n" for page in new)
        if new:
            title = f":caption: {caption}\n" if caption else ""
            told += f"\n```{{toctree}}\n:hidden:\n{title}\n{lines}```\n"
    return told


def lead_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let a link to Markdown that is no page, as a benchmark's table is, lead to a copy of it."""
    folder = Path(app.srcdir, docname).parent

    def copied(link: re.Match[str]) -> str:
        inside = (folder / link[1]).resolve().is_relative_to(Path(app.srcdir).resolve())
        return link[0] if inside else f"](path:{link[1]})"

    source[0] = re.sub(r"\]\((\.\./[^)\s#:]+\.md)\)", copied, source[0])


def add_trees(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give each README.md the toctrees that its links make."""
    if PurePosixPath(docname).name != "README":
        return
    root = docname == app.config.root_doc
    sections = sections_of(source[0], PurePosixPath(docname).parent, root)
    if root:
        sections = {"Start": [FIRST], **sections, "Reference": [LAST]}
    source[0] += trees(sections, app.env.found_docs, docname)


def name_lost_pages(_: Sphinx, env: BuildEnvironment) -> None:
    """Warn of pages that nobody would find."""
    reached = {page for pages in env.toctree_includes.values() for page in pages}
    for lost in sorted(env.found_docs - reached - {env.config.root_doc}):
        LOG.warning("in no navigation: link it from a README.md of docs", location=lost)


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Let each README.html be what its folder opens with."""
    if error is None and app.builder.name == "html":
        for page in Path(app.outdir).rglob("README.html"):
            shutil.copyfile(page, page.with_name("index.html"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect all of it."""
    app.connect("source-read", lead_outside)
    app.connect("source-read", add_trees)
    app.connect("env-check-consistency", name_lost_pages)
    app.connect("build-finished", add_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
