"""The reference: every public name with its signature and docstring, by the room it lives in.

A page `api/PACKAGE.md` is a sentence or two, and gets the names of the package's `__all__` here. A
name without an entry or without a docstring of its own fails the build.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

LOG = logging.getLogger(__name__)
FOLDER = "api/"
INNER = "method, scopes, needs, needs_mean, label, chooses_weights"
"""What methods tell the library about themselves."""

ROOMS = [
    "sparsify",
    "methods",
    "specs",
    "masking",
    "structure",
    "training",
    "calibration",
    "reports",
    "study",
    "checkpoint",
    "lowering",
]
"""Those of the first package in the order in which a user meets them; others come after."""


def room_of(thing: Any, package: str) -> str:
    """The module below the package that a name comes from; the package, if that says nothing."""
    home = str(getattr(thing, "__module__", package))
    return home.removeprefix(f"{package}.").split(".")[0] if home != package else ""


def by_room(package: ModuleType) -> dict[str, list[str]]:
    """Names of `__all__` by room; of all packages but the first in one group."""
    groups: dict[str, list[str]] = {}
    for name in package.__all__:
        flat = "." in package.__name__
        room = "" if flat else room_of(getattr(package, name), package.__name__)
        groups.setdefault(room, []).append(name)
    order = {room: i for i, room in enumerate(ROOMS)}
    return dict(sorted(groups.items(), key=lambda item: (order.get(item[0], 99), item[0])))


def bases_of(package: ModuleType, names: list[str]) -> list[type]:
    """Classes whose options those named share, and which are not public themselves."""
    public = {getattr(package, name) for name in package.__all__ if _is_class(package, name)}
    found: dict[type, None] = {}
    for name in names:
        thing = getattr(package, name)
        for base in thing.__mro__[1:] if inspect.isclass(thing) else ():
            ours = base.__module__.startswith("torchprune.") and dataclasses.is_dataclass(base)
            if ours and dataclasses.fields(base) and base not in public:
                found[base] = None
    return list(found)


def _is_class(package: ModuleType, name: str) -> bool:
    return inspect.isclass(getattr(package, name))


def entry(home: str, name: str) -> str:
    """The directive that shows a name of a module."""
    thing = getattr(sys.modules[home], name)
    if inspect.isclass(thing):
        error = issubclass(thing, BaseException)
        options = f"   :members:\n   :exclude-members: {INNER}\n   :show-inheritance:\n"
        return f".. auto{'exception' if error else 'class'}:: {home}.{name}\n{options}\n"
    kind = "function" if callable(thing) else "data"
    return f".. auto{kind}:: {home}.{name}\n\n"


def described(name: str) -> str:
    """Markdown that shows all names of a package."""
    package, told = importlib.import_module(name), ""
    for room, names in by_room(package).items():
        if room:
            says = inspect.getdoc(importlib.import_module(f"{name}.{room}")) or ""
            told += f"\n## {room.capitalize()}\n\n{re.split(r'[;.](?= |$)', says)[0]}.\n"
        bases = [entry(base.__module__, base.__name__) for base in bases_of(package, names)]
        entries = [*bases, *(entry(name, one) for one in names)]
        told += "\n```{eval-rst}\n" + "".join(entries) + "```\n"
    return told


def show_options(*event: Any) -> tuple[str, str | None] | None:
    """Let a spec that takes `**options` and checks them say which ones there are."""
    _, kind, _, thing, _, signature, _ = event
    if kind != "class" or "**" not in (signature or "") or not dataclasses.is_dataclass(thing):
        return None
    fields = [one for one in dataclasses.fields(thing) if one.init]
    return f"({', '.join(map(_option, fields))})", None


def _option(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"{field.name}={field.default!r}"
    if field.default_factory is not dataclasses.MISSING:
        return f"{field.name}={field.default_factory()!r}"
    return field.name


def add_names(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give a page of a package its names."""
    package = docname.removeprefix(FOLDER)
    if docname.startswith(FOLDER) and package in app.config.public_packages:
        source[0] += described(package)


def name_missing(_: Sphinx, env: BuildEnvironment) -> None:
    """Warn of public names that no page shows, or that say nothing of themselves."""
    shown = set(env.domains.python_domain.objects)
    for package in env.config.public_packages:
        module = importlib.import_module(package)
        for name in module.__all__:
            says = getattr(module, name).__doc__ or ""
            generated = says.startswith(f"{name}(")  # what a dataclass without a docstring gets
            if f"{package}.{name}" not in shown or not says or generated:
                LOG.warning(
                    "%s.%s is public and the reference does not tell of it: it needs a docstring, "
                    "and %s a page docs/%s%s.md",
                    *(package, name, package, FOLDER, package),
                )


def keep_bars(*event: Any) -> None:
    """Let |W| in a docstring be what it is, not a name that stands for other text."""
    lines: list[str] = event[-1]
    lines[:] = [_bars(line) for line in lines]


def _bars(line: str) -> str:
    if line.lstrip().startswith((">>>", "... ")):
        return line
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else part.replace("|", r"\|") for part in parts)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect all of it."""
    app.add_config_value("public_packages", [], "env", list)
    app.connect("source-read", add_names)
    app.connect("autodoc-process-docstring", keep_bars)
    app.connect("autodoc-process-signature", show_options)
    app.connect("env-check-consistency", name_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
