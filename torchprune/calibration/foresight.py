"""Which layers will read the tensor that a layer is about to read, learnt from blocks before.

A query projection waits with its input; the key and value projections of the same block will read
that very tensor, but nothing in a Python forward says so before they are called. The blocks of a
model are alike, though: what was seen in one of them is expected in the others of its class. Layers
foreseen so are pruned in the same stop, and SparseGPT solves their rows together. Whether it came
true is checked when they are called; see `lockstep`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from torchprune.masking.matrices import geometry
from torchprune.masking.targets import Target

_Role = tuple[type[nn.Module], str, torch.Size]
"""What a layer is in its block: the block's class, the layer's name within, its weight's shape."""


class Foresight:
    """What was learnt of the roles that layers play in their blocks.

    Args:
        targets: all layers; they are told apart by their place in this list.
        blocks: the model's repeated blocks by name. Layers outside have nobody to learn from.
    """

    def __init__(self, targets: Sequence[Target], blocks: Mapping[str, nn.Module]) -> None:
        self._targets = targets
        self._place: dict[int, tuple[str, _Role]] = {}
        owner = {id(m): name for name, block in blocks.items() for m in block.modules()}
        for index, target in enumerate(targets):
            name = owner.get(id(target.layer.module))
            if name is not None:
                within = target.layer.key.removeprefix(f"{name}.")
                role = (type(blocks[name]), within, target.weight.shape)
                self._place[index] = name, role
        self._index = {place: index for index, place in self._place.items()}
        self._partners: dict[_Role, list[_Role]] = {}

    def learn(self, first: int, other: int) -> None:
        """A layer read exactly the tensors that another had read before it."""
        if first not in self._place or other not in self._place:
            return
        (block, role), (same, partner) = self._place[first], self._place[other]
        known = self._partners.setdefault(role, [])
        if block == same and partner not in known:
            known.append(partner)

    def siblings(self, first: int) -> list[int]:
        """The layers expected to read the tensors that a layer reads, each batch its own."""
        if first not in self._place:
            return []
        block, role = self._place[first]
        places = ((block, partner) for partner in self._partners.get(role, ()))
        found = [self._index[place] for place in places if place in self._index]
        mine = geometry(self._targets[first].layer.module)
        return [i for i in found if geometry(self._targets[i].layer.module) == mine]
