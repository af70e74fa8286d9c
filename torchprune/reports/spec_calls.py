"""A spec as the Python that makes it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, cast

from torchprune.specs.options import Checked
from torchprune.specs.patterns import NM, Block, Unstructured


def spec_call(spec: Checked) -> str:
    """The call, with the options that are not the defaults alone.

    A function of the user's own stands there by its name.

    >>> from torchprune.methods.wanda import WandaSpec
    >>> spec_call(WandaSpec(pattern="2:4", refine="swaps"))
    "torchprune.WandaSpec(pattern='2:4', refine=torchprune.Swaps())"
    """
    values = {f.name: getattr(spec, f.name) for f in fields(cast(Any, spec))}
    told = dict(values)
    for name in values:
        others = {k: v for k, v in told.items() if k != name}
        if _same(spec, others, values):
            told = others
    return f"torchprune.{type(spec).__name__}({_arguments(told)})"


def sparsify_call(spec: Checked, *, data: bool) -> str:
    """The call of `sparsify` that a model was pruned by; `data`: it read batches."""
    return f"torchprune.sparsify(model, {spec_call(spec)}{', batches' if data else ''})"


def _same(spec: Checked, told: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a spec of these options alone is this one."""
    needed = [f.name for f in fields(cast(Any, spec)) if _is_needed(f)]
    if any(name not in told for name in needed):
        return False
    try:
        made = type(spec)(**told)
        return all(getattr(made, name) == value for name, value in values.items())
    except (TypeError, ValueError):  # it contradicts itself without this option
        return False


def _is_needed(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in options.items())


def _value(value: Any) -> str:
    if isinstance(value, Checked):
        return spec_call(value)
    if isinstance(value, Unstructured | NM | Block):
        return repr(str(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_value, value)) + ("," if len(value) == 1 else "") + ")"
    if callable(value):
        return str(getattr(value, "__name__", type(value).__name__))
    return repr(value)
