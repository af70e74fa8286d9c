"""Random whole units, masked on a model: what structured tests start from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchprune
from torchprune.graph.groups import Group, Structure, structure_of
from torchprune.masking.selection import layers_of


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """All tensors that a model gives for a batch, in evaluation mode."""
    with torch.no_grad():
        made = model(**batch) if isinstance(batch, dict) else model(batch)
    return [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]


def unit_masks(
    model: nn.Module, gone: dict[int, Tensor], structure: Structure
) -> dict[str, Tensor]:
    """Masks of all prunable weights that hold the units `gone` of some groups, by group index."""
    shapes = {y.key: getattr(y.module, y.tensor).shape for y in layers_of(model)}
    masks: dict[str, Tensor] = {}
    for index, units in gone.items():
        for member in structure.groups[index].members:
            if member.key in shapes:
                mask = masks.setdefault(
                    member.key, torch.ones(shapes[member.key], dtype=torch.bool)
                )
                mask.index_fill_(member.axis, member.indices(units).nonzero().flatten(), False)
    return masks


def random_units(group: Group, seed: int, share: float = 0.5) -> Tensor:
    """(count,) bool: units that go, never all."""
    generator = torch.Generator().manual_seed(seed)
    step = 4 if "experts" in group.name else 1  # torch's grouped product wants rows of 16 bytes
    gone = torch.rand(group.count // step, generator=generator) < share
    gone[int(torch.randint(len(gone), (1,), generator=generator))] = False
    return gone.repeat_interleave(step)


def mask_random_units(
    model: nn.Module,
    batch: Any,
    seed: int = 0,
    *,
    share: float = 0.5,
    alike: bool = False,
    structure: Structure | None = None,
) -> Structure:
    """Mask random units of every group; `alike`: the same number in groups of the same count."""
    structure = structure or structure_of(model, batch)
    prunable = {y.key for y in layers_of(model)}
    gone = {}
    for index, group in enumerate(structure.groups):
        if any(m.reads and m.key not in prunable for m in group.members):
            continue  # what reads it carries no mask
        if alike:
            units = torch.arange(group.count) >= max(1, group.count // 2)
            generator = torch.Generator().manual_seed(seed + index)
            gone[index] = units[torch.randperm(group.count, generator=generator)]
        else:
            gone[index] = random_units(group, seed + 31 * index, share)
    torchprune.apply_masks(model, unit_masks(model, gone, structure))
    return structure


def close(got: list[Tensor], want: list[Tensor], tolerance: float) -> bool:
    """Whether all outputs agree, relative to the largest of each."""
    return len(got) == len(want) and all(
        g.shape == w.shape
        and float((g.double() - w.double()).abs().max())
        <= tolerance * (float(w.abs().max()) + 1e-6)
        for g, w in zip(got, want, strict=True)
    )
