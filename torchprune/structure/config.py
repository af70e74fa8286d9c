"""The configuration of a transformers model that became smaller."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from torchprune.masking.plain_state import slots_of
from torchprune.structure.shrink_plan import Removal

_HEADS = re.compile(r".*(heads?|n_head)$")
_WIDTHS = re.compile(r".*(intermediate|ffn|d_ff|n_inner|mlp|feed_forward|hidden_dim).*")
_LAYERS = re.compile(r".*(num|n)_?(\w+_)?layers?$")
_MOST = 256
"""Settings tried at most: each builds the model without its weights."""
_FEW = 4
"""Of them, how many are tried once more with each number that may count blocks."""


def is_configured(model: nn.Module) -> bool:
    """Whether a model is built from a transformers configuration."""
    config = getattr(model, "config", None)
    return hasattr(config, "to_dict") and hasattr(type(model), "config_class")


def native_settings(
    model: nn.Module, removals: Sequence[Removal], lists: Mapping[str, tuple[int, Set[int]]]
) -> dict[str, Any]:
    """The settings by which the model's class makes tensors nearest to the sizes they have now.

    None of them becomes smaller than it is now. Where widths differ from layer to layer, that is
    the largest; a class that computes head sizes from the number of heads has no such setting.

    Args:
        model: shrunk already, its configuration still the old one.
        removals: the groups that lost units since.
        lists: lists of repeated blocks, their lengths before, and the places of what went.

    Returns:
        name -> value of what changes.
    """
    want = _shapes(model)
    best: dict[str, Any] = {}
    rank = _equal(_built(model, {}), want), 0, 0

    def judge(settings: dict[str, Any]) -> None:
        nonlocal rank, best
        followed = sum(isinstance(value, list | tuple) for value in settings.values())
        equal = _equal(_built(model, settings), want)
        own = equal, followed if equal >= 0 else 0, -len(settings)
        if own > rank:  # a setting that changes no size is not changed either
            rank, best = own, settings

    candidates = list(itertools.islice(_candidates(model, removals, lists), _MOST))
    for settings in candidates:
        judge(settings)
    if lists and rank[0] < 0:  # a number may say how many of the first blocks are of a kind
        for settings in candidates[:_FEW]:
            for name, value in _counted(model.config, lists):
                judge({**settings, name: value})
    return best


def _counted(config: Any, lists: Mapping[str, tuple[int, Set[int]]]) -> Iterator[tuple[str, int]]:
    """Numbers that may count blocks from the first on, without those that went."""
    for name, value in _fields(config, nested=True):
        if type(value) is not int:
            continue
        for before, gone in lists.values():
            fewer = sum(place < value for place in gone)
            if 0 < value <= before and fewer:
                yield name, value - fewer


def _equal(built: dict[str, tuple[int, ...]] | None, want: dict[str, tuple[int, ...]]) -> int:
    """How many tensors have the sizes wanted; -1 if some are too small, or are others."""
    if built is None or built.keys() != want.keys():
        return -1
    for key, shape in want.items():
        if len(built[key]) != len(shape) or any(map(int.__lt__, built[key], shape)):
            return -1
    return sum(built[key] == shape for key, shape in want.items())


def is_native(model: nn.Module) -> bool:
    """Whether the model's class makes tensors of its sizes from its configuration."""
    return _built(model, {}) == _shapes(model)


def has_its_tensors(model: nn.Module) -> bool:
    """Whether it makes tensors of these names, if not of these sizes."""
    built = _built(model, {})
    return built is not None and built.keys() == _shapes(model).keys()


def apply_settings(config: Any, settings: dict[str, Any]) -> None:
    """Change a configuration, also the ones inside it (`text_config.num_hidden_layers`)."""
    for name, value in settings.items():
        *path, last = name.split(".")
        owner = config
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)


def is_accepted(model: nn.Module) -> str | None:
    """Why the configuration would be refused when it is read again, or None."""
    config: Any = model.config
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:
        return str(error).strip().splitlines()[-1].strip()
    return None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        key: tuple(slot.tensor.shape)
        for key, slot in slots_of(model).items()
        if slot.kind != "transient"
    }


def _built(model: nn.Module, settings: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    config = copy.deepcopy(model.config)
    kind: Any = type(model)
    try:
        apply_settings(config, settings)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return _shapes(kind(config))
    except Exception:  # whatever a class makes of settings that contradict each other
        return None


def _candidates(
    model: nn.Module, removals: Sequence[Removal], lists: Mapping[str, tuple[int, Set[int]]]
) -> Iterator[dict[str, Any]]:
    """Settings worth trying, those that change most first."""
    config: Any = model.config
    fields = dict(_fields(config, nested=bool(lists)))
    heads = {(r.before, r.after) for r in removals if r.group.kind == "heads"}
    widths = {(r.before, r.after) for r in removals if r.group.kind == "neurons"}
    options: dict[str, list[Any]] = {}
    for name, value in fields.items():
        new: list[Any] = []
        plain = name.rpartition(".")[2]
        if isinstance(value, list | tuple):
            kept = (_left(value, before, gone) for before, gone in lists.values())
            new += [left for left in kept if left is not None]
        elif value is None and name == "n_inner":  # GPT-2's way to say four times the width
            new += [after for _, after in widths]
        elif type(value) is not int:
            continue
        elif plain != "head_dim" and _HEADS.fullmatch(plain):
            new += [value * after // before for before, after in heads if value % before == 0]
        elif _LAYERS.fullmatch(plain):
            new += [value - len(gone) for before, gone in lists.values() if before == value]
        elif _WIDTHS.fullmatch(plain):
            new += [after for before, after in widths if before == value]
        if new:  # any may be meant: what the class makes of them decides
            options[name] = [*new, *(() if value in new else (value,))]
    if heads and fields.get("head_dim") is None and (size := _head_size(config)):
        options["head_dim"] = [size, None]  # else it would follow from the number of heads
    names = list(options)
    for values in itertools.product(*options.values()):
        chosen = dict(zip(names, values, strict=True))
        if settings := {k: v for k, v in chosen.items() if v != fields.get(k)}:
            yield settings


def _head_size(config: Any) -> int | None:
    width = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
        return width // heads
    return None


def _fields(config: Any, *, nested: bool, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration's settings by name, those of the configurations inside it too."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            if nested:
                yield from _fields(value, nested=True, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _left(value: Any, before: int, places: Set[int]) -> Any:
    """What a list that says something of each block says without those that went, or None.

    Either it has an entry for each, or its entries are places of blocks in rising order, of which
    one is none any more.
    """
    if len(value) == before:
        return type(value)(item for at, item in enumerate(value) if at not in places)
    rising = all(type(item) is int for item in value) and list(value) == sorted(set(value))
    if value and rising and value[0] >= 0 and value[-1] < before:
        return type(value)(
            at - sum(place < at for place in places) for at in value if at not in places
        )
    return None
