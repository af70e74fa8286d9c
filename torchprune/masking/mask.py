"""Masks as parametrizations: attach, read, apply, take back, bake in.

The law: while a mask is attached the effective weight is `where(mask, original, 0)`, bit-equal to
the original where kept and exactly `+0.0` elsewhere, whatever the original holds there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune.errors import MaskError, SpecError, did_you_mean
from torchprune.masking.adapters import named_as_plain
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.packing import masked, pack_bits, unpack_bits
from torchprune.masking.scales import scale_of
from torchprune.masking.selection import Layer, layer_at, tied_to


@dataclass(frozen=True)
class Record:
    """How a mask came about: what `report` shows beside what it counts.

    Attributes:
        method: "magnitude", "wanda", "sparsegpt" and so on, the qualified name of a user's own
            function, or "given" (by `apply_masks`).
        pattern: the pattern's name, with the asked sparsity where the pattern implies none.
        updates_weights: whether the method changed kept weights.
        error: relative squared error of the layer's output on calibration inputs,
            ||X (W - W')^T||^2 / ||X W^T||^2, or None without data.
        tokens: calibration rows that reached the layer.
        note: anything the user should know.
    """

    method: str
    pattern: str
    updates_weights: bool = False
    error: float | None = None
    tokens: int | None = None
    note: str = ""


class Mask(nn.Module):
    """The parametrization: `weight = where(mask, original, 0)`.

    Buffers:
        mask: bool, the weight's shape, True = kept. Part of `state_dict`, follows `.to()`.
        dense: the weight before pruning, only where `keep_dense` was asked for.
    """

    mask: Tensor
    dense: Tensor | None

    def __init__(self, mask: Tensor, record: Record, dense: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("dense", dense)
        self.record = record
        self.reversible = not record.updates_weights
        """Whether the parametrized original still holds the dense values."""
        self._bits: tuple[Tensor, torch.Size] | None = None
        self._transparent = False

    def forward(self, weight: Tensor) -> Tensor:
        if self._transparent:
            return weight
        mask = self.whole()
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return torch.where(mask, weight, 0)  # what autograd knows, and graph passes look for
        return masked(weight, mask)  # inductor folds this one where weights are frozen

    def compress(self, into: Tensor) -> None:
        """Hold the mask as one bit a weight, `into` uint8; the buffer is empty until `expand`."""
        if self._bits is None:
            self._bits = into.copy_(pack_bits(self.mask)), self.mask.shape
            self.mask = self.mask.new_empty(0)

    def expand(self, like: Tensor) -> None:
        """Undo `compress`; the mask takes the memory format of the weight, `like`."""
        if self._bits is not None:
            self.mask, self._bits = laid_out_like(self.whole(), like), None

    @contextmanager
    def transparent(self) -> Iterator[None]:
        """For a while, give weights as they are: somebody else sees to the zeros."""
        self._transparent = True
        try:
            yield
        finally:
            self._transparent = False

    def whole(self) -> Tensor:
        """The mask, whether or not it is compressed."""
        return self.mask if self._bits is None else unpack_bits(*self._bits)

    def snapshot(self) -> tuple[Tensor, Record, bool, Tensor | None]:
        """What `restore` needs to make this mask what it is now."""
        return pack_bits(self.whole()), self.record, self.reversible, self.dense

    def restore(self, snapshot: tuple[Tensor, Record, bool, Tensor | None]) -> None:
        """Become what the mask was when the snapshot was taken. It must not be compressed."""
        bits, self.record, self.reversible, self.dense = snapshot
        self.mask.copy_(unpack_bits(bits, self.mask.shape))

    def right_inverse(self, weight: Tensor) -> Tensor:
        # Identity, so that registering a mask keeps the masked values: pruning can be taken back.
        return weight


def laid_out_like(mask: Tensor, weight: Tensor) -> Tensor:
    """The mask in the weight's memory format, so that masking does not undo `channels_last`."""
    if mask.stride() == weight.stride():
        return mask
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)


def mask_of(module: nn.Module, tensor: str) -> Mask | None:
    """The mask on a module's tensor, or None."""
    if not parametrize.is_parametrized(module, tensor):
        return None
    chain = cast(nn.ModuleDict, module.parametrizations)[tensor]
    found = [p for p in cast(nn.ModuleList, chain) if isinstance(p, Mask)]
    return found[0] if found else None


def original_of(module: nn.Module, tensor: str) -> Tensor:
    """The parameter behind a tensor, whether or not it is parametrized."""
    if parametrize.is_parametrized(module, tensor):
        chain = cast(nn.ModuleDict, module.parametrizations)[tensor]
        return cast(Tensor, getattr(chain, "original", None))
    return cast(Tensor, getattr(module, tensor))


def masked_layers(model: nn.Module) -> Iterator[tuple[Layer, Mask]]:
    """Every tensor that carries a mask, of whatever module, in registration order."""
    for layer in parameters_of(model):
        mask = mask_of(layer.module, layer.tensor)
        if mask is not None:
            yield layer, mask


def parameters_of(model: nn.Module) -> Iterator[Layer]:
    """Every parameter of every module, each module once, by its name in the plain model."""
    inside: set[int] = set()
    for path, plain, module in named_as_plain(model):
        if id(module) in inside:
            continue
        names = list(module._parameters)
        if parametrize.is_parametrized(module):
            chains = cast(nn.ModuleDict, module.parametrizations)
            inside.update(id(m) for m in chains.modules())
            masks = (mask_of(module, name) for name in chains)
            order: list[str] = next((m.__dict__["order"] for m in masks if m is not None), [])
            names += list(chains)
            names.sort(key=lambda name: order.index(name) if name in order else len(order))
        for name in names:
            yield layer_at(path, plain, module, name)


def attach(
    module: nn.Module, tensor: str, mask: Tensor, record: Record, dense: Tensor | None = None
) -> None:
    """Put a mask on a module's tensor, or replace the one it carries. The values stay.

    The mask takes the weight's memory format, which the masked weight then has too.
    """
    present = mask_of(module, tensor)
    if present is not None:
        present.mask.copy_(mask)  # in place: compiled models see the new mask without recompiling
        present.record = record
        present.reversible = present.reversible and not record.updates_weights
        if dense is not None:
            present.dense = dense
        return
    mask = laid_out_like(mask, original_of(module, tensor))
    order = list(module._parameters)
    _own_class(module)
    parametrize.register_parametrization(module, tensor, Mask(mask, record, dense), unsafe=True)
    # `unsafe` skips only a trial run of the mask; shapes were checked by whoever made it.
    mask_of(module, tensor).__dict__["order"] = order


def detach(module: nn.Module, tensor: str) -> None:
    """Remove a mask and leave the parameter behind it as it is, in its old place."""
    mask = mask_of(module, tensor)
    order = mask.__dict__.get("order", []) if mask is not None else []
    _own_class(module)
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    for name in order:  # registration had moved the parameter to the end of the state_dict
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)


def obstacle(layer: Layer, ties: dict[int, list[str]]) -> str | None:
    """Why a layer cannot carry a mask, or None."""
    module, tensor = layer.module, layer.tensor
    if parametrize.is_parametrized(module, tensor) and mask_of(module, tensor) is None:
        return (
            f"its {tensor} already has another parametrization; "
            "remove it first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    weight = original_of(module, tensor)
    if not isinstance(weight, nn.Parameter):
        return f"its {tensor} is a {type(weight).__name__}, not a Parameter"
    if not weight.is_floating_point():
        return f"its {tensor} is {weight.dtype}; prune before quantizing"
    if type(weight.data) is not Tensor and type(weight) is not nn.Parameter:
        return (
            f"its {tensor} is a {type(weight).__name__}, which holds no plain dense values; prune "
            f"before quantizing, or dequantize it: nn.Parameter(layer.{tensor}.dequantize())"
        )
    if weight.device.type == "meta":
        return f"its {tensor} is on the meta device and has no values"
    if weight.numel() == 0:
        return f"its {tensor} is empty"
    if weight.dtype == torch.float4_e2m1fn_x2:
        return f"its {tensor} is {weight.dtype}, two values in each element; dequantize it first"
    try:
        scale_of(module, tensor, weight)
    except SpecError as error:
        return str(error)
    names = ties.get(weight.untyped_storage().data_ptr(), [])
    if names:
        others = [n for n in names if n not in (layer.key, _original_key(layer))]
        return f"its {tensor} is tied to {', '.join(others)}"
    return None


def _original_key(layer: Layer) -> str:
    prefix = layer.key.removesuffix(layer.tensor)
    return f"{prefix}parametrizations.{layer.tensor}.original"


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch adds and deletes the tensor's property on the class, which a deepcopy shares: without
    this, folding a copy would take the weight away from the original.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        own = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        if isinstance(module, nn.RNNBase):  # its forward reads a list of its parameters
            own["_flat_weights"] = property(_flat_weights, lambda *_: None)
        module.__class__ = type(shared.__name__, shared.__bases__, own)


def _flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a sparsified model.

    Returns:
        tensor name in the plain model's `state_dict` -> bool mask of the weight's shape, True =
        kept. The masks are the model's own; clone before changing them.
    """
    return {layer.key: mask.mask for layer, mask in masked_layers(model)}


@on_ordinary_tensors
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Attach given masks (True = kept) to a model, in place; weights are not changed.

    A layer that has a mask gets the new one instead. Gradients flow to kept weights only.

    Args:
        masks: as `torchprune.masks` returns them: tensor name -> bool of the weight's shape.

    Raises:
        MaskError: an unknown name, a tied weight, a wrong shape or dtype. Nothing is changed then.
    """
    layers = {layer.key: layer for layer in parameters_of(model)}
    ties = tied_to(model)
    for key, mask in masks.items():
        if key not in layers:
            raise MaskError(f"{key!r} is no prunable tensor here{did_you_mean(key, layers)}")
        weight = original_of(layers[key].module, layers[key].tensor)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            got = (
                f"{mask.dtype} {tuple(mask.shape)}"
                if isinstance(mask, Tensor)
                else type(mask).__name__
            )
            raise MaskError(f"{key}: expected a bool mask {tuple(weight.shape)}, got {got}")
        if reason := obstacle(layers[key], ties):
            raise MaskError(f"{key} cannot carry a mask: {reason}")
    for key, mask in masks.items():
        layer = layers[key]
        weight = original_of(layer.module, layer.tensor)
        own = mask.detach().to(weight.device, copy=True)
        attach(layer.module, layer.tensor, own, Record("given", "given"))
    return model


@on_ordinary_tensors
def densify(model: nn.Module) -> nn.Module:
    """Take the pruning back, in place: masks go, the dense weights return bit for bit.

    For a method that changed weights (`SparseGPTSpec`) this needs `sparsify(...,
    keep_dense=True)`; for a loaded model the dense values are gone unless they were kept so.
    Weights trained under a mask keep what they learned. Where a spec's `permute` put channels in
    another order they stay in it: the same function, with permuted weights.

    Raises:
        MaskError: nothing is masked, or the dense weights were not kept. Nothing is changed then.
    """
    found = list(masked_layers(model))
    if not found:
        raise MaskError("densify: this model carries no torchprune masks")
    for layer, mask in found:
        if mask.dense is None and not mask.reversible:
            raise MaskError(
                f"densify: the dense weights of {layer.name} are gone ({mask.record.method} "
                "changed them, or they were not saved); prune with keep_dense=True to be able to "
                "go back, or use fold(model) to go on"
            )
    for layer, mask in found:
        if mask.dense is not None:
            original_of(layer.module, layer.tensor).data = mask.dense
        detach(layer.module, layer.tensor)
    return model


@on_ordinary_tensors
def fold(model: nn.Module) -> nn.Module:
    """Bake the masks into the weights, in place: plain modules again, zeros exact.

    The law: outputs are bit-equal before and after. Does nothing to a model without masks.
    """
    for layer, mask in list(masked_layers(model)):
        original = original_of(layer.module, layer.tensor)
        folded = masked(original, mask.mask)
        detach(layer.module, layer.tensor)
        original.data = folded
    return model
