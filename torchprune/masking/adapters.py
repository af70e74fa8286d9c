"""Adapters: small trained weights that stand beside a frozen layer until they are merged into it.

What is to be sparse is the layer. Its adapter is left alone, since a product of two sparse factors
is no sparse matrix, and the layer is told by the name that it has without its adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from torchprune.masking.matrices import prunable_names

PACKED = "_torchprune_packed"
"""What the class of a module whose weight is packed has, and no adapter can change."""

FIRST_LIFT = "call torchprune.lift(model) first, and torchprune.lower again when it is done"


@dataclass(frozen=True, eq=False)
class Adapted:
    """A module that is a layer with an adapter.

    Attributes:
        base: the child that is the layer; "" where the module is the layer itself.
        own: the adapter's parameters.
    """

    base: str
    own: list[nn.Parameter]


def adapted(module: nn.Module) -> Adapted | None:
    """What of a module is an adapter, or None.

    Told by peft's protocol (`get_base_layer`), or by what low-rank adapters of any make have in
    common: one frozen layer, and trained matrices that are factors of its shape and nothing else.
    """
    if callable(getattr(type(module), "get_base_layer", None)):
        layer = cast(nn.Module, module.get_base_layer())  # type: ignore[operator]
        inside = {id(p) for p in layer.parameters()}
        for name, child in module.named_children():
            if any(m is layer for m in child.modules()):
                return Adapted(name, [p for p in module.parameters() if id(p) not in inside])
        return None
    candidates = (("", module), *module.named_children())
    bases = [(name, w) for name, layer in candidates if (w := _frozen_weight(layer)) is not None]
    if len(bases) != 1:
        return None
    [(name, weight)] = bases
    layer = module.get_submodule(name)
    inside = {id(weight)} if layer is module else {id(p) for p in layer.parameters()}
    own = [p for p in module.parameters() if id(p) not in inside]
    if not _are_factors(own, weight):
        return None
    # Attention whose q_proj has an adapter and whose v_proj is frozen is none around the latter.
    others = {
        id(p) for m in module.modules() if m is not module and adapted(m) for p in m.parameters()
    }
    own = [p for p in own if id(p) not in others]
    return Adapted(name, own) if _are_factors(own, weight) else None


def _are_factors(own: list[nn.Parameter], weight: nn.Parameter) -> bool:
    """Whether what of these parameters is trained are low-rank factors of a weight."""
    spans = [_spans(p, weight.shape[:2]) for p in own if p.requires_grad and p.dim() > 1]
    return all(spans) and any(0 in a and 1 in b for a, b in permutations(spans, 2))


def _frozen_weight(module: nn.Module) -> nn.Parameter | None:
    if parametrize.is_parametrized(module, "weight"):
        chain = cast(nn.ModuleDict, module.parametrizations)["weight"]
        weight = chain._parameters.get("original")
    else:
        weight = module._parameters.get("weight")
    if weight is None or weight.requires_grad or prunable_names(module) != ("weight",):
        return None
    return weight


def _spans(factor: nn.Parameter, shape: tuple[int, ...]) -> set[int]:
    """Which axes of a matrix of this shape a low-rank factor may span."""
    rank, length = sorted(factor.shape[:2])
    if rank >= min(shape):
        return set()
    return {axis for axis, size in enumerate(shape) if size == length}


def adapter_parameters(model: nn.Module) -> set[int]:
    """The ids of all adapters' parameters in a model."""
    return {id(p) for m in model.modules() if (found := adapted(m)) for p in found.own}


def named_as_plain(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Every module once: its name, its name in the model without adapters, and itself."""
    plain = {}
    standing: dict[str, str | None] = {}
    """A module's name -> which of its children stands for it in the plain model."""
    for name, module in model.named_modules(prefix=prefix):
        parent, _, last = name.rpartition(".")
        if name == prefix:
            plain[name] = name
        elif standing[parent] == last:
            plain[name] = plain[parent]
        else:
            plain[name] = f"{plain[parent]}.{last}" if plain[parent] else last
        standing[name] = _standing_for(module)
        yield name, plain[name], module


def _standing_for(module: nn.Module) -> str | None:
    """The child that stands for a module in the plain model, if one does."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("peft."):
            if kind.__name__ == "PeftModel":
                return "base_model"
            if kind.__name__ == "BaseTuner":
                return "model"
    found = adapted(module)
    return found.base or None if found else None
