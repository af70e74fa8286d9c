"""Lowering: sparse weights take the form a runtime is fast with. `lift` undoes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from torchprune.errors import LoweringError
from torchprune.lowering import bitmask, few_rows, semi_structured
from torchprune.lowering.bitmask import DTYPES, Bitmask
from torchprune.lowering.convolutions import BitmaskConv, convolves, objection
from torchprune.lowering.kernels import operators as kernels
from torchprune.lowering.modules import BitmaskLinear
from torchprune.masking.mask import check_alone, detach, fold, mask_of, obstacle, original_of
from torchprune.masking.matrices import ConvNd, is_transposed_linear, view_of
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.packing import masked, zeros_in
from torchprune.masking.selection import (
    Layer,
    as_selectors,
    check_used,
    layers_of,
    matches,
    tied_to,
)
from torchprune.specs.spec import Selectors

Model = TypeVar("Model", bound=nn.Module)

_TRAINED = "_torchprune_trained"

TARGETS = ("bitmask", "semi_structured", "dense")

_DEVICES = {"bitmask": ("cpu", "cuda"), "semi_structured": ("cuda",)}


@dataclass(frozen=True)
class LoweredLayer:
    """One layer of a plan.

    Attributes:
        zeros: share of exact zeros among the effective weights.
        before, after: bytes of the weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: float
    before: int
    after: int


@dataclass(frozen=True)
class LoweringPlan:
    """What `lower` would do: the layers it lowers, and why it leaves the others."""

    target: str
    layers: list[LoweredLayer] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    runs_on: str = ""

    def __str__(self) -> str:
        lines = [
            f"{y.name}  {'x'.join(map(str, y.shape))}  {y.dtype}  {y.zeros:.1%} zero  "
            f"{y.before:,} -> {y.after:,} bytes"
            for y in self.layers
        ]
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left: {', '.join(names[:3])}{more}: {why}")
        before, after = sum(y.before for y in self.layers), sum(y.after for y in self.layers)
        share = f" ({after / before:.3f})" if before else ""
        lines.append(
            f"{self.target}: {len(self.layers)} layers, {before:,} -> {after:,} bytes{share}"
        )
        return "\n".join([*lines, *([self.runs_on] if self.runs_on else [])])


def plan_lowering(
    model: nn.Module,
    target: str,
    *,
    dtype: torch.dtype | None = None,
    targets: Selectors | None = None,
    ignore: Selectors | None = None,
    min_sparsity: float = 0.25,
) -> LoweringPlan:
    """What `lower` would do with the same arguments; nothing is changed. Print it."""
    return _plan(model, target, dtype, targets, ignore, min_sparsity)[0]


@on_ordinary_tensors
def lower(
    model: Model,
    target: str,
    *,
    dtype: torch.dtype | None = None,
    targets: Selectors | None = None,
    ignore: Selectors | None = None,
    min_sparsity: float = 0.25,
) -> Model:
    """Give a model's sparse weights the form a runtime wants, in place. Masks are folded.

    - "bitmask": linear layers become `BitmaskLinear`: one bit a weight and the nonzeros. On CPUs
      it is faster than dense for up to about 8 rows of input (decoding), and as fast beyond. On
      CUDA devices up to 16 rows have kernels of their own, in Triton; beyond, the weight is
      unpacked at each call and torch multiplies, which takes longer than dense. Any pattern will
      do. Convolutions that `targets` names become `BitmaskConv`: smaller, and faster where a call
      has few positions alone.
    - "semi_structured": 2:4 linear layers on a CUDA device, in float16 or bfloat16, hold torch's
      semi-structured tensors (cuSPARSELt, or CUTLASS). They stay `nn.Linear`; products with many
      rows of input are faster. With fewer than 16 they are slower than dense: there, if Triton is
      installed, the bitmask kernels multiply, by one bit more a weight and the same values. What is
      not 2:4 is left, and said.
    - "dense": masks are folded and that is all: plain modules for any runtime.

    Args:
        model: sparsified, or with zeros in its weights.
        target: "bitmask", "semi_structured" or "dense".
        dtype: of the bitmask's values: float32, float16, bfloat16, or int8 with one scale a row
            (rounded to nearest); None keeps the weight's own.
        targets, ignore: which layers, as in specs; by default every one that can be.
        min_sparsity: layers with a smaller share of zeros stay as they are.

    Returns:
        the same model. Whatever is not lowered keeps its modules, with masks folded.

    Raises:
        LoweringError: an unknown target or dtype, or nothing can be lowered: with the reasons.
            The model is then as it was.
        TargetError: a selector matches nothing.
        MaskError: a weight has another parametrization beside its mask.
    """
    check_alone("lower", model)
    plan, chosen = _plan(model, target, dtype, targets, ignore, min_sparsity)
    if target != "dense" and not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(plan.left.items())[:5])
        raise LoweringError(
            f"nothing to lower to {target!r} in this {type(model).__name__}: "
            + (why or "it has no linear layers")
        )
    places = _places(model)
    for layer in chosen:
        if target == "semi_structured":
            _compress(layer)
            continue
        packed = _pack(layer, dtype)
        if mask_of(layer.module, layer.tensor) is not None:
            detach(layer.module, layer.tensor)
        view = view_of(layer.module, cast(Tensor, layer.module.weight).shape)
        kind = BitmaskConv if isinstance(layer.module, ConvNd) else BitmaskLinear
        lowered = kind(packed, layer.module, view)
        for parent, name in places[layer.module]:
            parent._modules[name] = lowered
    fold(model)
    return model


@on_ordinary_tensors
def lift(model: Model) -> Model:
    """Undo `lower`, in place: the folded dense weights return, bit for bit (int8: as rounded).

    The modules are the ones that were there before; a model without lowered layers is left alone.
    """
    return lift_forms(model, TARGETS)


def lift_forms(model: Model, forms: Collection[str]) -> Model:
    """`lift` of the layers in some of the forms that `lower` gives; the others stay as they are."""
    for module, places in _places(model).items():
        if isinstance(module, BitmaskLinear) and "bitmask" in forms:
            origin = module.lifted()
            for parent, name in places:
                parent._modules[name] = origin
        elif "semi_structured" in forms and semi_structured.is_semi_structured(
            module._parameters.get("weight")
        ):
            dense = semi_structured.decompress(cast(Tensor, module.weight))
            few_rows.take_off(module)
            trained = module.__dict__.pop(_TRAINED, True)
            module._parameters["weight"] = nn.Parameter(dense, requires_grad=trained)
    return model


def _plan(
    model: nn.Module,
    target: str,
    dtype: torch.dtype | None,
    targets: Selectors | None,
    ignore: Selectors | None,
    min_sparsity: float,
) -> tuple[LoweringPlan, list[Layer]]:
    if target not in TARGETS:
        raise LoweringError(f"target must be {', '.join(map(repr, TARGETS))}, got {target!r}")
    if dtype not in (None, torch.int8, *DTYPES):
        raise LoweringError(
            f"dtype must be None, torch.float32, float16, bfloat16 or int8, got {dtype}"
        )
    layers = list(layers_of(model))
    wanted, unwanted = as_selectors(targets), as_selectors(ignore)
    for what, selectors in (("targets", wanted), ("ignore", unwanted)):
        for selector in selectors:
            check_used(what, selector, model, layers)
    if target == "semi_structured" and dtype is not None:
        raise LoweringError(f"semi_structured keeps each weight's dtype, got dtype={dtype}")
    if target == "dense":
        masks = sum(mask_of(y.module, y.tensor) is not None for y in layers)
        return LoweringPlan(target, runs_on=f"{masks} masks are folded; plain modules, dense"), []
    kind = semi_structured.backend()
    left: dict[str, str] = {}
    lowered: list[LoweredLayer] = []
    chosen: list[Layer] = []
    ties = tied_to(model)
    for layer in layers:
        if wanted and not any(matches(s, layer) for s in wanted):
            continue
        if any(matches(s, layer) for s in unwanted):
            left[layer.name] = "ignored"
            continue
        if why := _hindrance(layer, ties, target, asked=bool(wanted)):
            left[layer.name] = why
            continue
        weight = _effective(layer)
        zeros = zeros_in(weight) / weight.numel()
        if target == "bitmask":
            why = bitmask.obstacle(weight, min_sparsity, _DEVICES[target])
            after = _bitmask_bytes(layer, weight, zeros, dtype)
        else:
            why = semi_structured.obstacle(weight, kind)
            after = semi_structured.compressed_bytes(weight)
            after += few_rows.bytes_of(weight) if few_rows.has_kernels(weight.device) else 0
        if why:
            left[layer.name] = why
            continue
        name = str(weight.dtype).removeprefix("torch.")
        lowered.append(
            LoweredLayer(layer.name, tuple(weight.shape), name, zeros, weight.nbytes, after)
        )
        chosen.append(layer)
    runs_on = _runs_on(chosen) if target == "bitmask" else _two_of_four_on(chosen, kind.__name__)
    return LoweringPlan(target, lowered, left, runs_on), chosen


def _runs_on(chosen: list[Layer]) -> str:
    """The kernels for the devices that hold these layers' weights."""
    places = dict.fromkeys(original_of(y.module, y.tensor).device for y in chosen)
    told = dict.fromkeys(str(kernels.native(place)) for place in places or ("cpu",))
    return "\n".join(told)


def _two_of_four_on(chosen: list[Layer], kind: str) -> str:
    """What multiplies 2:4 weights."""
    places = {original_of(y.module, y.tensor).device for y in chosen}
    few = bool(places) and all(few_rows.has_kernels(place) for place in places)
    own = f", up to {few_rows.FEW} rows of input by the bitmask kernels" if few else ""
    return f"2:4 products by {kind}{own}"


def _bitmask_bytes(layer: Layer, weight: Tensor, zeros: float, dtype: torch.dtype | None) -> int:
    view = view_of(layer.module, weight.shape)
    nonzeros = round((1 - zeros) * weight.numel())
    return Bitmask.bytes_of(view.rows, view.cols, nonzeros, dtype or weight.dtype)


def _hindrance(layer: Layer, ties: dict[int, list[str]], target: str, *, asked: bool) -> str | None:
    """Why a layer's module cannot be lowered to this target, or None.

    Args:
        asked: whether a selector names it.
    """
    module = layer.module
    plain = mask_of(module, layer.tensor) is not None
    kind = type(module).__bases__[0] if plain else type(module)
    if kind.__name__ == "Conv1D" and is_transposed_linear(module):
        if target == "semi_structured":
            return "a Conv1D holds its weight the other way round; 2:4 products want a Linear"
    elif convolves(kind) and target == "bitmask":
        if not asked:
            return (
                f"a {kind.__name__} is no linear layer: as a bitmask it is smaller, and faster for "
                "few positions alone, so it is lowered where targets= names it"
            )
        if reason := objection(module):
            return reason
    elif kind is not nn.Linear:
        if isinstance(module, nn.Linear):
            return f"a {kind.__name__} may compute otherwise than a Linear"
        return f"a {kind.__name__} is no linear layer, which is what the kernels compute"
    if reason := obstacle(layer, ties):
        return reason
    weight = original_of(module, layer.tensor)
    devices = _DEVICES[target]
    if weight.device.type not in devices:
        kinds = " and ".join(kind.upper() for kind in devices)
        return f"it is on {weight.device}, and the product is for {kinds} devices"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks) or "forward" in vars(module):
        return "it carries hooks or a forward of its own, which would be lost"
    if any(name not in ("weight", "bias") for name in module._parameters):
        return "it has further parameters"
    return None


def _effective(layer: Layer) -> Tensor:
    """The weight with its mask applied, in its module's layout."""
    weight = original_of(layer.module, layer.tensor).detach()
    mask = mask_of(layer.module, layer.tensor)
    return weight if mask is None else masked(weight, mask.mask)


def _compress(layer: Layer) -> None:
    weight = semi_structured.compress(_effective(layer), semi_structured.backend())
    module = layer.module
    trained = original_of(module, layer.tensor).requires_grad
    if mask_of(module, layer.tensor) is not None:
        detach(module, layer.tensor)
    module.__dict__[_TRAINED] = trained
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if few_rows.has_kernels(weight.device):
        few_rows.put_on(cast(nn.Linear, module))


def _pack(layer: Layer, dtype: torch.dtype | None) -> Bitmask:
    weight = _effective(layer)
    (matrix,) = view_of(layer.module, weight.shape).to_matrix(weight)
    if dtype != torch.int8:
        return Bitmask.pack(matrix if dtype is None else matrix.to(dtype))
    scales = matrix.float().abs().amax(1) / 127
    scales[scales == 0] = 1.0
    rounded = (matrix.float() / scales[:, None]).round_().clamp_(-127, 127)
    return Bitmask.pack(rounded.to(torch.int8), scales)


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """For every module, the parents that hold it and under which name."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append((parent, name))
    return found
