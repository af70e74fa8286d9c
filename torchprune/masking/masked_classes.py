"""The classes of modules that carry masks: one for all of a kind with the same tensors masked.

torch gives each parametrized module a class of its own, on which the tensors are properties. What
compiles repeated blocks tells modules apart by their classes, and would compile each block anew.
Here modules of one class, whose masks stand on tensors of the same names, share one.

torch's functions still add and delete properties on it, and mean one module. So its properties
stand aside on a module that has no parametrization there; what is added to it becomes such a
property, and what is deleted stays for the others.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Mapping
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Read = Callable[[Any], Tensor]
"""Reads a tensor of a module."""

_MANY = "_torchprune_shared"
"""Marks a class that modules share, in its own namespace."""

_DEPTH = "_orig_cls_mro_index"
"""Where a class that `fully_shard` made says how far from it its plain one is."""

_OF_TORCH = frozenset(("__getstate__", "__deepcopy__", _DEPTH))
"""What the class of a parametrized module holds beside its tensors."""

_NOTES = frozenset(("__module__", "__doc__", "__slotnames__", "__annotations__"))
"""What Python writes into any class, some of it when the class is first asked or copied."""

_CLASSES: weakref.WeakValueDictionary[tuple[Any, ...], type] = weakref.WeakValueDictionary()
"""By plain class, masked tensors, and tensors that carry other parametrizations alone."""

_BETWEEN: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()
"""What other libraries made of a class with masks, without them."""


class _Shared(type):
    """The class of shared classes: what torch does to one of them is meant for one module."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if _MANY not in vars(cls) or not isinstance(value, property):
            super().__setattr__(name, value)
        elif name not in vars(cls):
            for key in [key for key, kind in _CLASSES.items() if kind is cls]:
                del _CLASSES[key]  # no further module is to get it
            super().__setattr__(name, _property(name, _reader(name)))

    def __delattr__(cls, name: str) -> None:
        if _MANY not in vars(cls) or not isinstance(vars(cls).get(name), property):
            super().__delattr__(name)


def settle_class(
    module: nn.Module,
    masked: Collection[str],
    reader: Callable[[str], Read],
    further: Callable[[type], Mapping[str, Any]],
) -> None:
    """Give a parametrized module the class that fits what it carries.

    Before torch's functions, so that what they do to the class reaches no other module, with the
    tensor that is about to come among those masked; and after them.

    Args:
        masked: names of its tensors that carry masks.
        reader: of a name, what reads such a tensor.
        further: of the plain class, what else one with masked tensors holds.
    """
    if not parametrize.is_parametrized(module):
        return
    plain, own = _parts_of(module)
    if type(plain) is not type:  # which puts things of its own into every class
        own = {k: v for k, v in own.items() if k not in vars(type(plain)("", (plain,), {}))}
    others = [name for name in cast(nn.ModuleDict, module.parametrizations) if name not in masked]
    more = dict(further(plain)) if masked else {}
    key: Any = plain, frozenset(masked), frozenset(others)
    alike = set(own) <= _OF_TORCH.union(_NOTES, masked, others, more) and all(
        _is_usual(own[name]) for name in others if name in own
    )
    found = _CLASSES.get(key) if alike else None
    if found is None:
        if alike:
            own |= {_MANY: True} | {name: _property(name, _reader(name)) for name in others}
        if hasattr(plain, _DEPTH):
            own[_DEPTH] = getattr(plain, _DEPTH) + 1
        own |= {name: _property(name, reader(name)) for name in masked} | more
        kind = _shared(type(plain)) if alike else type(plain)
        found = kind(f"Parametrized{plain.__name__}", (plain,), own)
        if alike:
            _CLASSES[key] = found
    module.__class__ = found


@functools.cache
def _shared(kind: type) -> type:
    """The class of shared classes, where the plain one is of the class `kind`."""
    return _Shared if issubclass(_Shared, kind) else type("_Shared", (_Shared, kind), {})


# -- what a class holds ----------------------------------------------------------------------------


def _parts_of(module: nn.Module) -> tuple[type, dict[str, Any]]:
    """A parametrized module's plain class, and what its own one holds on account of this module.

    What other libraries make of it after that, as `fully_shard` does, comes between the two.
    """
    kind, chains = type(module), cast(nn.ModuleDict, module.parametrizations)
    first, *rest = kind.__bases__
    if not rest or not all(name in vars(kind.__bases__[-1]) for name in chains):
        return first, _own(kind, chains)
    *outer, inner = kind.__bases__
    if kind not in _BETWEEN:
        name = kind.__name__.replace("Parametrized", "", 1)
        _BETWEEN[kind] = type(name, (*outer, *inner.__bases__), _namespace(kind))
    return _BETWEEN[kind], {k: v for k, v in _own(inner, chains).items() if k not in vars(kind)}


def _own(kind: type, chains: nn.ModuleDict) -> dict[str, Any]:
    own = _namespace(kind)
    if not own.pop(_MANY, False):
        return own
    return {k: v for k, v in own.items() if not isinstance(v, property) or k in chains}


def _namespace(kind: type) -> dict[str, Any]:
    return {
        k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__", "__slotnames__")
    }


def _is_usual(value: object) -> bool:
    """Whether it is the property of a parametrized tensor, as torch or this file makes it."""
    code = getattr(getattr(value, "fget", None), "__code__", None)
    return isinstance(value, property) and code in (_code_of_torch(), _reader("").__code__)


@functools.cache
def _code_of_torch() -> CodeType:
    probe = nn.Module()
    probe.register_buffer("probe", torch.empty(0, device="meta"))
    parametrize.register_parametrization(probe, "probe", nn.Identity(), unsafe=True)
    return cast(CodeType, vars(type(probe))["probe"].fget.__code__)


# -- properties ------------------------------------------------------------------------------------


def _property(name: str, read: Read) -> property:
    def write(self: Any, value: Any) -> None:
        chain = self._modules["parametrizations"]._modules.get(name)
        if chain is None:
            vars(self)[name] = value
        else:
            chain.right_inverse(value)

    return property(read, write)


def _reader(name: str) -> Any:
    """Reads a tensor that only others parametrized."""

    def read(self: Any) -> Tensor:
        if name in self._modules["parametrizations"]._modules:
            return cast(Tensor, computed(self, name))
        return cast(Tensor, beside(self, name))

    return read


def computed(module: Any, name: str) -> Any:
    """What torch's own property computes, or remembers while it is asked to."""
    chain = module.parametrizations[name]
    if not parametrize._cache_enabled:
        return chain()
    key = id(module), name
    if key not in parametrize._cache:
        parametrize._cache[key] = chain()
    return parametrize._cache[key]


def beside(module: Any, name: str) -> Any:
    """What a module has under the name of a property that is not for it.

    Raises:
        AttributeError: nothing; or a parameter, buffer or module, which `nn.Module` goes on to find
            when a property raises this.
    """
    if name in vars(module):
        return vars(module)[name]
    raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
