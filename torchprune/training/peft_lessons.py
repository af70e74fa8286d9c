"""peft taught about masks: its LoRA keeps zeros, and nothing is lost in silence by a merge.

As soon as peft is imported, with or without a mask in sight, some of its methods are wrapped. They
do for layers without masks what they did before. On a masked layer

- LoRA, rsLoRA and DoRA, however initialised, add their change under the mask: unmerged and merged
  outputs are equal to the bit, since one function makes both weights;
- every other adapter computes as before, a dense change beside a sparse layer. It can be merged if
  that leaves the zeros where they are, as (IA)^3 does, and is refused otherwise, before anything
  is changed. When such a one is added, a warning tells so.

Nothing here imports peft.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune.errors import MaskError
from torchprune.masking.awaited import when_imported, wrapped
from torchprune.masking.keeper import values_of
from torchprune.masking.mask import TOLD_BESIDE, Mask, beside, mask_of, original_of
from torchprune.training.adapted_weight import (
    Gains,
    Place,
    adapted,
    bias_of,
    gains_of,
    in_place,
    is_dora,
    place_of,
    row_norms,
    run,
    taken_out,
    unsupported,
)
from torchprune.training.packed_layers import refuse_packed

INSTEAD = (
    "use LoraConfig (also use_rslora, use_dora) or torchprune.training.MaskLoRA; or "
    "torchprune.fold(model) first, and have the merge fill the zeros"
)

_MERGED = "_torchprune_merged"
"""Where a layer keeps what unmerging needs: of each merge its names and gains."""

_WHOLE: ContextVar[bool] = ContextVar("whole", default=False)
"""Whether deltas are asked for as products of low rank, without the mask."""

_KEEP_ZEROS = ("IA3Layer", "HiraLayer")
"""Layers that only scale their base: what is zero stays so."""


def teach_peft() -> None:
    """Wrap peft's methods: now if it is imported, else when it is."""
    when_imported({"peft": _teach})


def _teach(peft: ModuleType) -> None:
    from importlib import import_module

    lora = import_module("peft.tuners.lora.layer")
    tuners = import_module("peft.tuners.tuners_utils")
    kinds = [lora.Linear, lora._ConvNd]
    experts = getattr(lora, "ParamWrapper", None)  # since peft 0.17
    for kind in kinds:
        wrapped(kind, "forward", _forward)
    if experts is not None:
        kinds.append(experts)
        wrapped(experts, "forward", _forward_around)
        wrapped(tuners.BaseTuner, "_inject_parameters", _injecting_parameters)
    for kind in kinds:
        wrapped(kind, "merge", _merge)
        wrapped(kind, "unmerge", _unmerge)
        wrapped(kind, "get_delta_weight", _delta)
        wrapped(kind, "update_layer", _update_layer)
        setattr(kind, TOLD_BESIDE, staticmethod(_beside))
    for kind in _kinds_of(tuners.BaseTunerLayer):
        wrapped(kind, "merge", _merging_others)
    wrapped(lora.MultiheadAttention, "__init__", _beginning_attention)
    wrapped(tuners, "check_target_module_exists", _matching)
    wrapped(tuners.BaseTuner, "inject_adapter", _injecting)
    wrapped(tuners.BaseTuner, "_replace_module", _replacing)
    for kind in (tuners.BaseTuner, *_kinds_of(tuners.BaseTuner)):
        wrapped(kind, "merge_adapter", _checked_first)
        wrapped(kind, "merge_and_unload", _checked_first)
        wrapped(kind, "add_weighted_adapter", _weighing)


def _kinds_of(kind: Any) -> Iterator[Any]:
    for child in kind.__subclasses__():
        yield child
        yield from _kinds_of(child)


# -- LoRA ------------------------------------------------------------------------------------------


def _beside(layer: Any) -> str | None:
    """Why the mask under an adapter cannot go: with it the adapter would be another."""
    if place_of(layer) is None or not layer.lora_A or unsupported(layer, layer.lora_A):
        return None
    return (
        "a LoRA of peft is on it, whose change is under the mask: merge it with "
        "model.merge_and_unload(), or take it off with model.unload()"
    )


def _forward(original: Any) -> Any:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = None if self.disable_adapters or self.merged else place_of(self)
        mixed = kwargs.get("adapter_names")
        active = [n for n in (mixed or self.active_adapters) if n in self.lora_A]
        if place is None or not active or unsupported(self, active):
            return original(self, x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in _ADAPTERS_OWN}
        if mixed is None:
            return run(place, active, x, args, kwargs)
        return _mixed(place, mixed, x, args, kwargs)

    return forward


_ADAPTERS_OWN = ("adapter_names", "alora_offsets")


def _mixed(place: Place, names: Sequence[str], x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Rows of one batch through an adapter each, or through none ("__base__")."""
    rows = {name: [i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}
    parts = {name: run(place, [name], x[chosen], args, kwargs) for name, chosen in rows.items()}
    order = torch.tensor([i for chosen in rows.values() for i in chosen], device=x.device)
    return torch.cat(list(parts.values()))[order.argsort()]


def _forward_around(original: Any) -> Any:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = None if self.disable_adapters or self.merged else place_of(self)
        if place is None or kwargs.get("adapter_names") is not None:
            return original(self, x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        with in_place(place, self.active_adapters):
            return self.base_layer(x, *args, **kwargs)

    return forward


def _delta(original: Any) -> Any:
    def get_delta_weight(self: Any, adapter: str, *args: Any, **kwargs: Any) -> Any:
        delta, place = original(self, adapter, *args, **kwargs), place_of(self)
        if place is None or _WHOLE.get() or unsupported(self, [adapter]):
            return delta
        return torch.where(place.mask.whole(delta), delta, 0)

    return get_delta_weight


def _merge(original: Any) -> Any:
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        place = place_of(self)
        wanted = self.active_adapters if adapter_names is None else adapter_names
        if place is None or isinstance(wanted, str) or unsupported(self, _held(self, wanted)):
            _merging_others(original)(self, safe_merge=safe_merge, adapter_names=adapter_names)
            return
        tuners = __import__("peft.tuners.tuners_utils", fromlist=["check_adapters_to_merge"])
        names = place.names(tuners.check_adapters_to_merge(self, adapter_names))
        if names:
            _merge_masked(place, names, safe_merge)

    return merge


def _held(layer: Any, names: Iterable[str]) -> list[str]:
    return [name for name in names if name in layer.lora_A]


@torch.no_grad()
def _merge_masked(place: Place, names: list[str], safe_merge: bool) -> None:
    layer, base = place.layer, place.base
    gains = gains_of(place, names, place.weight)
    weight, bias = adapted(place, names), _bias_with(place, names, 1.0)
    if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
        raise ValueError(f"NaNs detected in the merged weights. The adapter {names} seems broken")
    original_of(base, place.tensor).copy_(weight)
    if bias is not None:
        cast(Tensor, base.bias).copy_(bias)
    layer.merged_adapters.extend(names)
    vars(layer).setdefault(_MERGED, []).append((names, gains))


def _bias_with(place: Place, names: Iterable[str], sign: float) -> Tensor | None:
    base, added = place.base, bias_of(place, names)
    if added is None:
        return None
    if getattr(base, "bias", None) is None:
        raise RuntimeError(
            "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
        )
    bias = cast(Tensor, base.bias)
    return bias + (sign * added).to(bias.dtype)


def _unmerge(original: Any) -> Any:
    def unmerge(self: Any) -> None:
        place, records = place_of(self), vars(self).get(_MERGED, [])
        if place is None or [n for names, _ in records for n in names] != self.merged_adapters:
            original(self)  # it was merged before there was a mask, or is not
            records.clear()
            return
        if not records:
            original(self)  # says that there is nothing to do
        while records:
            names, gains = records.pop()
            _unmerge_masked(place, names, gains)

    return unmerge


@torch.no_grad()
def _unmerge_masked(place: Place, names: list[str], gains: Gains) -> None:
    layer = place.layer
    present = place.names(names)
    weight = taken_out(place, present, place.weight, {n: gains[n] for n in gains if n in present})
    original_of(place.base, place.tensor).copy_(weight)
    bias = _bias_with(place, present, -1.0)
    if bias is not None:
        cast(Tensor, place.base.bias).copy_(bias)
    del layer.merged_adapters[-len(names) :]


def _update_layer(original: Any) -> Any:
    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        result, place = original(self, adapter_name, *args, **kwargs), place_of(self)
        if place is not None and is_dora(self, adapter_name):
            magnitude = self.lora_magnitude_vector[adapter_name].weight
            if not magnitude.is_meta and not unsupported(self, [adapter_name]):
                norms = row_norms(place, adapter_name, place.weight)
                magnitude.data.copy_(norms.reshape(magnitude.shape))
        return result

    return update_layer


def _weighing(original: Any) -> Any:
    def add_weighted_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _WHOLE.set(True)  # of products of low rank the sum is one, of masked ones not
        try:
            return original(self, *args, **kwargs)
        finally:
            _WHOLE.reset(token)

    return add_weighted_adapter


# -- all others ------------------------------------------------------------------------------------


def _masks_under(layer: Any) -> list[tuple[nn.Module, str, Mask]]:
    """The masked tensors of an adapter's base layer."""
    base = layer.get_base_layer()
    if not parametrize.is_parametrized(base):
        return []
    found = ((name, mask_of(base, name)) for name in cast(nn.ModuleDict, base.parametrizations))
    return [(base, name, mask) for name, mask in found if mask is not None]


def _merging_others(original: Any) -> Any:
    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        under = _masks_under(self)
        if not under:
            return original(self, *args, **kwargs)
        with _taken_back_if_it_fails(self), ExitStack() as stack:
            for _, _, mask in under:
                stack.enter_context(mask.transparent())
            result = original(self, *args, **kwargs)
            for base, name, mask in under:
                _check_zeros(self, values_of(original_of(base, name)), mask)
        return result

    return merge


def _check_zeros(layer: Any, weight: Tensor, mask: Mask) -> None:
    filled = int(torch.count_nonzero(weight[~mask.mask]))
    if filled:
        raise MaskError(
            f"{_other_kind(layer, layer.active_adapters)} cannot be merged: {filled:,} of "
            f"{weight.numel():,} weights would be filled that the layer's mask prunes. Keep it "
            f"unmerged, or {INSTEAD}"
        )


@contextmanager
def _taken_back_if_it_fails(layer: Any) -> Iterator[None]:
    base, merged = layer.get_base_layer(), list(layer.merged_adapters)
    before = [(p, values_of(p).clone()) for p in base.parameters()]
    try:
        yield
    except BaseException:
        _put_back(layer, before, merged)
        raise


def _put_back(layer: Any, before: list[tuple[Tensor, Tensor]], merged: list[str]) -> None:
    with torch.no_grad():
        for parameter, values in before:
            parameter.data = values
    layer.merged_adapters[:] = merged


def _checked_first(original: Any) -> Any:
    """All layers merge or none."""

    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        place = 0 if original.__name__ == "merge_adapter" else 2
        names = kwargs.get("adapter_names", args[place] if len(args) > place else None)
        for layer in self.model.modules():
            if _is_other(layer, names):
                with _quietly(), _tried(layer):
                    layer.merge(adapter_names=names)
        return original(self, *args, **kwargs)

    return merge


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _tried(layer: Any) -> Iterator[None]:
    """Whatever is done to a layer is taken back."""
    base, merged = layer.get_base_layer(), list(layer.merged_adapters)
    before = [(p, values_of(p).clone()) for p in base.parameters()]
    try:
        yield
    finally:
        _put_back(layer, before, merged)


def _is_other(layer: Any, names: Iterable[str] | None = None) -> bool:
    """Whether this is an adapter on a masked layer whose change is not under the mask."""
    if not _is_adapter(layer) or not _masks_under(layer):
        return False
    wanted = layer.active_adapters if names is None else names
    return _other_kind(layer, wanted) is not None


def _is_adapter(layer: Any) -> bool:
    kind = type(layer)
    return callable(getattr(kind, "get_base_layer", None)) and hasattr(layer, "merged_adapters")


def _other_kind(layer: Any, names: Iterable[str]) -> str | None:
    """What an adapter is called that cannot be masked, or None."""
    if hasattr(type(layer), TOLD_BESIDE):
        return unsupported(layer, _held(layer, names))
    return f"{type(layer).__module__.split('.')[-2]}.{type(layer).__name__}"


# -- adding ----------------------------------------------------------------------------------------


def _injecting(original: Any) -> Any:
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *a: Any, **k: Any) -> Any:
        before = [(module, dict(module._modules)) for module in model.modules()]
        trained = [(p, p.requires_grad) for p in model.parameters()]
        refuse_packed(self, model, adapter_name)
        try:
            result = original(self, model, adapter_name, *a, **k)
            _check_added(model, adapter_name)
        except Exception as error:
            for module, children in before:
                module._modules.clear()
                module._modules.update(children)
            for parameter, flag in trained:
                parameter.requires_grad_(flag)
            if not isinstance(error, MaskError):  # peft chose the layers itself, perhaps just now
                refuse_packed(self, model, adapter_name)
            raise
        return result

    return inject_adapter


def _beginning_attention(original: Any) -> Any:
    def begin(self: Any, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        inner = [base_layer, getattr(base_layer, "out_proj", None)]
        if any(m is not None and parametrize.is_parametrized(m) for m in inner):
            raise MaskError(
                "an nn.MultiheadAttention of this model carries masks, and peft replaces its "
                "weights while it runs; use torchprune.training.MaskLoRA, or fold(model) first"
            )
        original(self, base_layer, *args, **kwargs)

    return begin


def _matching(original: Any) -> Any:
    def check_target_module_exists(config: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        if ".parametrizations." in f".{key}.":
            return False  # a mask's own name, "0", is no layer's
        return original(config, key, *args, **kwargs)

    return check_target_module_exists


def _replacing(original: Any) -> Any:
    def _replace_module(self: Any, parent: Any, name: str, new: nn.Module, child: Any) -> None:
        if parametrize.is_parametrized(new) and not hasattr(new, "base_layer"):
            setattr(parent, name, new)  # it has its weights, which cannot be assigned
        else:
            original(self, parent, name, new, child)

    return _replace_module


def _check_added(model: nn.Module, adapter: str) -> None:
    others = []
    for name, layer in model.named_modules():
        if _is_adapter(layer) and _has(layer, adapter):
            for base, tensor, _ in _masks_under(layer):
                if why := beside(base, tensor):
                    raise MaskError(f"{name}: {why}")
        if not _is_other(layer, [adapter]) or not _has(layer, adapter):
            continue
        if not _keeps_zeros(layer):
            others.append((name, layer))
    if others:
        name, layer = others[0]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.warn(
            f"the adapter {adapter!r} ({_other_kind(layer, [adapter])}) stands on masked layers, "
            f"{name}{more}: it works beside them, and a merge that would fill their zeros is "
            f"refused. To merge, {INSTEAD}",
            stacklevel=4,
        )


def _keeps_zeros(layer: Any) -> bool:
    return any(kind.__name__ in _KEEP_ZEROS for kind in type(layer).__mro__)


def check_ready(model: nn.Module, coming: set[int]) -> None:
    """Raise MaskError if an adapter stands on a masked layer, or on one of those that are about to
    be, which cannot be merged into zeros."""
    for name, layer in model.named_modules():
        if not _is_adapter(layer):
            continue
        under = id(layer.get_base_layer()) in coming or _masks_under(layer)
        adapters = [a for a in _names_on(layer) if _has(layer, a)]
        if under and not _keeps_zeros(layer) and (kind := _other_kind(layer, adapters)):
            raise MaskError(f"{name}: {kind} cannot be merged into its layer's zeros; {INSTEAD}")


def _names_on(layer: Any) -> set[str]:
    available = getattr(layer, "_get_available_adapters", None)
    return set(layer.active_adapters) if available is None else set(available())


def _has(layer: Any, adapter: str) -> bool:
    available = getattr(layer, "_get_available_adapters", None)
    return True if available is None else adapter in available()


def _injecting_parameters(original: Any) -> Any:
    """peft knows a parametrized tensor by its full name only; a part of it is enough for others."""

    def _inject_parameters(self: Any, peft_config: Any, model: nn.Module, *a: Any, **k: Any) -> Any:
        asked = list(peft_config.target_parameters)
        full = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            if parametrize.is_parametrized(module) and not path.endswith("base_layer")
            for name in cast(nn.ModuleDict, module.parametrizations)
            if mask_of(module, name) is not None
            and any(f"{path}.{name}".endswith(f".{target}") for target in asked)
        ]
        peft_config.target_parameters = [*asked, *full]
        try:
            return original(self, peft_config, model, *a, **k)
        finally:
            peft_config.target_parameters = asked

    return _inject_parameters
