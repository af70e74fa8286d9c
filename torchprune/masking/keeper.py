"""Zeros that live in a parameter itself, and what keeps them there.

A masked weight is the parameter: reading it costs next to nothing, and whatever is written into it
takes effect where the mask keeps. Each access compares the parameter's version counter, address and
marks with those after the last cleaning; if they differ, what the mask prunes is made zero first.

What is caught: writes in place (also under `no_grad`, into `weight.detach()`, by `nn.init`), all
that goes through `weight.data` (the parameter's class marks every use of it), conversions, loads,
and every step of a `torch.optim` optimizer. What is not: writes through an alias of `.data`, of a
NumPy array or of a pointer that was taken before the last access and is written after it.

Only an ordinary parameter that `adopt` was told of is handed out. Whatever stands in its place (a
shard, another tensor of `functional_call`, a tracer's) is multiplied by the mask instead.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

from torchprune.masking.packing import clear

_DATA = Tensor.data
_LOCK = threading.RLock()
_KEEPERS: dict[int, weakref.ref[Keeper]] = {}
"""Of every parameter with a mask, by its id: valid while the keeper lives and holds it."""

_LEFT = "_torchprune_left"
"""Where a parameter holds the bits of a mask that is gone. What swaps modules (torchao, to train
quantized weights) takes the parameter along and drops the rest."""


class Guarded(nn.Parameter):
    """A parameter that is masked: it marks each use of `.data`, and is an ordinary one otherwise.

    Copies and saves of it are `nn.Parameter`s, but for a deepcopy, whose mask is copied too.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        if torch.compiler.is_compiling():  # which sees to the mask itself
            return self.detach()
        _mark(self)
        return values_of(self)

    @data.setter
    def data(self, values: Tensor) -> None:
        _mark(self)
        _DATA.__set__(self, values)  # type: ignore[attr-defined]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Parameter containing:\n{values_of(self).requires_grad_(self.requires_grad)!r}"


def values_of(tensor: Tensor) -> Tensor:
    """`tensor.data`, without a mark."""
    values: Tensor = _DATA.__get__(tensor)  # type: ignore[attr-defined]
    return values


def _mark(parameter: Tensor) -> None:
    keeper = keeper_of(parameter)
    if keeper is not None:
        keeper.touched = True


def keeper_of(parameter: Tensor) -> Keeper | None:
    """What keeps the zeros of a parameter, if anything does."""
    found = _KEEPERS.get(id(parameter))
    keeper = None if found is None else found()
    return keeper if keeper is not None and keeper.param is parameter else None


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter of its own memory, with values that can be written."""
    return (
        type(tensor) in (nn.Parameter, Guarded)
        and type(values_of(tensor)) is Tensor
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_inference()
    )


class Keeper:
    """What a mask remembers of the parameter that it cleaned last. Copies remember nothing.

    Attributes:
        param: the parameter, or None.
        version, address: of the parameter, after it was cleaned.
        bits, bits_version: what it was cleaned by.
        touched: whether `.data` was used since.
        hooked: whether its gradient is masked.
        part: of a shard in the parameter's place: this process's part of the bits.
    """

    __slots__ = (
        "__weakref__",
        "address",
        "bits",
        "bits_version",
        "hooked",
        "param",
        "part",
        "touched",
        "version",
    )

    def __init__(self) -> None:
        self.param: Tensor | None = None
        self.bits: Tensor | None = None
        self.version = self.address = self.bits_version = -1
        self.touched, self.hooked = True, False
        self.part: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Keeper:
        return Keeper()

    def __reduce__(self) -> tuple[Any, ...]:
        return Keeper, ()

    def __del__(self) -> None:
        # Its mask is gone, and was not taken off: the parameter may live on in another module.
        if self.param is not None and self.bits is not None and type(self.param) is Guarded:
            vars(self.param)[_LEFT] = self.bits

    def adopt(self, parameter: Tensor) -> None:
        """Keep the zeros of this parameter from now on."""
        parameter.__class__ = Guarded
        vars(parameter).pop(_LEFT, None)
        self.param, self.touched = parameter, True
        self.hooked = any(
            isinstance(h, _KeptOnly) and h.keeper() is self for h in _hooks(parameter)
        )
        _KEEPERS[id(parameter)] = weakref.ref(self)
        _after_every_step()

    def forget(self) -> None:
        """Keep nothing: another tensor may be about to come."""
        if self.param is not None and keeper_of(self.param) is self:
            del _KEEPERS[id(self.param)]
        self.param = self.bits = None

    def free(self) -> None:
        """Forget the parameter, and make it an ordinary one."""
        parameter = self.param
        self.forget()
        if parameter is None:
            return
        if type(parameter) is Guarded:
            parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        for hook in _hooks(parameter):
            if isinstance(hook, _KeptOnly) and hook.keeper() is self:
                hook.remove()
        self.hooked = False

    def is_clean(self) -> bool:
        """Whether nothing was written to the parameter, or its mask, since it was cleaned."""
        parameter, bits = self.param, self.bits
        return (
            parameter is not None
            and bits is not None
            and not self.touched
            and parameter._version == self.version
            and parameter.data_ptr() == self.address
            and bits._version == self.bits_version
        )

    def clean(self, bits: Tensor) -> None:
        """Make zero what the bits do not keep, if anything was written."""
        with _LOCK:
            parameter = self.param
            if parameter is None or (self.bits is bits and self.is_clean()):
                return
            self.version = -1  # first: meanwhile no other thread takes it for clean
            self.touched = False  # not last, so that a mark that comes meanwhile stays
            self._clear(parameter, bits)
            self.bits, self.bits_version = bits, bits._version
            self.version, self.address = parameter._version, parameter.data_ptr()

    @staticmethod
    def _clear(parameter: Tensor, bits: Tensor) -> None:
        # Not through the parameter, whose version counter tells autograd of writes: what may be
        # zeroed here was written by somebody who told it, or went by `.data` so as not to.
        with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
            values = values_of(parameter)
            if torch._debug_has_internal_overlap(values):
                values = values.clone(memory_format=torch.contiguous_format)
                _DATA.__set__(parameter, values)  # type: ignore[attr-defined]
            clear(values, bits)

    def hook(self, of_gradient: Callable[[Tensor], Tensor]) -> None:
        """Have the parameter's gradient changed so, wherever it goes."""
        with _LOCK:
            if not self.hooked and self.param is not None:
                _KeptOnly(self, of_gradient).put_on(self.param)
                self.hooked = True


# -- gradients -------------------------------------------------------------------------------------


class _KeptOnly:
    """A hook that masks a parameter's gradient. It keeps nothing alive."""

    def __init__(self, keeper: Keeper, of_gradient: Callable[[Tensor], Tensor]) -> None:
        self.keeper = weakref.ref(keeper)
        self._change = weakref.WeakMethod(of_gradient)
        self._handle: Any = None

    def put_on(self, parameter: Tensor) -> None:
        self._handle = parameter.register_hook(self)

    def remove(self) -> None:
        self._handle.remove()

    def __call__(self, gradient: Tensor) -> Tensor:
        change = self._change()
        return gradient if change is None else change(gradient)


def _hooks(parameter: Tensor) -> list[object]:
    return list((parameter._backward_hooks or {}).values())


# -- optimizers ------------------------------------------------------------------------------------

_WATCHED: list[object] = []


def _after_every_step() -> None:
    """See to it that parameters are clean right after any optimizer's step, which is as fast."""
    with _LOCK:
        if not _WATCHED:
            _WATCHED.append(optimizers.register_optimizer_step_post_hook(_stepped))
            # By their exact types optimizers tell what their joint kernels take: this class too.
            types = getattr(optimizers, "_foreach_supported_types", None)
            if isinstance(types, list):
                types.append(Guarded)


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # Momentum from before the pruning moves zeros, and some optimizers write by address.
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            keeper = keeper_of(parameter)
            if keeper is not None and keeper.bits is not None:
                keeper.touched = keeper.touched or parameter.grad is not None
                keeper.clean(keeper.bits)
            elif keeper is None and type(parameter) is Guarded:
                _clean_what_is_left(parameter)


def _clean_what_is_left(parameter: Tensor) -> None:
    """Zeros stay where a mask was, though nothing holds it any more."""
    bits = vars(parameter).get(_LEFT)
    if bits is not None:
        with _LOCK:
            Keeper._clear(parameter, bits.to(parameter.device))
