"""Which quantized weights still hold the zeros that pruning made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchprune.errors import MaskError, did_you_mean
from torchprune.masking.packing import zeros_in


def lost_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, str]:
    """Where a quantized model is not zero any more though a mask pruned it.

    Symmetric schemes, and those with whole zero points, keep every zero: `Int8WeightOnlyConfig`,
    `IntxWeightOnlyConfig`, the int8 dynamic ones, float8. What cannot: zero points that are not
    whole (tinygemm's int4, HQQ).

    Args:
        model: folded, then quantized by `torchao.quantization.quantize_` or alike.
        masks: `torchprune.masks(model)` from before it was folded: bool by tensor name, True =
            kept. Masks of tensors that were not quantized count too.

    Returns:
        tensor name -> how many of its zeros are lost, and the scheme; or why it cannot be read.
        Empty if all zeros are there.

    Raises:
        MaskError: a name that the model does not have, or a mask of another shape.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    lost = {}
    for name, mask in masks.items():
        weight = _weight_at(model, name, tensors)
        if weight.shape != mask.shape:
            raise MaskError(
                f"{name}: expected a weight {tuple(mask.shape)} as its mask, got "
                f"{tuple(weight.shape)}"
            )
        scheme = _scheme(weight)
        values = _values(weight)
        if values is None:
            lost[name] = f"{scheme}: its values cannot be read"
            continue
        pruned = ~mask.to(values.device)
        gone = int(pruned.sum()) - zeros_in(values[pruned])
        if gone:
            lost[name] = f"{scheme}: {gone:,} of {int(pruned.sum()):,} zeros are lost"
    return lost


def _weight_at(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name in tensors:
        return tensors[name]
    path, _, tensor = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(path), tensor)
    except AttributeError:
        found = None
    if not isinstance(found, Tensor):
        raise MaskError(f"{name!r} is no tensor here{did_you_mean(name, tensors)}")
    return found


def _values(weight: Tensor) -> Tensor | None:
    """The numbers that a weight stands for, or None."""
    with torch.no_grad():
        if _kind(weight) is Tensor and not weight.is_quantized:
            return weight.detach()
        try:
            values = weight.dequantize()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return None
    return values if isinstance(values, Tensor) and values.shape == weight.shape else None


def _kind(weight: Tensor) -> type:
    return type(weight.data) if isinstance(weight, nn.Parameter) else type(weight)


def _scheme(weight: Tensor) -> str:
    """What a quantized tensor is, in a few words."""
    kind = _kind(weight)
    if kind is Tensor:
        return str(weight.dtype).removeprefix("torch.")
    target = getattr(weight, "target_dtype", None)
    point = getattr(weight, "zero_point", None)
    said = [kind.__name__]
    if isinstance(target, torch.dtype):
        said.append(str(target).removeprefix("torch."))
    if isinstance(point, Tensor) and point.is_floating_point():
        said.append("zero points that are not whole")
    return ", ".join(said)
