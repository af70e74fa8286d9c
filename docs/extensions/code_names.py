"""A public name in backticks on a page leads to its entry in the reference."""

from __future__ import annotations

import importlib
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


def targets(packages: list[str]) -> dict[str, str]:
    """What may stand in backticks, and the full name it means: classes are known bare too."""
    found: dict[str, str] = {}
    for package in reversed(packages):  # the first package's names win
        for name in importlib.import_module(package).__all__:
            full = f"{package}.{name}"
            found[full] = full
            if name[0].isupper():
                found[name] = full
    return found


class CodeNames(SphinxTransform):
    """Makes references of them."""

    default_priority = 600

    def apply(self, **_: Any) -> None:
        known = targets(self.config.public_packages)
        for literal in list(self.document.findall(nodes.literal)):
            name = re.match(r"([\w.]+)(?:\(.*\))?$", literal.astext(), re.DOTALL)
            inside = _inside(literal)
            if name is None or name[1] not in known or inside:
                continue
            link = pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=known[name[1]],
                refexplicit=True,
                refdoc=self.env.docname,
            )
            literal.replace_self(link)
            link += literal


def _inside(node: nodes.Node) -> bool:
    """Whether it is part of a link or of a heading already."""
    kinds = (nodes.reference, nodes.title, pending_xref)
    parent = node.parent
    while parent is not None:
        if isinstance(parent, kinds):
            return True
        parent = parent.parent
    return False


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect it."""
    app.add_transform(CodeNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
