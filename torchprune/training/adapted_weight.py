"""What LoRA layers compute on masked weights: W + s * M (.) (B A), and DoRA's rescaled rows of it.

A layer here is one of peft's, read by the names that its attributes have; nothing imports peft.
The law: the unmerged weight and the merged one come from the same function, so they are one to the
bit, and both are exactly +0.0 where the mask prunes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchprune.masking.access import standing_in
from torchprune.masking.mask import Mask, mask_of, original_of
from torchprune.masking.matrices import View, is_stock, view_of
from torchprune.training.masked_sum import Sum, masked_sum, wide

Gains = dict[str, Tensor]
"""A DoRA adapter's name -> what its rows are scaled by, detached from the norm's gradient."""


@dataclass(frozen=True, eq=False)
class Place:
    """The masked tensor that a LoRA layer changes."""

    layer: Any
    base: nn.Module
    tensor: str
    mask: Mask

    @property
    def weight(self) -> Tensor:
        """As the base layer gives it, with its zeros, whatever stands in its place."""
        chain: Any = cast(nn.ModuleDict, self.base.parametrizations)[self.tensor]
        alone = not torch.compiler.is_compiling() and len(chain) == 1
        if alone and self.mask.makes_ready(chain.original):
            return cast(Tensor, chain.original)
        return cast(Tensor, chain())

    @property
    def to(self) -> Sum:
        return Sum(self.view, self.mask)

    @property
    def view(self) -> View:
        shape = original_of(self.base, self.tensor).shape
        if hasattr(self.layer, "parameter_name"):
            return _as_it_is(shape)
        return view_of(self.base, shape)

    def names(self, adapters: Iterable[str]) -> list[str]:
        """Those of some adapters that the layer has."""
        return [name for name in adapters if name in self.layer.lora_A]


def _as_it_is(shape: Sequence[int]) -> View:
    if len(shape) == 3:
        return View.of("experts", shape, [0], [1], [2])
    return View.of("linear", shape, [], [0], [1])


def place_of(layer: Any) -> Place | None:
    """Where a LoRA layer changes a masked tensor, or None if its tensor carries no mask."""
    base, tensor = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
    if "parametrizations" not in base._modules:
        return None
    mask = mask_of(base, tensor)
    return None if mask is None else Place(layer, base, tensor, mask)


def unsupported(layer: Any, adapters: Iterable[str]) -> str | None:
    """Which variant of LoRA among a layer's adapters cannot be masked, or None."""
    for name in adapters:
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None and not type(variant).__name__.startswith("Dora"):
            return type(variant).__name__.removesuffix("LinearVariant")
    groups = getattr(layer.get_base_layer(), "groups", 1)
    return "LoRA on a grouped convolution" if groups > 1 else None


# -- the weight ------------------------------------------------------------------------------------


def factors_of(place: Place, name: str) -> tuple[Tensor, Tensor, float]:
    """B, A and the scale of an adapter, as matrices of the place's view."""
    layer = place.layer
    up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
    if hasattr(layer, "parameter_name"):
        return (*_expert_factors(place, up, down), layer.scaling[name])
    if down.dim() > 2:  # a convolution's columns: positions of the kernel, then channels
        down = down.movedim(1, -1).reshape(len(down), -1)
        up = up.reshape(len(up), -1)
    return up, down, layer.scaling[name]


def _expert_factors(place: Place, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    layer = place.layer
    count = getattr(layer, "num_experts", 1)
    shape = original_of(place.base, place.tensor).shape
    if count == 1:
        return up.reshape(shape[-2], -1), down.reshape(-1, shape[-1])
    down = down.reshape(count, -1, down.shape[-1])
    up = up.reshape(len(up), -1, count).permute(2, 0, 1)
    if getattr(layer, "_did_swap_in_out_features", False):
        return up, down
    return down.mT, up.mT


def adapted(place: Place, adapters: Iterable[str]) -> Tensor:
    """The weight with these adapters' changes, as it is merged and as it is read unmerged."""
    names, weight = place.names(adapters), place.weight
    return _changed(place, names, weight, gains_of(place, names, weight))


def _changed(place: Place, names: Sequence[str], weight: Tensor, gains: Gains) -> Tensor:
    plain = [name for name in names if name not in gains]
    if not gains:
        return _plus(place, plain, weight, 1.0)
    # DoRA's factor and the sum are rounded together, at the end.
    whole = weight.to(wide(weight.dtype))
    total = _plus(place, plain, whole, 1.0)
    for name, gain in gains.items():
        total = total + gain * _plus(place, [name], whole, 1.0) - whole
    return total.to(weight.dtype)


def _plus(place: Place, names: Sequence[str], weight: Tensor, sign: float) -> Tensor:
    """The weight and plain products."""
    if not names:
        return weight
    dtype, found = wide(weight.dtype), [factors_of(place, name) for name in names]
    ups = [up if scale == 1 else up.to(dtype) * scale for up, _, scale in found]
    downs = [down.to(dtype) for _, down, _ in found]
    up = ups[0] if len(ups) == 1 else torch.cat([u.to(dtype) for u in ups], dim=-1)
    down = downs[0] if len(downs) == 1 else torch.cat(downs, dim=-2)
    return masked_sum(weight, up, down, sign, place.to)


def is_dora(layer: Any, name: str) -> bool:
    return name in getattr(layer, "lora_magnitude_vector", {})


def gains_of(place: Place, names: Iterable[str], weight: Tensor) -> Gains:
    """What DoRA scales the rows by, magnitude / norm; 1 for rows without any weight."""
    found = {}
    for name in names:
        if is_dora(place.layer, name):
            norm = row_norms(place, name, weight)
            magnitude = place.layer.lora_magnitude_vector[name].weight.reshape(-1)
            gain = torch.where(norm > 0, magnitude / torch.where(norm > 0, norm, 1), 1)
            found[name] = gain.reshape(_by_rows(place))
    return found


def row_norms(place: Place, name: str, weight: Tensor) -> Tensor:
    """The norm of each output's weights with one adapter's change, without a gradient."""
    with torch.no_grad():
        summed = _plus(place, [name], weight.detach().to(wide(weight.dtype)), 1.0)
        matrix = place.view.to_matrix(summed)[0]
        norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
        return norms


def _by_rows(place: Place) -> list[int]:
    shape = [1] * original_of(place.base, place.tensor).dim()
    shape[1 if place.view.kind == "transposed" else 0] = -1
    return shape


def change_of(place: Place, name: str) -> Tensor:
    """What one adapter alone adds to the weight: for inputs that differ from the layer's own."""
    weight = place.weight.detach()
    if not is_dora(place.layer, name):
        return _plus(place, [name], torch.zeros_like(weight), 1.0)
    changed = _changed(place, [name], weight, gains_of(place, [name], weight))
    return changed - weight


def taken_out(place: Place, names: Sequence[str], merged: Tensor, gains: Gains) -> Tensor:
    """The weight that `adapted` was made from, up to rounding."""
    if not gains:
        return _plus(place, names, merged, -1.0)
    whole = merged.to(wide(merged.dtype))
    none = torch.zeros_like(whole)
    rest = _plus(place, [name for name in names if name not in gains], whole, -1.0)
    share: Tensor | float = 1.0
    for name, gain in gains.items():
        rest = rest - gain * _plus(place, [name], none, 1.0)
        share = share + gain - 1
    return torch.where(place.mask.whole(whole), rest / share, 0).to(merged.dtype)


# -- the forward pass ------------------------------------------------------------------------------


def run(place: Place, adapters: Iterable[str], x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """What a LoRA layer gives: its base layer, with the adapted weight."""
    layer, names = place.layer, place.names(adapters)
    dropped = [n for n in names if layer.training and _drops(layer.lora_dropout[n])]
    kept = [n for n in names if n not in dropped]
    bias = bias_of(place, names)
    result = _through(place, kept, bias, x, args, kwargs)
    for name in dropped:
        inputs = layer.lora_dropout[name](x)
        result = result + _product(place.base, inputs, change_of(place, name), None)
    return result


def bias_of(place: Place, names: Iterable[str]) -> Tensor | None:
    """What adapters add to the base layer's bias (`lora_bias`), or None."""
    layer = place.layer
    found = [
        layer.lora_B[name].bias * layer.scaling[name]
        for name in names
        if layer.lora_B[name].bias is not None
    ]
    return sum(found[1:], found[0]) if found else None


def _drops(module: nn.Module) -> bool:
    return not isinstance(module, nn.Identity) and getattr(module, "p", 1.0) > 0


def _shaped(bias: Tensor, base: nn.Module) -> Tensor:
    space = base.weight.dim() - 2 if isinstance(base, nn.modules.conv._ConvNd) else 0
    return bias.reshape(-1, *[1] * space)


def _through(
    place: Place, names: Sequence[str], bias: Tensor | None, x: Tensor, args: Any, kwargs: Any
) -> Tensor:
    base = place.base
    if not args and not kwargs and is_stock(base) and _is_bare(base):
        own = cast("Tensor | None", base.bias)
        if bias is not None:
            own = bias.to(x.dtype) if own is None else own + bias.to(own.dtype)
        return _product(base, x, adapted(place, names), own)
    with in_place(place, names):  # its hooks, or a forward of its own, count
        result = place.layer.base_layer(x, *args, **kwargs)
    return cast(Tensor, result) if bias is None else result + _shaped(bias, base).to(result.dtype)


def _is_bare(module: nn.Module) -> bool:
    every = nn.modules.module
    return not (
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )


def _product(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a layer of torch's, or a Conv1D, does with a weight."""
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(base, nn.modules.conv._ConvNd):
        forward: Any = base._conv_forward
        return cast(Tensor, forward(x, weight, bias))
    if bias is None:
        return x @ weight
    flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
    return flat.view(*x.shape[:-1], weight.shape[1])


@contextmanager
def in_place(place: Place, adapters: Iterable[str]) -> Iterator[None]:
    """For a while, have the base layer read the adapted weight.

    It is made when it is read, and made anew if the layer was pruned meanwhile: a calibration does.
    """
    names = place.names(adapters)
    made: list[tuple[object, Tensor]] = []

    def make() -> Tensor:
        weight, bits = original_of(place.base, place.tensor), place.mask.bits
        stamp = weight._version, bits._version, torch.is_grad_enabled()
        if not made or made[0][0] != stamp:
            made[:] = [(stamp, adapted(place, names))]
        return made[0][1]

    if not names:
        yield
        return
    with standing_in(place.base, place.tensor, make):
        yield
