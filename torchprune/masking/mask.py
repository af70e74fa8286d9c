"""Masks as parametrizations: attach, read, apply, take back, bake in.

The law: while a mask is attached the effective weight is `where(mask, original, 0)`, bit-equal to
the original where kept and exactly `+0.0` elsewhere, whatever the original holds there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune.errors import MaskError, SpecError, did_you_mean
from torchprune.masking.access import forget_handed, settle
from torchprune.masking.adapters import named_as_plain
from torchprune.masking.awaited import around_exports
from torchprune.masking.keeper import values_of
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.packing import masked, merge_bits, pack_bits, pack_values
from torchprune.masking.parametrization import Mask as Mask
from torchprune.masking.parametrization import Record as Record
from torchprune.masking.parametrization import laid_out_like as laid_out_like
from torchprune.masking.parametrization import mismatch
from torchprune.masking.scales import scale_of
from torchprune.masking.selection import Layer, layer_at, tied_to
from torchprune.masking.shards import (
    address_of,
    is_shard,
    local_of,
    moved,
    part_of,
    settle_at,
    whole_of,
    why_immovable,
    write,
)


def _clean_before_saving(chain: Any, prefix: str, keep_vars: bool) -> None:
    """A hook: what a `state_dict` holds has the zeros."""
    for mask in chain:
        if isinstance(mask, Mask):
            clean(mask, chain.original)


def clean(mask: Mask, weight: Tensor) -> bool:
    """Make zero what a mask prunes, if the parameter is one whose zeros can be kept."""
    return mask.clean_part(weight) if is_shard(weight) else mask.makes_ready(weight)


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
        error_msgs.append(mismatch(key, mask, torch.bool, own.shape))
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


def mask_of(module: nn.Module, tensor: str) -> Mask | None:
    """The mask on a module's tensor, or None."""
    if not parametrize.is_parametrized(module, tensor):
        return None
    chain = cast(nn.ModuleDict, module.parametrizations)[tensor]
    found = [p for p in cast(nn.ModuleList, chain) if isinstance(p, Mask)]
    return found[0] if found else None


def masked_in(module: nn.Module) -> list[str]:
    """The names of a module's own tensors that carry masks."""
    if not parametrize.is_parametrized(module):
        return []
    chains = cast(nn.ModuleDict, module.parametrizations)
    return [name for name in chains if mask_of(module, name) is not None]


def steps_beside(module: nn.Module, tensor: str) -> list[nn.Module]:
    """What else than a mask is a parametrization of a module's tensor."""
    if not parametrize.is_parametrized(module, tensor):
        return []
    chain = cast(nn.ModuleDict, module.parametrizations)[tensor]
    return [step for step in cast(nn.ModuleList, chain) if not isinstance(step, Mask)]


def beside(module: nn.Module, tensor: str) -> str | None:
    """Why a mask cannot be read or taken off as if it were alone, and what to do, or None."""
    if mask_of(module, tensor) is None:
        return None
    for step in steps_beside(module, tensor):
        how = "remove it first (torch.nn.utils.parametrize.remove_parametrizations)"
        how = getattr(step, "ends_by", how)
        kind = type(step).__name__
        return f"its {tensor} has another parametrization beside its mask, {kind}: {how}"
    return None


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
    hidden = pack_values(whole_of(weight), ~mask) if reversible else None
    return put_on(module, tensor, Mask(mask, record, dense, hidden))


def put_on(module: nn.Module, tensor: str, mask: Mask) -> Mask:
    """Put a mask that is made already on a module's tensor that has none."""
    mask.__dict__["order"] = list(module._parameters)
    if parametrize.is_parametrized(module):
        held = (mask_of(module, name) for name in cast(nn.ModuleDict, module.parametrizations))
        mask.__dict__["order"] = next(
            (m.__dict__["order"] for m in held if m is not None), list(module._parameters)
        )
    settle(module, [*masked_in(module), tensor])
    _register(module, tensor, mask)
    _sort(module, mask.__dict__["order"])
    settle(module, masked_in(module))
    chain = cast(nn.ModuleDict, module.parametrizations)[tensor]
    moved((module, tensor), (chain, "original"))
    settle_at(chain)
    chain.register_state_dict_pre_hook(_clean_before_saving)
    chain.register_load_state_dict_pre_hook(_pack_before_loading)
    chain.register_load_state_dict_post_hook(_clean_after_loading)
    mask.put_on(original_of(module, tensor))
    around_exports(_exporting)
    return mask


def _register(module: nn.Module, tensor: str, mask: Mask) -> None:
    """Have a mask stand before a tensor, and the same parameter behind it.

    torch sets the parameter to itself in between, which cuts off what hangs on its gradient, as
    DistributedDataParallel does; so another one is there meanwhile.
    """
    weight = cast(nn.Parameter, module._parameters[tensor])
    module._parameters[tensor] = nn.Parameter(values_of(weight), weight.requires_grad)
    try:
        # `unsafe` skips only a trial run of the mask; shapes were checked by whoever made it.
        parametrize.register_parametrization(module, tensor, mask, unsafe=True)
    except BaseException:
        module._parameters[tensor] = weight
        raise
    cast(nn.ModuleDict, module.parametrizations)[tensor]._parameters["original"] = weight


def _sort(module: nn.Module, order: Sequence[str]) -> None:
    """Whatever order masks came in, a `state_dict` has them in that of the parameters."""
    chains = cast(nn.ModuleDict, module.parametrizations)._modules
    for name in [name for name in order if name in chains]:
        chains[name] = chains.pop(name)


def detach(module: nn.Module, tensor: str) -> None:
    """Remove a mask and leave the parameter behind it as it is, in its old place."""
    mask = mask_of(module, tensor)
    order: list[str] = []
    if mask is not None:
        order = mask.__dict__.get("order", [])
        mask.keeper.free()
    chain = cast(nn.ModuleDict, module.parametrizations)[tensor]
    settle(module, masked_in(module))
    forget_handed(module, tensor)
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
    settle(module, masked_in(module))
    for name in order:  # registration had moved the parameter to the end of the state_dict
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)
    moved((chain, "original"), (module, tensor))


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
    if why := beside(module, tensor):
        return why
    weight = original_of(module, tensor)
    if not isinstance(weight, nn.Parameter):
        return f"its {tensor} is a {type(weight).__name__}, not a Parameter"
    if not weight.is_floating_point():
        return f"its {tensor} is {weight.dtype}; prune before quantizing"
    if is_shard(weight):
        if type(local_of(weight)) is not Tensor:
            return f"its {tensor} is a sharded {type(local_of(weight)).__name__}"
        why = None if mask_of(module, tensor) else why_immovable(module, tensor)
        if why is not None:
            return why
    elif type(weight.data) is not Tensor and type(weight) is not nn.Parameter:
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
    names = ties.get(address_of(weight), [])
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
        MaskError: nothing is masked, the dense weights were not kept, or something else stands on a
            mask. Nothing is changed then.
    """
    found = list(masked_layers(model))
    if not found:
        raise MaskError("densify: this model carries no torchprune masks")
    check_alone("densify", model)
    for layer, mask in found:
        if mask.dense is None and not mask.reversible:
            raise MaskError(
                f"densify: the dense weights of {layer.name} are gone ({_why_gone(mask.record)}, "
                "or use fold(model) to go on"
            )
    for layer, mask in found:
        original = original_of(layer.module, layer.tensor)
        clean(mask, original)
        detach(layer.module, layer.tensor)
        if is_shard(original):
            _restore_part(original, mask)
        elif mask.dense is not None:
            original.data = mask.dense
        else:
            mask.fill(original.data)
    return model


def _restore_part(shard: Tensor, mask: Mask) -> None:
    """Put what the mask keeps of the dense values into this process's part of a weight."""
    if mask.dense is not None:
        write(shard, mask.dense)
        return
    assert mask.hidden is not None
    whole = torch.zeros(mask.shape, dtype=mask.hidden.dtype, device=mask.hidden.device)
    mask.fill(whole)
    merge_bits(local_of(shard), part_of(whole, shard))


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


TOLD_BESIDE = "_torchprune_beside"
"""A class's function of a module of it: why the mask in it cannot go, or None."""


def check_alone(what: str, model: nn.Module) -> None:
    """Raise MaskError if something else than a model's masks makes its masked weights."""
    for path, module in model.named_modules():
        told = getattr(type(module), TOLD_BESIDE, None)
        if told is not None and (why := told(module)):
            raise MaskError(f"{what}: {path}: {why}")
    for layer, _ in masked_layers(model):
        if why := beside(layer.module, layer.tensor):
            raise MaskError(f"{what}: {layer.name}: {why}")


@on_ordinary_tensors
def fold(model: nn.Module) -> nn.Module:
    """Bake the masks into the weights, in place: plain modules again, zeros exact.

    The law: outputs are bit-equal before and after. Does nothing to a model without masks.

    Raises:
        MaskError: a weight has another parametrization beside its mask, such as factors of
            `MaskLoRA` that are not merged. Nothing is changed then.
    """
    check_alone("fold", model)
    for layer, mask in list(masked_layers(model)):
        original = original_of(layer.module, layer.tensor)
        has_zeros = clean(mask, original)
        detach(layer.module, layer.tensor)
        if not has_zeros and is_shard(original):
            local_of(original).masked_fill_(~part_of(mask.mask, original), 0)
        elif not has_zeros:
            original.data = masked(original, laid_out_like(mask.mask, original))
    return model
