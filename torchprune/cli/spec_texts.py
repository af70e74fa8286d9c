"""Specs in a line: "wanda,pattern=2:4", "heads,sparsity=0.25", "layers,drop=2",
"budget,parameters=0.7,over=neurons+layers"."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torchprune.cli.console import typer
from torchprune.cli.spec import Method, as_values, spec_of
from torchprune.errors import did_you_mean

if TYPE_CHECKING:
    from torchprune.study.compare import AnySpec

UNITS = {"heads": "HeadSpec", "neurons": "NeuronSpec", "channels": "ChannelSpec"}
"""Whole units by the words for them, and their specs."""

_WORDS = {"true": True, "false": False, "none": None}


def parsed(text: str, option: str = "--spec") -> tuple[str, dict[str, Any]]:
    """A method, and its options as Python values.

    Args:
        option: that the text was given by, for errors.

    Raises:
        typer.BadParameter: no such method, or an option that is not NAME=VALUE.
    """
    method, *parts = (part.strip() for part in text.split(","))
    known = [*(m.value for m in Method), *UNITS, "layers", "budget"]
    if method not in known:
        raise typer.BadParameter(
            f"{text!r} begins with none of {', '.join(known)}{did_you_mean(method, known)}",
            param_hint=option,
        )
    options: dict[str, Any] = {}
    for part in parts:
        name, found, value = part.partition("=")
        if not name or (found and not value):
            raise typer.BadParameter(f"{text!r}: {part!r} is not NAME=VALUE", param_hint=option)
        if name in options:
            raise typer.BadParameter(f"{text!r} gives {name} twice", param_hint=option)
        options[name] = _value(value) if found else True
    return method, options


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def made(method: str, options: dict[str, Any]) -> AnySpec:
    """The spec itself; torch comes with it.

    Raises:
        SpecError: an option that it has not, or a value out of range.
    """
    from torchprune.structure import specs

    if method == "layers":
        return specs.LayerSpec(**options)
    if method == "budget":
        return budget(**options)
    if method in UNITS:
        spec: AnySpec = getattr(specs, UNITS[method])(**options)
        return spec
    return spec_of(Method(method))(**as_values(options))


def budget(over: str | None = None, **options: Any) -> AnySpec:
    """A budget over kinds that are named with "+" between them.

    Raises:
        typer.BadParameter: a kind that is none.
        SpecError: an option that it has not, or a value out of range.
    """
    from torchprune.structure.budget_spec import BudgetSpec

    if over is None:
        return BudgetSpec(**options)
    known = [*UNITS, "layers"]
    kinds = str(over).split("+")
    for kind in kinds:
        if kind not in known:
            raise typer.BadParameter(
                f"over={over}: {kind!r} is none of {', '.join(known)}{did_you_mean(kind, known)}",
                param_hint="--spec",
            )
    specs: list[Any] = [made(kind, {}) for kind in kinds]
    return BudgetSpec(over=tuple(specs), **options)
