"""Running a model's code without a trace of it: what a forward pass keeps is taken back.

Under `torch.export` a forward works with fake tensors. One that keeps some of what it made, such as
a table of positions, would keep a fake one, and fail from then on.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Iterator, MutableMapping, MutableSet
from contextlib import contextmanager
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_DEEP = 6
"""How far containers and plain objects inside an attribute are followed."""

_MANY = 10_000
"""Lists and dicts longer than this are kept as they are, but not looked into."""

_MACHINERY = frozenset(vars(nn.Module()))
"""What every module has."""

_OURS = ("torch", "torchprune", "builtins")


@contextmanager
def left_as_is(model: nn.Module) -> Iterator[None]:
    """Put back, at the end, whatever the model's own code changes of the model in between.

    Attributes, entries of dicts, lists and sets in them, and attributes of plain objects in them
    become what they were. Of classes, of the globals beside them and of cached functions only what
    holds fake tensors goes: others use these too.
    """
    kept: dict[int, _Kept] = {}
    for module in model.modules():
        _keep(vars(module), kept, _DEEP)
    spaces = [_Space(space) for space in _spaces(model)]
    try:
        yield
    finally:
        for one in kept.values():
            one.restore()
        for space in spaces:
            space.restore()


class Containers:
    """The lists, dicts, sets and deques in a model's own attributes, to be given their entries back
    after forward passes that were not run to their end.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept: dict[int, _Kept] = {}
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in _MACHINERY and isinstance(value, dict | list | set | deque):
                    _keep(value, self._kept, 1)

    def restore(self) -> None:
        """Take out what came, put back what went."""
        for one in self._kept.values():
            one.restore()


class _Kept:
    """A container and what it held."""

    def __init__(self, held: Any) -> None:
        self._held = held
        self._items = dict(held) if isinstance(held, dict) else list(held)

    def restore(self) -> None:
        held, items = self._held, self._items
        now = list(held.items()) if isinstance(items, dict) else list(held)
        before = list(items.items()) if isinstance(items, dict) else items
        if len(now) == len(before) and all(map(_same, now, before)):
            return
        held.clear()
        if isinstance(held, dict | set):
            held.update(items)
        else:
            held.extend(items)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) == 2:
        return one[0] is other[0] and one[1] is other[1]
    return one is other


def _keep(held: Any, kept: dict[int, _Kept], deep: int) -> None:
    """A container, and those in it."""
    if id(held) in kept or deep < 0:
        return
    kept[id(held)] = _Kept(held)
    if len(held) > _MANY:
        return
    for value in list(held.values()) if isinstance(held, dict) else list(held):
        if isinstance(value, dict | list | set | deque):
            _keep(value, kept, deep - 1)
        elif isinstance(value, tuple):
            for item in value[:_MANY]:
                if isinstance(item, dict | list | set | deque):
                    _keep(item, kept, deep - 1)
        elif _is_plain(value):
            _keep(vars(value), kept, deep - 1)


def _is_plain(value: Any) -> bool:
    """An object of a user's own class that keeps its state in a dict."""
    if isinstance(value, nn.Module | Tensor | type | ModuleType | FunctionType):
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def _spaces(model: nn.Module) -> list[Any]:
    """The classes of a model's modules that are not torch's, and the modules that define them."""
    classes = {
        kind
        for owner in {type(module) for module in model.modules()}
        for kind in owner.__mro__
        if kind.__module__.split(".")[0] not in _OURS
    }
    homes = {id(home): home for kind in classes if (home := sys.modules.get(kind.__module__))}
    return [*classes, *homes.values()]


class _Space:
    """A namespace that others share, and the containers in it."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._before = dict(vars(owner))
        self._inner = {
            name: _Kept(value)
            for name, value in self._before.items()
            if isinstance(value, MutableMapping | MutableSet | list | deque)
            and not name.startswith("__")
            and len(value) <= _MANY
        }

    def restore(self) -> None:
        for name, value in list(vars(self._owner).items()):
            if callable(getattr(value, "cache_clear", None)) and _is_fake(gc.get_referents(value)):
                value.cache_clear()
            if value is not self._before.get(name, _ABSENT) and _is_fake(value):
                if name in self._before:
                    setattr(self._owner, name, self._before[name])
                else:
                    delattr(self._owner, name)
        for name, kept in self._inner.items():
            if _is_fake(self._before[name]):
                kept.restore()


_ABSENT = object()


def _is_fake(value: Any, deep: int = _DEEP) -> bool:
    """Whether there is a fake tensor in it."""
    if isinstance(value, FakeTensor):
        return True
    if deep < 0:
        return False
    if isinstance(value, dict | MappingProxyType):
        value = list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque) and len(value) <= _MANY:
        return any(_is_fake(item, deep - 1) for item in value)
    if _is_plain(value) and not callable(value):
        return _is_fake(vars(value), deep - 1)
    return False
