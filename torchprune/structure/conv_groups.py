"""How many groups a convolution has once channels went, told by which of them did.

Shapes do not say it: half of the filters are half of the groups, or half of each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from torchprune.masking.plain_state import Slot
from torchprune.structure.cuts import Cut


def groups_left(model: nn.Module, slots: Mapping[str, Slot], cuts: Sequence[Cut]) -> dict[int, int]:
    """By a convolution's id its groups after some cuts; of those that have any, and lose channels.

    Args:
        slots: of the model, before the cuts.
    """
    of_tensor: dict[int, list[Cut]] = {}
    for cut in cuts:
        of_tensor.setdefault(id(slots[cut.key].tensor), []).append(cut)
    modules, found = dict(model.named_modules(remove_duplicate=False)), dict[int, int]()
    for key, slot in slots.items():
        module = owner_of(key, modules)
        if module is None or module.groups == 1:
            continue
        for cut in of_tensor.get(id(slot.tensor), ()):
            found.setdefault(id(module), module.groups)
            if slot.tensor.dim() > 1 and cut.axis == 0 and cut.before == rows_of(module):
                found[id(module)] = len(_groups_of(cut.keep, module).unique())
    return found


def owner_of(key: str, modules: Mapping[str, nn.Module]) -> Any:
    """The convolution that a tensor belongs to, also one that it is computed from; or None."""
    path = key
    while path:
        path = path.rpartition(".")[0]
        if isinstance(modules.get(path), _ConvNd):
            return modules[path]
    return None


def rows_of(module: Any) -> int:
    """The length of the weight's first axis, along which groups lie one after the other."""
    found: int = module.in_channels if isinstance(module, _ConvTransposeNd) else module.out_channels
    return found


def groups_by_rows(module: Any, rows: int) -> int:
    """The groups where only whole ones go, as of depthwise convolutions."""
    return max(1, int(module.groups * rows // rows_of(module)))


def cuts_within(units: Tensor, module: Any) -> bool:
    """Whether units on a weight's first axis, (rows,) or -1, lie in several groups."""
    first = units.view(module.groups, -1)[:, :1]
    return bool((units.view(module.groups, -1) != first).any())


def _groups_of(rows: Tensor, module: Any) -> Tensor:
    each: int = rows_of(module) // module.groups
    return rows // each
