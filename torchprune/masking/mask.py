"""Masks as parametrizations: attach, read, apply, take back, bake in.

The law: while a mask is attached the effective weight is `where(mask, original, 0)`, bit-equal to
the original where kept and exactly `+0.0` elsewhere, whatever the original holds there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune.errors import MaskError, SpecError, did_you_mean
from torchprune.masking.access import install, own_class, uninstall
from torchprune.masking.adapters import named_as_plain
from torchprune.masking.awaited import around_exports
from torchprune.masking.keeper import Guarded, Keeper, is_ordinary, keeper_of, values_of
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.packing import (
    clear,
    masked,
    pack_bits,
    pack_values,
    put_values,
    traced_bits,
    unpack_bits,
)
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
    """The parametrization: `weight = where(mask, original, 0)`, where `original` has the zeros.

    So the weight is the original itself as long as nothing is written under the mask; see
    `keeper`. Where it is traced, or stands in for another tensor, it is the product.

    Buffers:
        bits: uint8, one bit a weight, see `packing`; set = kept. Never floating point, so that
            `.to(dtype)` leaves it alone.
        hidden: the values under the zeros, row-major, in the weight's dtype; None where
            they are gone. What `densify` puts back.
        dense: the weight before pruning, only where `keep_dense` was asked for.

    A `state_dict` holds these. One with `mask`, bool of the weight's shape, and the values under
    the zeros in `original` is read too: so it was before there were bits.
    """

    bits: Tensor
    hidden: Tensor | None
    dense: Tensor | None

    def __init__(
        self,
        mask: Tensor,
        record: Record,
        dense: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("bits", pack_bits(mask))
        self.register_buffer("hidden", hidden)
        self.register_buffer("dense", dense)
        self.shape = mask.shape
        self.record = record
        self.keeper = Keeper()
        self._transparent = self._exported = False

    @property
    def mask(self) -> Tensor:
        """The mask, bool of the weight's shape, True = kept: a copy, for reading."""
        return unpack_bits(self.bits, self.shape)

    @property
    def reversible(self) -> bool:
        """Whether the values under the zeros are kept."""
        return self.hidden is not None

    # -- the weight ----------------------------------------------------------------------------

    def forward(self, weight: Tensor) -> Tensor:
        if self._transparent:
            return weight
        mask = self._whole(weight)
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return torch.where(mask, weight, 0)  # what autograd knows, and graph passes look for
        return masked(weight, mask)  # inductor folds this one where weights are frozen

    def _whole(self, weight: Tensor) -> Tensor:
        if self._exported:
            return cast(Tensor, self._buffers["mask"])
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            mask = traced_bits(self.bits, self.shape)
        else:
            mask = self.mask
        if weight.is_contiguous():
            return mask
        if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            return mask.contiguous(memory_format=torch.channels_last)
        return laid_out_like(mask, weight)

    def makes_ready(self, weight: Tensor) -> bool:
        """Clean a parameter, if it is one to be handed out, and see that its gradient is masked."""
        keeper = self.keeper
        if self._transparent:
            return True
        if weight is not keeper.param:
            if keeper.param is not None:
                if type(weight) is nn.Parameter:  # a shard's whole, for one: do not hold the other
                    keeper.forget()
                return False
            if type(weight) is not Guarded or keeper_of(weight) is not None:
                return False
        if not is_ordinary(weight) or torch._C._len_torch_dispatch_stack():
            return False
        if weight is not keeper.param or type(weight) is not Guarded:
            keeper.adopt(weight)
        keeper.clean(self.bits)
        if torch.is_grad_enabled() and weight.requires_grad:
            keeper.hook(self.of_gradient)
        return True

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """A gradient with zeros where the mask prunes."""
        if self._transparent:
            return gradient
        if gradient.layout == torch.sparse_coo:
            some = gradient.coalesce()
            keep = self.mask[tuple(some.indices())]
            values = torch.where(keep, some.values(), 0)
            return torch.sparse_coo_tensor(some.indices(), values, some.shape, is_coalesced=True)
        plain = type(gradient) is Tensor and gradient.shape == self.shape
        if plain and not torch.is_grad_enabled() and not _is_watched():
            kept = gradient.clone()
            clear(kept, self.bits)
            return kept
        return torch.where(self._whole(gradient), gradient, 0)

    @contextmanager
    def transparent(self) -> Iterator[None]:
        """For a while, give weights as they are: somebody else sees to the zeros."""
        self._transparent = self.keeper.touched = True
        try:
            yield
        finally:
            self._transparent, self.keeper.touched = False, True

    @contextmanager
    def exported(self, weight: Tensor) -> Iterator[None]:
        """For a while, hold the mask as one bool buffer, which a program's graph then reads."""
        own = dict(self._buffers)
        mask = laid_out_like(self.mask, weight)
        self._buffers.clear()
        self._buffers["mask"], self._exported = mask, True
        try:
            yield
        finally:
            self._exported = False
            self._buffers.clear()
            self._buffers.update(own)

    # -- what reversal needs -------------------------------------------------------------------

    def put_on(self, weight: Tensor) -> None:
        """Have the zeros in this parameter from now on, and in no other."""
        if self.keeper.param is not weight:
            self.keeper.free()
        if is_ordinary(weight):
            self.keeper.adopt(weight)
            self.keeper.clean(self.bits)
            if weight.requires_grad:
                self.keeper.hook(self.of_gradient)

    def restored(self, weight: Tensor) -> Tensor:
        """A copy of the weight with the values under the zeros, if they are kept."""
        values = values_of(weight).detach().clone()
        self.fill(values)
        return values

    def fill(self, values: Tensor) -> None:
        """Put the hidden values where they were, in place."""
        if self.hidden is not None:
            put_values(values, ~self.mask, self.hidden)

    def change(self, weight: Tensor, mask: Tensor, record: Record, *, reversible: bool) -> None:
        """Become another mask on the same weight; what is pruned no more has its value again."""
        whole = self.restored(weight)
        self.hidden = pack_values(whole, ~mask) if reversible else None
        values_of(weight).copy_(whole)
        self.bits.copy_(pack_bits(mask))  # in place: compiled models see it without recompiling
        self.record = record
        self.keeper.touched = True
        self.put_on(weight)

    def resize(self, change: Callable[[Tensor], Tensor], weight: Tensor) -> None:
        """Become a mask on another parameter: `change` gives what stays of the old one's shape."""
        if self.hidden is not None:
            whole = torch.zeros(self.shape, dtype=self.hidden.dtype, device=self.hidden.device)
            self.fill(whole)
            self.hidden = pack_values(change(whole), ~change(self.mask))
        mask = change(self.mask)
        self.bits, self.shape = pack_bits(mask), mask.shape
        if self.dense is not None:
            self.dense = change(self.dense)
        self.put_on(weight)

    def snapshot(self) -> tuple[Tensor, Record, Tensor | None, Tensor | None]:
        """What `restore` needs to make this mask what it is now."""
        return self.bits.clone(), self.record, self.hidden, self.dense

    def restore(self, snapshot: tuple[Tensor, Record, Tensor | None, Tensor | None]) -> None:
        """Become what the mask was when the snapshot was taken."""
        bits, self.record, self.hidden, self.dense = snapshot
        self.bits.copy_(bits)
        self.keeper.touched = True

    def right_inverse(self, weight: Tensor) -> Tensor:
        # Identity: what is assigned is written into the original, and cleaned like any write.
        return weight

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        bits, hidden = (given.pop(f"{prefix}{name}", None) for name in ("bits", "hidden"))
        if bits is None:
            if strict:
                missing_keys.append(f"{prefix}bits")
        elif bits.shape != self.bits.shape or bits.dtype != torch.uint8:
            error_msgs.append(_mismatch(f"{prefix}bits", bits, torch.uint8, self.bits.shape))
        else:
            if self.bits.is_meta or local_metadata.get("assign_to_params_buffers", False):
                self.bits = bits
            else:
                self.bits.copy_(bits)
            self.hidden = None if hidden is None else hidden.to(self.bits.device, copy=True)
        own = {name: self._buffers.pop(name) for name in ("bits", "hidden")}
        try:  # what is left: the dense weight
            super()._load_from_state_dict(
                given,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        finally:
            self._buffers = {**own, **self._buffers}


def _mismatch(key: str, got: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> str:
    return (
        f"size mismatch for {key}: expected {dtype} {tuple(shape)}, got {got.dtype} "
        f"{tuple(got.shape)}"
    )


def _is_watched() -> bool:
    """Whether something follows what is computed: a transform, a tracer, a compiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _clean_before_saving(chain: Any, prefix: str, keep_vars: bool) -> None:
    """A hook: what a `state_dict` holds has the zeros."""
    for mask in chain:
        if isinstance(mask, Mask):
            mask.makes_ready(chain.original)


def _pack_before_loading(
    chain: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """A hook: a state from before there were bits is read as one with them."""
    own, key = chain[0], f"{prefix}0.mask"
    mask, original = state_dict.get(key), state_dict.get(f"{prefix}original")
    if not isinstance(own, Mask) or mask is None or f"{prefix}0.bits" in state_dict:
        return
    del state_dict[key]
    if mask.shape != own.shape or mask.dtype != torch.bool:
        error_msgs.append(_mismatch(key, mask, torch.bool, own.shape))
        state_dict[f"{prefix}0.bits"] = own.bits
        return
    state_dict[f"{prefix}0.bits"] = pack_bits(mask)
    if own.hidden is not None and original is not None and original.shape == own.shape:
        hidden = pack_values(original, ~mask.to(original.device))
        state_dict[f"{prefix}0.hidden"] = hidden.to(own.hidden.dtype)


def _clean_after_loading(chain: Any, incompatible_keys: object) -> None:
    """A hook: what was loaded has the zeros, also where the parameter is another one now."""
    for mask in chain:
        if isinstance(mask, Mask):
            mask.put_on(chain.original)


def keep_zeros(module: nn.Module) -> None:
    """Have the masks of a module keep the zeros of the parameters that it has now."""
    if parametrize.is_parametrized(module):
        for name in cast(nn.ModuleDict, module.parametrizations):
            if (mask := mask_of(module, name)) is not None:
                mask.put_on(original_of(module, name))


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
    module: nn.Module,
    tensor: str,
    mask: Tensor,
    record: Record,
    dense: Tensor | None = None,
    *,
    reversible: bool = True,
) -> Mask:
    """Put a mask on a module's tensor, or replace the one it carries. What is kept stays.

    Args:
        dense: the weight before a method changed it, to keep beside it.
        reversible: keep what the mask prunes, where the record says that it is the dense values.

    Returns:
        the mask, of which there is one at a time.
    """
    reversible = reversible and not record.updates_weights
    weight, present = original_of(module, tensor), mask_of(module, tensor)
    if present is not None:
        present.change(weight, mask, record, reversible=reversible and present.reversible)
        if dense is not None:
            present.dense = dense
        return present
    hidden = pack_values(values_of(weight), ~mask) if reversible else None
    return put_on(module, tensor, Mask(mask, record, dense, hidden))


def put_on(module: nn.Module, tensor: str, mask: Mask) -> Mask:
    """Put a mask that is made already on a module's tensor that has none."""
    mask.__dict__["order"] = list(module._parameters)
    if parametrize.is_parametrized(module):
        held = (mask_of(module, name) for name in cast(nn.ModuleDict, module.parametrizations))
        mask.__dict__["order"] = next(
            (m.__dict__["order"] for m in held if m is not None), list(module._parameters)
        )
    own_class(module)
    # `unsafe` skips only a trial run of the mask; shapes were checked by whoever made it.
    parametrize.register_parametrization(module, tensor, mask, unsafe=True)
    install(module, tensor)
    chain = cast(nn.ModuleDict, module.parametrizations)[tensor]
    chain.register_state_dict_pre_hook(_clean_before_saving)
    chain.register_load_state_dict_pre_hook(_pack_before_loading)
    chain.register_load_state_dict_post_hook(_clean_after_loading)
    mask.put_on(original_of(module, tensor))
    around_exports(_exporting)
    return mask


def detach(module: nn.Module, tensor: str) -> None:
    """Remove a mask and leave the parameter behind it as it is, in its old place."""
    mask = mask_of(module, tensor)
    order: list[str] = []
    if mask is not None:
        order = mask.__dict__.get("order", [])
        mask.keeper.free()
    own_class(module)
    uninstall(module)
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    for name in order:  # registration had moved the parameter to the end of the state_dict
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)


@contextmanager
def _exporting(model: object) -> Iterator[None]:
    """While a model is exported its masks are bool buffers: what graph passes look for."""
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            for layer, mask in list(masked_layers(model)):
                original = original_of(layer.module, layer.tensor)
                mask.makes_ready(original)
                stack.enter_context(mask.exported(original))
        yield


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


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a sparsified model.

    Returns:
        tensor name in the plain model's `state_dict` -> bool mask of the weight's shape, True =
        kept. They are copies: give changed ones to `apply_masks`.
    """
    return {layer.key: mask.mask for layer, mask in masked_layers(model)}


@on_ordinary_tensors
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Attach given masks (True = kept) to a model, in place; what they keep is not changed.

    A tensor that has a mask gets the new one instead. Gradients flow to kept weights only. Any
    floating-point parameter of any module can carry one.

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
        own = mask.detach().to(weight.device)
        attach(layer.module, layer.tensor, own, Record("given", "given"))
    return model


@on_ordinary_tensors
def densify(model: nn.Module) -> nn.Module:
    """Take the pruning back, in place: masks go, the dense weights return bit for bit.

    For a method that changed weights (`SparseGPTSpec`) this needs `sparsify(...,
    keep_dense=True)`; for a loaded model the dense values are gone unless they were kept so, and
    after `sparsify(..., reversible=False)` too. Kept weights that were trained, or written, since
    the pruning keep what they learned. Where a spec's `permute` put channels in
    another order they stay in it: the same function, with permuted weights.

    Raises:
        MaskError: nothing is masked, or the dense weights were not kept. Nothing is changed then.
    """
    found = list(masked_layers(model))
    if not found:
        raise MaskError("densify: this model carries no torchprune masks")
    for layer, mask in found:
        if mask.dense is None and mask.hidden is None:
            raise MaskError(
                f"densify: the dense weights of {layer.name} are gone ({_why_gone(mask.record)}, "
                "or use fold(model) to go on"
            )
    for layer, mask in found:
        original = original_of(layer.module, layer.tensor)
        mask.makes_ready(original)
        detach(layer.module, layer.tensor)
        if mask.dense is not None:
            original.data = mask.dense
        else:
            mask.fill(original.data)
    return model


def _why_gone(record: Record) -> str:
    if record.updates_weights:
        return (
            f"{record.method} changed them, or they were not saved); prune with keep_dense=True to "
            "be able to go back"
        )
    return (
        "reversible=False was asked for, or they were not saved); prune with reversible=True to be "
        "able to go back"
    )


@on_ordinary_tensors
def fold(model: nn.Module) -> nn.Module:
    """Bake the masks into the weights, in place: plain modules again, zeros exact.

    The law: outputs are bit-equal before and after. Does nothing to a model without masks.
    """
    for layer, mask in list(masked_layers(model)):
        original = original_of(layer.module, layer.tensor)
        clean = mask.makes_ready(original)
        detach(layer.module, layer.tensor)
        if not clean:
            original.data = masked(original, laid_out_like(mask.mask, original))
    return model
