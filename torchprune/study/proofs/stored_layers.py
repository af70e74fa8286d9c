"""The pruned layers of an artifact, one at a time, from wherever they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchprune.checkpoint.beside import PlainFiles
from torchprune.checkpoint.encoding import WeightsFile
from torchprune.checkpoint.manifest import Manifest
from torchprune.masking.mask import masked_layers, original_of
from torchprune.masking.matrices import View, view_of
from torchprune.masking.packing import masked
from torchprune.masking.parametrization import Record
from torchprune.masking.plain_state import slots_of


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """One pruned tensor.

    Attributes:
        key: its name in the plain model's `state_dict`.
        keep: bool, the weight's shape, True where kept.
        value: the effective weight, zero where pruned.
        view: how it reads as matrices; None for vectors.
        sure: whether its module told the view, or only its shape did.
        dense: the values from before the pruning, where they are stored.
    """

    key: str
    keep: Tensor
    value: Tensor
    record: Record
    view: View | None
    sure: bool = True
    dense: Tensor | None = None

    @property
    def zero(self) -> Tensor:
        """(groups, rows, cols) bool, where it is pruned."""
        assert self.view is not None
        return ~self.view.to_matrix(self.keep)


def of_model(model: nn.Module) -> Iterator[StoredLayer]:
    """The masked layers of a model."""
    for layer, mask in masked_layers(model):
        weight, keep = original_of(layer.module, layer.tensor).detach(), mask.mask
        text = mask.record.view
        view = None
        if weight.dim() > 1:
            view = View.read(text) if text else view_of(layer.module, weight.shape)
        yield StoredLayer(
            layer.key, keep, masked(weight, keep), mask.record, view, dense=mask.dense
        )


def of_file(file: WeightsFile | PlainFiles, manifest: Manifest) -> Iterator[StoredLayer]:
    """The masked layers of a file whose model nobody can build: shapes tell the views."""
    for key, entry in manifest.tensors.items():
        if entry.record is None:
            continue
        read = file.decode(key)
        assert read.mask is not None
        text = entry.record.view
        view = None
        if len(entry.shape) > 1:
            view = View.read(text) if text else guessed(entry.shape)
        value = masked(read.value, read.mask)
        sure = bool(text) or len(entry.shape) == 2
        yield StoredLayer(key, read.mask, value, entry.record, view, sure, read.dense)


def guessed(shape: tuple[int, ...]) -> View:
    """The view of a weight by its shape: a linear layer, or a convolution of one group."""
    if len(shape) == 2:
        return View.of("linear", shape, [], [0], [1])
    return View.of("conv", shape, [], [0], [*range(2, len(shape)), 1], axis=shape[1])


def of_plain(model: nn.Module, records: Mapping[str, Record]) -> Iterator[StoredLayer]:
    """The layers of a folded model: recorded ones, by their exact zeros.

    Args:
        records: by the tensor's name.
    """
    for key, slot in slots_of(model).items():
        if key not in records:
            continue
        value = slot.tensor.detach()
        view = view_of(slot.module, value.shape) if value.dim() > 1 else None
        yield StoredLayer(key, value != 0, value, records[key], view)


def bits_of(tensor: Tensor) -> Tensor:
    """A tensor's bit patterns, flat."""
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal to the bit, -0.0 and NaN included."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(bits_of(one), bits_of(two))
