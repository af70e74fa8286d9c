"""The configuration of a transformers model whose tensors became smaller."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchprune.structure.shrink_plan import Removal
from torchprune.structure.stock import Real, Trait, Traits, shapes_of, traits_of

Shapes = dict[str, tuple[int, ...]]

_MOST = 256
"""Settings tried at most: each builds the model without its weights."""

_BEST = 8
"""Of those that fit so many are offered."""


@dataclass(frozen=True)
class Built:
    """What a class makes of settings: sizes of tensors, and what its modules keep."""

    shapes: Shapes
    traits: Traits


def native_settings(model: nn.Module, removals: Sequence[Removal]) -> list[dict[str, Any]]:
    """Settings by which the model's class makes tensors near to the sizes they have now.

    None of them becomes smaller than it is now, and no other number that a module keeps becomes
    larger, as the size of a head does that is computed from how many there are. Where widths differ
    from layer to layer, that is the largest. What a setting means is told by what moves with it in
    the model that the class makes, not by its name or its value.

    Args:
        model: shrunk already, its configuration still the old one.
        removals: the groups that lost units since.

    Returns:
        name -> value of what changes; of a configuration inside it, `text_config.name`. The best
        first: those that make most tensors as they are, by the fewest settings.
    """
    want, old = shapes_of(model), _built(model, {})
    if old is None or old.shapes.keys() != want.keys():
        return []
    least = _equal(old, want)
    found: list[tuple[int, int, dict[str, Any]]] = []
    for settings in itertools.islice(_candidates(model, removals, old, want), _MOST):
        built = _built(model, settings)
        if built is None or _grows(old.traits, built.traits):
            continue
        if (own := _equal(built, want)) > least:  # what changes no size is not changed either
            found.append((own, -len(settings), settings))
    found.sort(key=lambda one: one[:2], reverse=True)
    return [settings for *_, settings in found[:_BEST]]


def made_otherwise(model: nn.Module) -> dict[str, dict[str, int]]:
    """The numbers that modules keep and that the class would make others from the configuration:
    module -> attribute -> what the class makes."""
    built, found = _built(model, {}), dict[str, dict[str, int]]()
    for (path, name), value in ({} if built is None else traits_of(model)).items():
        made = built.traits.get((path, name)) if built is not None else None
        if type(value) is int and type(made) is int and made != value:
            found.setdefault(path, {})[name] = made
    return found


def _equal(built: Built | None, want: Shapes) -> int:
    """How many tensors have the sizes wanted; -1 if some are too small, or are others."""
    if built is None or built.shapes.keys() != want.keys():
        return -1
    for key, shape in want.items():
        if len(built.shapes[key]) != len(shape) or any(map(int.__lt__, built.shapes[key], shape)):
            return -1
    return sum(built.shapes[key] == shape for key, shape in want.items())


def _grows(old: Traits, new: Traits) -> list[Trait]:
    """Where numbers of modules became larger, or fractions others."""
    return [
        key
        for key, value in old.items()
        if (type(value) is int and type(new.get(key)) is int and new[key] > value)
        or (isinstance(value, Real) and new.get(key) != value)
    ]


def is_native(model: nn.Module) -> bool:
    """Whether the model's class makes tensors of its sizes from its configuration."""
    built = _built(model, {})
    return built is not None and built.shapes == shapes_of(model)


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


def _built(model: nn.Module, settings: Mapping[str, Any]) -> Built | None:
    made = _made(model, copy.deepcopy(model.config), settings)
    return None if made is None else Built(shapes_of(made), traits_of(made))


def _made(model: nn.Module, config: Any, settings: Mapping[str, Any]) -> nn.Module | None:
    kind: Any = type(model)
    try:
        apply_settings(config, settings)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            made: nn.Module = kind(config)
    except Exception:  # whatever a class makes of settings that contradict each other
        return None
    return made


# -- what is tried ---------------------------------------------------------------------------------


def _candidates(
    model: nn.Module, removals: Sequence[Removal], old: Built, want: Shapes
) -> Iterator[dict[str, Any]]:
    """Settings worth trying, those that change most first."""
    fields = dict(_fields(model.config))
    changes = {(r.before, r.after, r.group.kind == "heads") for r in removals}
    options: dict[str, list[Any]] = {}
    for name, value in fields.items():
        new = sorted({n for change in changes for n in _fewer(value, *change)}, reverse=True)
        if new and _moves_no_other(model, name, new[0], old, want):
            options[name] = new
    counts = {name: new[0] for name, new in options.items() if fields[name] is not None}
    pins = _pinned(model, fields, counts, old) if any(heads for *_, heads in changes) else {}
    for name, new in options.items():  # any may be meant: what the class makes of them decides
        if fields[name] not in new:
            new.append(fields[name])
    for name, size in pins.items():
        options[name] = [size, fields.get(name)]
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        if settings := {k: v for k, v in chosen.items() if v != fields.get(k)}:
            yield settings


def _fewer(value: Any, before: int, after: int, heads: bool) -> list[int]:
    """What a setting may be when so many of units are left: of heads a multiple, for queries."""
    if type(value) is int and value > 0 and (value == before or (heads and value % before == 0)):
        return [value * after // before]
    return [after] if value is None and not heads else []


def _moves_no_other(model: nn.Module, name: str, new: int, old: Built, want: Shapes) -> bool:
    """Whether a setting changes sizes, and only those that became smaller; or none yet, since what
    it counts is made larger instead."""
    made = _built(model, {name: new})
    if made is None or made.shapes.keys() != want.keys():
        return False
    moved = {key for key in want if made.shapes[key] != old.shapes[key]}
    if moved:
        return all(old.shapes[key] != want[key] for key in moved)
    return bool(_grows(old.traits, made.traits))


def _pinned(
    model: nn.Module, fields: Mapping[str, Any], counts: Mapping[str, int], old: Built
) -> dict[str, int]:
    """Settings that say a size which would else follow from others: those not set, or absent, that
    keep modules' numbers from growing, when there are fewer of something, if set to what it was."""
    made = _built(model, counts)
    grown = [] if made is None else _grows(old.traits, made.traits)
    sizes = {value for key in grown if type(value := old.traits[key]) is int}
    found = {}
    for name in (*(n for n, v in fields.items() if v is None), *_missed(model)) if sizes else ():
        for size in sizes:
            with_it = _built(model, {**counts, name: size})
            if with_it is not None and len(_grows(old.traits, with_it.traits)) < len(grown):
                found[name] = size
    return found


def _missed(model: nn.Module) -> list[str]:
    """The settings that a model's class asks for and that its configuration does not have."""
    config, found = copy.deepcopy(model.config), dict[str, None]()
    owners = {id(_owner(config, name)): name.rpartition(".")[0] for name, _ in _fields(config)}
    with ExitStack() as stack:
        for kind in {type(_owner(config, name)) for name, _ in _fields(config)}:
            stack.enter_context(_noting(kind, owners, found))
        _made(model, config, {})
    return list(found)


@contextmanager
def _noting(kind: Any, owners: Mapping[int, str], found: dict[str, None]) -> Iterator[None]:
    """Note what objects of a class are asked for in vain, of those given with their prefixes."""
    before, own = getattr(kind, "__getattr__", None), "__getattr__" in vars(kind)

    def noted(self: Any, name: str) -> Any:
        if (prefix := owners.get(id(self))) is not None and not name.startswith("_"):
            found[f"{prefix}.{name}" if prefix else name] = None
        if before is not None:
            return before(self, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    kind.__getattr__ = noted
    try:
        yield
    finally:
        if own:
            kind.__getattr__ = before
        else:
            del kind.__getattr__


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration's settings by name, those of the configurations inside it too."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
