"""How a module gives its masked tensors: the property that stands in a parameter's place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _get_tracing_state
from torch.compiler import is_compiling
from torch.fx import _symbolic_trace as fx
from torch.nn.utils import parametrize

from torchprune.errors import MaskError
from torchprune.masking.keeper import Guarded
from torchprune.masking.masked_classes import beside, computed, settle_class
from torchprune.masking.shards import settle_at

_HANDED = "_torchprune_handed_"
"""Begins the names of what a module keeps of the masked tensors that it handed out."""

_INSTEAD = "_torchprune_instead_"
"""Begins the names of how often a module hands out something in place of masked tensors."""

_FLAT = "_flat_weights"
"""Where a recurrent net keeps a list of its parameters, which its forward reads."""


class _Handed(tuple[Any, ...]):
    """What was handed out. A copy of the module begins without: it has tensors of its own, and
    export copies modules that hold tensors without values."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def settle(module: nn.Module, masked: Collection[str]) -> None:
    """Let a module hand out the parameters behind its masks, in place of products with them.

    Before torch's functions add or remove a parametrization, with what is about to come among those
    masked, and after.

    Args:
        masked: the names of its tensors that carry masks.
    """
    settle_class(module, masked, _getter, _further)


def _further(plain: type) -> dict[str, Any]:
    """What the class of a module with masks holds beside its tensors."""
    flat = {_FLAT: property(_flat_weights, _keep_flat_weights)}
    return {
        "register_parameter": _refuse_another,
        "__new__": _making(plain),
        **(flat if issubclass(plain, nn.RNNBase) else {}),
    }


def _refuse_another(self: Any, name: str, param: nn.Parameter | None) -> None:
    """In place of `register_parameter`, which does not know of masks: it would leave a half."""
    if name in self._modules.get("parametrizations", {}):
        raise MaskError(
            f"the {name} of a {type(self).__name__.removeprefix('Parametrized')} carries a mask, "
            "and another parameter was to take its place; to quantize it, or replace it, call "
            "torchprune.fold(model) first, which keeps the zeros"
        )
    forget_handed(self, name)
    for kind in type(self).__mro__:
        own = vars(kind).get("register_parameter")
        if own is not None and own is not _refuse_another:
            own(self, name, param)
            return


def _making(ordinary: type) -> Any:
    """Have `type(module)(...)`, as adapters make layers of the same kind, make an ordinary one."""

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return ordinary(*args, **kwargs)
        return object.__new__(cls)  # a copy's, which fills it in itself

    return staticmethod(make)


def forget_handed(module: nn.Module, tensor: str) -> None:
    """Have the next access look anew: something else was put on the tensor."""
    vars(module).pop(_HANDED + tensor, None)


_STANDING: ContextVar[Mapping[tuple[int, str], Callable[[], Tensor]]] = ContextVar("standing")
"""What is handed out in place of masked tensors, by module and name: in this thread, or in this
coroutine of a calibration, and in no other."""


@contextmanager
def standing_in(module: nn.Module, tensor: str, make: Callable[[], Tensor]) -> Iterator[None]:
    """For a while, have a module hand out what `make` makes in a masked tensor's place."""
    known, place = vars(module), _INSTEAD + tensor
    forget_handed(module, tensor)
    known[place] = known.get(place, 0) + 1
    token = _STANDING.set({**_STANDING.get({}), (id(module), tensor): make})
    try:
        yield
    finally:
        _STANDING.reset(token)
        known[place] -= 1
        if not known[place]:
            del known[place]


def _getter(tensor: str) -> Callable[[nn.Module], Tensor]:
    """Reads the parameter if all is as it was left; this is most of what a masked weight costs.

    Between two reads a whole model's weights pass the processor's caches, so each object on the way
    is fetched from memory: what is needed is kept in one place, beside the module's own attributes.
    Its cells are strings, so that compiled code may serve many modules.
    """
    place, instead = _HANDED + tensor, _INSTEAD + tensor

    def get(self: Any) -> Tensor:
        if is_compiling():
            if instead in self.__dict__ and (make := _STANDING.get({}).get((id(self), tensor))):
                return make()
            if tensor not in self._modules["parametrizations"]._modules:
                return cast(Tensor, beside(self, tensor))
            return cast(Tensor, self.parametrizations[tensor]())
        known = self.__dict__.get(place)
        if known is not None:
            parameters, steps, weight, keeper = known
            if (
                weight is keeper.param
                and not keeper.touched
                and parameters.get("original") is weight
                and len(steps) == 1
                and type(weight) is Guarded
                and weight._version == keeper.version
                and weight.data_ptr() == keeper.address
                and keeper.bits._version == keeper.bits_version
                and (keeper.hooked or not is_grad_enabled() or not weight.requires_grad)
                and not fx._is_fx_tracing_flag
                and _get_tracing_state() is None
            ):
                return cast(Tensor, weight)
        aside = instead in self.__dict__
        if aside and (make := _STANDING.get({}).get((id(self), tensor))) is not None:
            return make()
        chain = self._modules["parametrizations"]._modules.get(tensor)
        if chain is None:
            return cast(Tensor, beside(self, tensor))
        weight, steps = chain._parameters["original"], chain._modules
        if not fx._is_fx_tracing_flag and _get_tracing_state() is None:
            mask = steps["0"]
            if len(steps) == 1:
                if mask.makes_ready(weight):
                    kept = chain._parameters, steps, weight, mask.keeper
                    self.__dict__[place] = None if aside else _Handed(kept)
                    return cast(Tensor, weight)
            elif not parametrize._cache_enabled and mask.makes_ready(weight):
                for step in list(steps.values())[1:]:
                    weight = step(weight)
                return cast(Tensor, weight)
        settle_at(chain)
        return cast(Tensor, computed(self, tensor))

    _run_as_it_is(get.__code__)
    return get


def _run_as_it_is(code: CodeType) -> None:
    """Let dynamo trace a function as part of those that call it, but not compile it for itself.

    Where it cannot trace the caller it would, anew for each module, and win nothing.
    """
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if hasattr(frames, "_FrameExecStrategy"):
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skip, skip))


def _flat_weights(self: Any) -> list[Tensor | None]:
    """What a recurrent net's forward reads, in place of the list of parameters that it keeps."""
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _keep_flat_weights(self: Any, weights: list[Tensor | None]) -> None:
    vars(self)[_FLAT] = weights
