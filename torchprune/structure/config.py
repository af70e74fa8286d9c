"""The configuration of a transformers model that became smaller."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torchprune.slots import slots_of
from torchprune.structure.plan import ShrinkPlan

_HEADS = re.compile(r".*(heads?|n_head)$")
_WIDTHS = re.compile(r".*(intermediate|ffn|d_ff|n_inner|mlp|feed_forward|hidden_dim).*")
_LAYERS = re.compile(r".*(num|n)_?(\w+_)?layers?$")
_MOST = 256
"""Settings tried at most: each builds the model without its weights."""


def is_configured(model: nn.Module) -> bool:
    """Whether a model is built from a transformers configuration."""
    config = getattr(model, "config", None)
    return hasattr(config, "to_dict") and hasattr(type(model), "config_class")


def native_settings(
    model: nn.Module, plan: ShrinkPlan, blocks_before: dict[str, int]
) -> dict[str, Any] | None:
    """The settings by which the model's class would make tensors of the sizes it has now.

    Args:
        model: shrunk already, its configuration still the old one.
        blocks_before: lists of repeated blocks by name, and their lengths before.

    Returns:
        name -> value of what changes, or None if the class has no such form: widths that differ
        from layer to layer, or head sizes that it computes from the number of heads.
    """
    want = _shapes(model)
    for settings in itertools.islice(_candidates(model, plan, blocks_before), _MOST):
        if _built(model, settings) == want:
            return settings
    return None


def apply_settings(config: Any, settings: dict[str, Any]) -> None:
    """Change a configuration."""
    for name, value in settings.items():
        setattr(config, name, value)


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
    apply_settings(config, settings)
    kind: Any = type(model)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return _shapes(kind(config))
    except Exception:  # whatever a class makes of settings that contradict each other
        return None


def _candidates(
    model: nn.Module, plan: ShrinkPlan, blocks_before: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Settings worth trying, those that change most first."""
    config: Any = model.config
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    heads = {(r.before, r.after) for r in plan.removals if r.group.kind == "heads"}
    widths = {(r.before, r.after) for r in plan.removals if r.group.kind == "neurons"}
    lists = {
        (before, len(module))
        for name, before in blocks_before.items()
        if isinstance(module := model.get_submodule(name), nn.ModuleList)
        and len(module) != before
    }
    options: dict[str, list[Any]] = {}
    for name, value in fields.items():
        if isinstance(value, list) and (found := _sliced(value, model, plan, lists)) is not None:
            options[name] = [found]
        if type(value) is not int and not (value is None and name == "n_inner"):
            continue
        new: list[Any] = []
        if _HEADS.fullmatch(name):
            new += [value * after // before for before, after in heads if value % before == 0]
        elif _LAYERS.fullmatch(name):
            new += [after for before, after in lists if before == value]
        elif _WIDTHS.fullmatch(name):
            new += [after for before, after in widths if value is None or before == value]
        if new:
            options[name] = [*dict.fromkeys([*new, value])]
    names = list(options)
    for values in itertools.product(*options.values()):
        chosen = dict(zip(names, values, strict=True))
        if settings := {k: v for k, v in chosen.items() if v != fields[k]}:
            yield settings


def _sliced(
    value: list[Any], model: nn.Module, plan: ShrinkPlan, lists: set[tuple[int, int]]
) -> list[Any] | None:
    """A setting that lists something for each block, without the blocks that went."""
    if not any(before == len(value) for before, _ in lists):
        return None
    gone = {int(name.rpartition(".")[2]) for name in plan.blocks}
    return [item for at, item in enumerate(value) if at not in gone]
