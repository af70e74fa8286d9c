"""What modules are handed: arguments of their forward, with axes that may be narrowed on entry.

A parent makes slopes for as many heads as it counts, and hands them to each attention. They depend
on no weight, so no label says that they could be fewer; nor need they be: an attention that lost
heads can pick its own of them. So where heads meet what has a fixed size, the model is exported
again with a mark on every argument of that module, and an axis of an argument gets labels there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.graph.labels import Labels, Resolved
from torchprune.graph.values import Value

Wanted = Mapping[str, Collection[int]]
"""Module -> how many units met a fixed size in its code."""

Argument = tuple[str, str]
"""A module, and the name of an argument of its forward."""

Place = tuple[Argument, int]
"""An argument, and one of its axes."""

Role = tuple[str, int]
"""The same of all modules: the argument's name, and the axis."""


@torch.library.custom_op("torchprune::handed", mutates_args=())
def _handed(x: Tensor, module: str, name: str, place: int) -> Tensor:
    return x.clone()


_handed.register_fake(lambda x, module, name, place: torch.empty_like(x))

MARK = torch.ops.torchprune.handed.default


@dataclass(frozen=True, eq=False)
class Handed:
    """An axis of an argument on which units of a module lie.

    Attributes:
        module: the path of the module.
        name: of the argument, as its forward calls it.
        place: of the argument among the positional ones; -1 if it is given by name alone.
        dim: how many axes the argument has.
        axis: which of them it is.
        labels: (period,) of the units.
        inner: whether the axis holds them several times over, as of every row of a batch.
    """

    module: str
    name: str
    place: int
    dim: int
    axis: int
    labels: Tensor
    inner: bool

    @property
    def argument(self) -> Argument:
        return self.module, self.name

    @property
    def at(self) -> Place:
        return self.argument, self.axis


# -- marks -----------------------------------------------------------------------------------------


@contextmanager
def marks_on(model: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """Have every tensor that some modules are given pass through a mark."""

    def marked(path: str) -> Callable[[str, int, Tensor], Tensor]:
        return lambda name, place, x: MARK(x, path, name, place)

    handles = []
    for path in paths:
        hook = each_argument(marked(path))
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def each_argument(change: Callable[[str, int, Tensor], Tensor]) -> Any:
    """A hook that changes every tensor argument that has a name, which is given with its place."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = positional_names(module)

        def changed(name: str, value: Any) -> Any:
            place = names.index(name) if name in names else -1
            return change(name, place, value) if isinstance(value, Tensor) else value

        made = [changed(name, value) for name, value in zip(names, args, strict=False)]
        return (*made, *args[len(made) :]), {
            name: changed(name, value) for name, value in kwargs.items()
        }

    return hook


def positional_names(module: nn.Module) -> list[str]:
    """What a module's forward calls its positional arguments, as far as it names them."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds]


# -- labels ----------------------------------------------------------------------------------------


def hindered(labels: Labels, resolved: Resolved) -> dict[str, set[int]]:
    """Where heads met what has a fixed size: module -> how many they were."""
    found: dict[str, set[int]] = {}
    for module, line in labels.hindered:
        if bool(resolved.attended[line].any()):
            found.setdefault(module, set()).add(period_of(line))
    return found


def period_of(line: Tensor) -> int:
    """The least number of indices after which labels repeat, to the end."""
    size = len(line)
    parts = (n for n in range(1, size) if size % n == 0)
    return next((n for n in parts if torch.equal(line[n:], line[:-n])), size)


class Entries:
    """The arguments of one walk that got labels at marks.

    Args:
        wanted: how many units an axis is to hold, by module.
        banned: axes that get none.
        roles: the only ones that do, if given.
    """

    def __init__(
        self,
        wanted: Wanted,
        banned: Collection[Place] = (),
        roles: Collection[Role] | None = None,
    ) -> None:
        self._wanted, self._banned, self._roles = wanted, banned, roles
        self._found: dict[Place, Handed] = {}
        self.unlike: set[Argument] = set()
        """Arguments that are not always given in the same form."""

    def enter(
        self, labels: Labels, why: str, value: Value, module: str, name: str, place: int
    ) -> Value:
        """The argument as the module sees it. What depends on weights already stays as it is; what
        repeats one number has a fixed size from here on.
        """
        wanted = [n for n in self._wanted.get(module, ()) if n > 1]
        axes = {
            axis: max(n for n in wanted if size % n == 0)
            for axis, size in enumerate(value.shape)
            if size > 1 and any(size % n == 0 for n in wanted)
            if ((module, name), axis) not in self._banned
            and (self._roles is None or (name, axis) in self._roles)
        }
        repeating = all(labels.repeats(tag) for tag in value.tags)
        if not axes or not repeating:
            return value
        for tag in value.tags:
            labels.freeze(tag, why)
        tags = []
        for axis, period in axes.items():
            own = self._entry(labels, value, (module, name, place), axis, period)
            line = own.labels.repeat(value.shape[axis] // period)
            tags.append(line.reshape([-1 if a == axis else 1 for a in range(value.dim)]))
        return Value(value.shape, tuple(tags), value.weight)

    def _entry(
        self, labels: Labels, value: Value, where: tuple[str, str, int], axis: int, period: int
    ) -> Handed:
        key = where[:2], axis
        own = self._found.get(key)
        if own is None or (own.dim, len(own.labels)) != (value.dim, period):
            if own is not None:
                self.unlike.add(own.argument)
            own = Handed(*where, value.dim, axis, labels.new(period), False)
        own = replace(own, inner=own.inner or value.shape[axis] > period)
        self._found[key] = own
        return own

    @property
    def roles(self) -> list[Role]:
        """The axes that have labels, alike in all modules."""
        return sorted({(name, axis) for (_, name), axis in self._found})

    def used(self, resolved: Resolved, held: Tensor) -> list[Handed]:
        """Those on which units lie that may go.

        Args:
            held: (classes,) bool, those that tensors of the model hold.
        """
        return [
            one
            for one in self._found.values()
            if bool((held[resolved.classes[one.labels]] & ~resolved.frozen[one.labels]).any())
        ]
