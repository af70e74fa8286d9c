"""The tensors inside what a model is called with: in containers, at any depth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

Path = tuple[Any, ...]
"""The keys and positions that lead to a value."""


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor with its path, in order."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from tensors_in(one, (*path, key))
    elif isinstance(value, tuple | list):
        for place, one in enumerate(value):
            yield from tensors_in(one, (*path, place))


def mapped(value: Any, change: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """The same containers with other tensors; what holds none is the very object given."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        new = {key: mapped(one, change, (*path, key)) for key, one in value.items()}
        if all(new[key] is one for key, one in value.items()):
            return value
        return _refilled(value, new)
    if isinstance(value, tuple | list):
        made = [mapped(one, change, (*path, place)) for place, one in enumerate(value)]
        if all(a is b for a, b in zip(made, value, strict=True)):
            return value
        if hasattr(value, "_fields"):  # a named tuple takes its fields one by one
            return type(value)(*made)
        return type(value)(made)
    return value


def _refilled(value: Mapping[Any, Any], new: dict[Any, Any]) -> Any:
    if not isinstance(value, MutableMapping):
        return new
    made = copy.copy(value)
    for key, one in new.items():
        made[key] = one
    return made
