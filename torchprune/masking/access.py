"""How a module gives its masked tensors: the property that stands in a parameter's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace as fx
from torch.nn.utils import parametrize

from torchprune.masking.keeper import Guarded


def own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch adds and deletes the tensor's property on the class, which a deepcopy shares: without
    this, folding a copy would take the weight away from the original.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        own = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, own)


def install(module: nn.Module, tensor: str) -> None:
    """Let a module hand out the parameter behind a mask, in place of the product with it."""
    kind, product = type(module), cast(property, vars(type(module))[tensor])
    setattr(kind, tensor, property(_getter(tensor, product.fget), product.fset))
    if isinstance(module, nn.RNNBase) and "_flat_weights" not in vars(kind):
        kind._flat_weights = property(_flat_weights, _keep_flat_weights)


def uninstall(module: nn.Module) -> None:
    """Undo what `install` did beside the tensor's own property, if no tensor needs it any more."""
    kind = type(module)
    if "_flat_weights" in vars(kind) and len(cast(Any, module.parametrizations)) == 1:
        delattr(kind, "_flat_weights")


def _getter(tensor: str, product: Any) -> Callable[[nn.Module], Tensor]:
    """Reads the parameter if all is as it was left; this is most of what a masked weight costs."""
    compiling, grad, tracing = (
        torch.compiler.is_compiling,
        torch.is_grad_enabled,
        torch._C._get_tracing_state,
    )

    def get(self: Any) -> Tensor:
        if compiling():
            return cast(Tensor, product(self))
        chain = self._modules["parametrizations"]._modules[tensor]
        weight, steps = chain._parameters["original"], chain._modules
        if len(steps) == 1 and not fx._is_fx_tracing_flag and tracing() is None:
            mask = steps["0"]
            keeper = mask.keeper
            if (
                weight is keeper.param
                and type(weight) is Guarded
                and not keeper.touched
                and weight._version == keeper.version
                and weight.data_ptr() == keeper.address
                and keeper.bits._version == keeper.bits_version
                and (keeper.hooked or not grad() or not weight.requires_grad)
            ) or mask.makes_ready(weight):
                return cast(Tensor, weight)
        return cast(Tensor, product(self))

    return get


def _flat_weights(self: Any) -> list[Tensor | None]:
    """What a recurrent net's forward reads, in place of the list of parameters that it keeps."""
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _keep_flat_weights(self: Any, weights: list[Tensor | None]) -> None:
    vars(self)["_flat_weights"] = weights
