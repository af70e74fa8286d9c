"""Write docs/notes/operators.md: what becomes of every operator of core ATen.

    .venv/bin/python tools/operators.py

A test holds that the page is what this makes of the rules as they are.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from torchprune.graph.context import unknown
from torchprune.graph.reasons import reason_for
from torchprune.graph.rules import _FILLED, pointwise, rule_for

PAGE = Path(__file__).parents[1] / "docs" / "notes" / "operators.md"

HEAD = """# Operators

What channels, heads and neurons do at every operator of torch's core ATen set ({count} overloads in
the torch that this page was made with): `tools/operators.py` writes this page from the rules, and a
test holds that no operator is missing. An operator that is not here is followed through the
simpler ones that torch makes of it; one that torch cannot take apart freezes what it reads, and the
plan names its line.

Three kinds of answer:

- **A rule**: labels go through, or the axes that the operator reads as a whole stay.
- **Element by element**: what meets in one element goes together.
- **A reason**: what the operator reads stays, and the plan says why.

## Rules

| operator | what goes through |
|---|---|
"""


def core_operators() -> dict[str, Any]:
    """Every overload of ATen that torch marks as core, by name; those that write into `out` not."""
    every = torch._C._dispatch_get_all_op_names()  # what `dir` shows depends on what was asked for
    found = {}
    for name in {n.removeprefix("aten::").partition(".")[0] for n in every if n[:6] == "aten::"}:
        packet = getattr(torch.ops.aten, name, None)
        if not isinstance(packet, torch._ops.OpOverloadPacket):
            continue
        for overload in packet.overloads():
            operator = getattr(packet, overload)
            writes = any(argument.is_out for argument in operator._schema.arguments)
            if torch.Tag.core in operator.tags and not writes:
                found[f"{name}.{overload}"] = operator
    return dict(sorted(found.items()))


def account(operator: Any) -> tuple[str, str]:
    """How an operator is followed ("rule", "made", "elements", "reason" or "missing"); in words."""
    packet = operator.overloadpacket
    if packet in _FILLED:
        return "made", "one value over and over, in the size that the code asks for"
    if why := reason_for(operator):
        return "reason", why
    rule = rule_for(operator)
    if rule is pointwise:
        return "elements", ""
    if rule is unknown:
        return "missing", ""
    return "rule", _in_words(rule)


def _in_words(rule: Any) -> str:
    first = inspect.cleandoc(rule.__doc__ or "").split("\n\n")[0]
    return " ".join(first.split()).rstrip(".")


def page() -> str:
    """The page."""
    rows: dict[str, dict[str, list[str]]] = {}
    found = core_operators()
    for name, operator in found.items():
        how, what = account(operator)
        rows.setdefault(how, {}).setdefault(what, []).append(name.removesuffix(".default"))
    text = HEAD.format(count=len(found))
    for what, names in [*rows["rule"].items(), *rows["made"].items()]:
        text += f"| {_listed(names)} | {what} |\n"
    text += "\n## Element by element\n\n" + _listed(rows["elements"][""]) + ".\n"
    text += "\n## Reasons\n\n| operator | why what it reads stays |\n|---|---|\n"
    for why, names in rows["reason"].items():
        text += f"| {_listed(names)} | {why} |\n"
    return text


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
