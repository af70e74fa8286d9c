"""What a model's class and configuration do not say of its sizes: on the model, and in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from torchprune.errors import ShrinkError
from torchprune.masking.plain_state import slots_of
from torchprune.structure.conv_groups import groups_by_rows
from torchprune.structure.narrowed import Narrow, narrow_as
from torchprune.structure.resize import (
    Attributes,
    drop_blocks,
    restate,
    set_attributes,
)
from torchprune.structure.weight_shape import weight_shape

_RESIZED = "_torchprune_resized"


@dataclass(frozen=True)
class Resized:
    """How a model differs from what its class makes of its configuration.

    Attributes:
        drops: names of blocks that were taken out, a list for each time; later names count from
            what was left.
        attributes: module -> attribute -> value, where the modules' code reads sizes from them;
            and the groups of convolutions that lost channels.
        settings: of the configuration, where transformers would refuse them in a file.
        original: what those settings were before, with which the configuration is written.
        narrowed: arguments that modules narrow on entry, as `record_of` tells of the model.
    """

    drops: list[list[str]] = field(default_factory=list)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    settings: dict[str, int] = field(default_factory=dict)
    original: dict[str, int] = field(default_factory=dict)
    narrowed: Narrow = field(default_factory=dict)

    def followed_by(self, later: Resized, renamed: Mapping[str, str]) -> Resized:
        """Both together.

        Args:
            renamed: module names from before the later drops -> names now; what is gone is absent.
        """
        mine = {renamed[path]: v for path, v in self.attributes.items() if path in renamed}
        paths = {*mine, *later.attributes}
        return Resized(
            [*self.drops, *later.drops],
            {p: {**mine.get(p, {}), **later.attributes.get(p, {})} for p in sorted(paths)},
            {**self.settings, **later.settings},
            {**later.original, **self.original},
            later.narrowed,
        )


def resized_of(model: nn.Module) -> Resized | None:
    """The record on a model, or None."""
    found = getattr(model, _RESIZED, None)
    return found if isinstance(found, Resized) else None


def keep_resized(model: nn.Module, record: Resized | None) -> None:
    """Put a record on a model, or take it off."""
    if record is None:
        vars(model).pop(_RESIZED, None)
    else:
        setattr(model, _RESIZED, record)


def resize(model: nn.Module, record: Resized, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give a model, as its class makes it, the sizes of a shrunk one. New tensors hold no values.

    Args:
        shapes: of the shrunk model's tensors, by name.

    Raises:
        ShrinkError: the record names what the model does not have, or a tensor would grow.
    """
    for names in record.drops:
        _check_blocks(model, names)
        drop_blocks(model, names)
    made: dict[int, Any] = {}
    for key, slot in slots_of(model).items():
        old, shape = slot.tensor, tuple(shapes.get(key, slot.tensor.shape))
        if tuple(old.shape) == shape:
            continue
        if len(shape) != old.dim() or any(n > o for n, o in zip(shape, old.shape, strict=True)):
            raise ShrinkError(f"{key}: expected at most {tuple(old.shape)}, got {shape}")
        if slot.mask is not None:
            raise ShrinkError(f"{key}: a masked tensor cannot be resized; densify the model first")
        if id(old) not in made:
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
            parameter = isinstance(old, nn.Parameter)
            made[id(old)] = nn.Parameter(new, old.requires_grad) if parameter else new
        tensor = made[id(old)]
        module: Any = slot.module
        table = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
        table[slot.name] = tensor
    for path, module in model.named_modules():
        restate(module, _groups(path, module, record.attributes.get(path, {})))
    narrow_as(model, record.narrowed)
    _check_attributes(model, record.attributes)
    set_attributes(dict(model.named_modules()), record.attributes)
    config = getattr(model, "config", None)
    for name, value in record.settings.items():
        if type(getattr(config, name, None)) is not int or name.startswith("_"):
            raise ShrinkError(f"the configuration has no number {name!r:.80}")
        setattr(config, name, value)
    keep_resized(model, record)


def _groups(path: str, module: nn.Module, attributes: Mapping[str, int]) -> int | None:
    """The groups of a convolution: as recorded, or as few as whole ones went."""
    if not isinstance(module, _ConvNd) or module.groups == 1:
        return None
    rows = int(weight_shape(module)[0])
    groups = attributes.get("groups", groups_by_rows(module, rows))
    if not 0 < groups <= module.groups or rows % groups:
        raise ShrinkError(f"{path!r:.80}: {rows} channels cannot be {groups!r:.20} groups")
    return groups


def _check_blocks(model: nn.Module, names: Sequence[str]) -> None:
    modules = dict(model.named_modules())
    for name in names:
        parent = modules.get(name.rpartition(".")[0])
        if name not in modules or not isinstance(
            parent, nn.ModuleList | nn.Sequential | nn.ModuleDict
        ):
            raise ShrinkError(f"the model has no block {name!r:.80} that could go")


def _check_attributes(model: nn.Module, attributes: Attributes) -> None:
    modules = dict(model.named_modules())
    for path, values in attributes.items():
        held = vars(modules[path]) if path in modules else {}
        for name, value in values.items():
            old = cast(Any, held.get(name))
            if type(old) is not int or name.startswith("_") or not 0 < value <= old:
                raise ShrinkError(
                    f"{path!r:.80} has no size {name!r:.80} that could be {value!r:.20}"
                )
