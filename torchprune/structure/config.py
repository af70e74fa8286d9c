"""The configuration of a transformers model whose tensors became smaller."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchprune.structure.shrink_plan import Removal
from torchprune.structure.stock import shapes_of

Shapes = dict[str, tuple[int, ...]]

_HEADS = re.compile(r".*(heads?|n_head)$")
_MOST = 256
"""Settings tried at most: each builds the model without its weights."""


def native_settings(model: nn.Module, removals: Sequence[Removal]) -> dict[str, Any]:
    """The settings by which the model's class makes tensors nearest to the sizes they have now.

    None of them becomes smaller than it is now. Where widths differ from layer to layer, that is
    the largest; a class that computes head sizes from the number of heads has no such setting.
    A number that equals a width by chance is told from it by what moves with it.

    Args:
        model: shrunk already, its configuration still the old one.
        removals: the groups that lost units since.

    Returns:
        name -> value of what changes; of a configuration inside it, `text_config.name`.
    """
    want, old = shapes_of(model), _built(model, {})
    best: dict[str, Any] = {}
    rank = _equal(old, want), 0
    for settings in itertools.islice(_candidates(model, removals, old or {}, want), _MOST):
        own = _equal(_built(model, settings), want), -len(settings)
        if own > rank:  # a setting that changes no size is not changed either
            rank, best = own, settings
    return best


def _equal(built: Shapes | None, want: Shapes) -> int:
    """How many tensors have the sizes wanted; -1 if some are too small, or are others."""
    if built is None or built.keys() != want.keys():
        return -1
    for key, shape in want.items():
        if len(built[key]) != len(shape) or any(map(int.__lt__, built[key], shape)):
            return -1
    return sum(built[key] == shape for key, shape in want.items())


def is_native(model: nn.Module) -> bool:
    """Whether the model's class makes tensors of its sizes from its configuration."""
    return _built(model, {}) == shapes_of(model)


def apply_settings(config: Any, settings: Mapping[str, Any]) -> None:
    """Change a configuration, also the ones inside it (`text_config.num_hidden_layers`)."""
    for name, value in settings.items():
        setattr(_owner(config, name), name.rpartition(".")[2], value)


def setting(config: Any, name: str) -> Any:
    """A configuration's setting by the name that `native_settings` gives it, or None."""
    return getattr(_owner(config, name), name.rpartition(".")[2], None)


def _owner(config: Any, name: str) -> Any:
    for part in name.split(".")[:-1]:
        config = getattr(config, part)
    return config


def is_accepted(model: nn.Module) -> str | None:
    """Why the configuration would be refused when it is read again, or None."""
    config: Any = model.config
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:
        return str(error).strip().splitlines()[-1].strip()
    return None


def _built(model: nn.Module, settings: Mapping[str, Any]) -> Shapes | None:
    config = copy.deepcopy(model.config)
    kind: Any = type(model)
    try:
        apply_settings(config, settings)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return shapes_of(kind(config))
    except Exception:  # whatever a class makes of settings that contradict each other
        return None


# -- what is tried ---------------------------------------------------------------------------------


def _candidates(
    model: nn.Module, removals: Sequence[Removal], old: Shapes, want: Shapes
) -> Iterator[dict[str, Any]]:
    """Settings worth trying, those that change most first."""
    fields = dict(_fields(model.config))
    heads = {(r.before, r.after) for r in removals if r.group.kind == "heads"}
    widths = {(r.before, r.after) for r in removals if r.group.kind == "neurons"}
    options = {name: new for name, v in fields.items() if (new := _head_counts(name, v, heads))}
    for name, value in fields.items():
        new = [after for before, after in widths if value in (before, None)]
        if new and type(value) is not bool and _moves_no_other(model, {name: new[0]}, old, want):
            options[name] = [*options.get(name, []), *new]
    for name, new in options.items():  # any may be meant: what the class makes of them decides
        if fields[name] not in new:
            new.append(fields[name])
    for name, size in _head_sizes(model.config, fields) if heads else ():
        options[name] = [size, None]  # else it would follow from the number of heads
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        if settings := {k: v for k, v in chosen.items() if v != fields.get(k)}:
            yield settings


def _head_counts(name: str, value: Any, heads: set[tuple[int, int]]) -> list[Any]:
    plain = name.rpartition(".")[2]
    if type(value) is not int or plain == "head_dim" or not _HEADS.fullmatch(plain):
        return []
    return [value * after // before for before, after in heads if value % before == 0]


def _moves_no_other(
    model: nn.Module, settings: Mapping[str, Any], old: Shapes, want: Shapes
) -> bool:
    """Whether settings change sizes, and only of tensors that became smaller."""
    made = _built(model, settings)
    if made is None or made.keys() != want.keys() or old.keys() != want.keys():
        return False
    moved = {key for key in made if made[key] != old[key]}
    return bool(moved) and all(old[key] != want[key] for key in moved)


def _head_sizes(config: Any, fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Where a head's size may be set, and what it is."""
    for at in dict.fromkeys(name.rpartition(".")[0] for name in fields):
        name = f"{at}.head_dim" if at else "head_dim"
        owner = _owner(config, name)
        width = getattr(owner, "hidden_size", None)
        count = getattr(owner, "num_attention_heads", None)
        settable = not isinstance(getattr(type(owner), "head_dim", None), property)
        if settable and fields.get(name) is None and type(width) is int and type(count) is int:
            yield name, width // count


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration's settings by name, those of the configurations inside it too."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
