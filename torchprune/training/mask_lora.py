"""MaskLoRA: low-rank training of pruned layers that merges exactly into the zeros."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune.errors import MaskError, TargetError
from torchprune.masking.access import forget_handed, settle
from torchprune.masking.adapters import adapter_parameters
from torchprune.masking.mask import (
    TOLD_BESIDE,
    Mask,
    mask_of,
    masked_in,
    original_of,
    steps_beside,
)
from torchprune.masking.matrices import View, view_of
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.selection import (
    Layer,
    as_selectors,
    every_layer,
    matches,
    tied_to,
)
from torchprune.specs.options import Checked, check_above_zero, check_whole
from torchprune.specs.spec import Selectors
from torchprune.training.low_rank import LowRank

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class MaskLoRA(Checked):
    """Factors under a mask, W + alpha / rank * M (.) (B A), for `add_mask_lora`.

    From PERP (Zimmer et al., arXiv 2312.15230); SQFT's SparsePEFT (arXiv 2410.03750) is the same.
    The product is formed and masked at each access, so that it can be merged without a loss; a
    change that is added beside the layer, as LoRA's is, cannot.

    Args:
        rank: of each product; less where a matrix is smaller.
        alpha: the change is scaled by alpha / rank.
        targets: which layers, as in a spec; also such as carry no mask. Default: every tensor of
            two or more axes that carries one.
        seed: of A. B starts at zero, so that the model's outputs are what they were.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Selectors | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("MaskLoRA", "rank", self.rank)
        check_above_zero("MaskLoRA", "alpha", self.alpha)


@on_ordinary_tensors
def add_mask_lora(model: nn.Module, options: MaskLoRA | None = None) -> list[nn.Parameter]:
    """Put factors on a model's masked tensors, in place; the outputs stay as they are, bit for bit.

    The tensors under the factors are frozen until the factors go; what else is trained is left to
    the caller. A fused or grouped tensor has one pair of factors for each of its matrices.

    Returns:
        the factors, to be given to an optimizer: A, B of each tensor in turn, float32 at least.

    Raises:
        MaskError: nothing is masked, factors are on it already, or a tensor cannot carry any.
        TargetError: a selector matches nothing. Nothing is changed then.
    """
    options = options or MaskLoRA()
    chosen = _chosen(model, options)
    generator = torch.Generator().manual_seed(options.seed)
    factors: list[nn.Parameter] = []
    for layer in chosen:
        step = _made(layer, options, generator)
        _put_on(layer, step)
        factors += [step.A, step.B]
    return factors


@on_ordinary_tensors
def merge_mask_lora(model: Model) -> Model:
    """Add each product to its weight, in place, and take the factors off.

    The law: outputs are bit-equal before and after, the mask's zeros are still exactly zero.

    Raises:
        MaskError: the model carries no factors.
    """
    for layer, step in _required(model, "merge_mask_lora"):
        weight = original_of(layer.module, layer.tensor)
        with torch.no_grad():
            weight.copy_(getattr(layer.module, layer.tensor))
        _take_off(layer, step)
    return model


@on_ordinary_tensors
def remove_mask_lora(model: Model) -> Model:
    """Take the factors off, in place, and leave the weights as they were before them.

    Raises:
        MaskError: the model carries no factors.
    """
    for layer, step in _required(model, "remove_mask_lora"):
        _take_off(layer, step)
    return model


# -- which tensors ---------------------------------------------------------------------------------


def _chosen(model: nn.Module, options: MaskLoRA) -> list[Layer]:
    layers = [layer for layer in every_layer(model) if _axes(layer) > 1]
    own = adapter_parameters(model)
    layers = [y for y in layers if id(original_of(y.module, y.tensor)) not in own]
    selectors = as_selectors(options.targets)
    if selectors:
        chosen = [y for y in layers if any(matches(s, y) for s in selectors)]
        for selector in selectors:
            if not any(matches(selector, y) for y in layers):
                raise TargetError(f"MaskLoRA: targets: {selector!r} matches nothing here")
    else:
        chosen = [y for y in layers if mask_of(y.module, y.tensor) is not None]
        if not chosen:
            raise MaskError(
                "add_mask_lora: this model carries no masks; sparsify it first, or name layers in "
                "MaskLoRA(targets=...)"
            )
    ties, adapters = tied_to(model), _under_adapters(model)
    for layer in chosen:
        if layer.module in adapters:
            raise MaskError(f"add_mask_lora: {layer.name}: {adapters[layer.module]}")
        if why := _obstacle(layer, ties):
            raise MaskError(f"add_mask_lora: {layer.name}: {why}")
    return chosen


def _under_adapters(model: nn.Module) -> dict[nn.Module, str]:
    """The layers whose masks an adapter adds under already, and what to do."""
    found = {}
    for module in model.modules():
        told = getattr(type(module), TOLD_BESIDE, None)
        if told is not None and (why := told(module)):
            found[cast(Any, module).get_base_layer()] = why
    return found


def _axes(layer: Layer) -> int:
    return getattr(original_of(layer.module, layer.tensor), "ndim", 0)


def _obstacle(layer: Layer, ties: dict[int, list[str]]) -> str | None:
    module, tensor = layer.module, layer.tensor
    for step in steps_beside(module, tensor):
        ends_by = getattr(step, "ends_by", "remove it first")
        return f"its {tensor} already has a {type(step).__name__}; {ends_by}"
    weight = original_of(module, tensor)
    if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:
        return f"its {tensor} is a {type(weight).__name__}, expected a plain Parameter"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its {tensor} is {weight.dtype}; dequantize it first"
    if weight.is_meta:
        return f"its {tensor} is on the meta device and has no values"
    if weight.untyped_storage().data_ptr() in ties and mask_of(module, tensor) is None:
        return f"its {tensor} is tied to another parameter"
    return None


def _factors_on(model: nn.Module) -> Iterator[tuple[Layer, LowRank]]:
    for layer in every_layer(model):
        for step in steps_beside(layer.module, layer.tensor):
            if isinstance(step, LowRank):
                yield layer, step


def _required(model: nn.Module, what: str) -> list[tuple[Layer, LowRank]]:
    found = list(_factors_on(model))
    if not found:
        raise MaskError(f"{what}: this model carries no factors; add_mask_lora puts them on")
    return found


# -- on and off ------------------------------------------------------------------------------------


def _made(layer: Layer, options: MaskLoRA, generator: torch.Generator) -> LowRank:
    weight = cast(nn.Parameter, original_of(layer.module, layer.tensor))
    mask = mask_of(layer.module, layer.tensor)
    view = _view(layer, weight, mask)
    return LowRank(weight, view, mask, options.rank, options.alpha, generator)


def _view(layer: Layer, weight: Tensor, mask: Mask | None) -> View:
    if mask is not None and mask.record.view:
        return View.read(mask.record.view)
    return view_of(layer.module, weight.shape)


def _put_on(layer: Layer, step: LowRank) -> None:
    module, tensor = layer.module, layer.tensor
    weight = original_of(module, tensor)
    order = list(module._parameters)
    settle(module, masked_in(module))
    parametrize.register_parametrization(module, tensor, step, unsafe=True)
    settle(module, masked_in(module))
    step.__dict__["order"] = order
    weight.requires_grad_(False)
    forget_handed(module, tensor)


def _take_off(layer: Layer, step: LowRank) -> None:
    module, tensor = layer.module, layer.tensor
    weight = original_of(module, tensor)
    chain: Any = cast(nn.ModuleDict, module.parametrizations)[tensor]
    if len(chain) > 1:
        del chain[next(i for i, other in enumerate(chain) if other is step)]
    else:
        settle(module, masked_in(module))
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
        for name in step.__dict__["order"]:
            if name in module._parameters:
                module._parameters[name] = module._parameters.pop(name)
    weight.requires_grad_(step.trained)
