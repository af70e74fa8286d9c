"""Arguments that a module narrows on entry, to those of the heads that it still has.

Who hands them over goes on making them for all heads: slopes of ALiBi, masks for single heads.
Which heads are left is a buffer of the module, so that it moves and is stored with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.errors import ShrinkError
from torchprune.graph.handed import Handed, positional_names

Narrow = dict[str, dict[str, dict[str, int]]]
"""Module -> argument -> what `Narrowed` says of it, and how many units are left."""

_DIMS = 16
"""Arguments of more axes than this are none of ours."""


@dataclass(frozen=True)
class Narrowed:
    """A forward pre-hook that picks from an axis of an argument the units that are left.

    Attributes:
        name: of the argument.
        place: among the positional arguments; -1 if it is given by name alone.
        dim: how many axes the argument has.
        axis: which of them it is.
        period: how many units the axis holds as it comes.
        inner: whether it holds all of them several times over.
    """

    name: str
    place: int
    dim: int
    axis: int
    period: int
    inner: bool

    makes_arguments = True
    """It is a part of the module, and no watcher."""

    @property
    def buffer(self) -> str:
        """The name of the buffer that holds which units are left."""
        return f"kept_{self.name}"

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept: Tensor = getattr(module, self.buffer)
        if self.name in kwargs:
            return args, {**kwargs, self.name: self.picked(kwargs[self.name], kept)}
        if 0 <= self.place < len(args):
            made = self.picked(args[self.place], kept)
            return (*args[: self.place], made, *args[self.place + 1 :]), kwargs
        return args, kwargs

    def picked(self, x: Any, kept: Tensor) -> Any:
        """The argument for the units that are left. One that is the same for all stays.

        Raises:
            RuntimeError: it is not of all units.
        """
        if not isinstance(x, Tensor) or (x.dim() == self.dim and x.shape[self.axis] == 1):
            return x
        if x.dim() == self.dim and self.inner:
            whole = x.unflatten(self.axis, (-1, self.period))
            return whole.index_select(self.axis + 1, kept).flatten(self.axis, self.axis + 1)
        if x.dim() == self.dim and x.shape[self.axis] == self.period:
            return x.index_select(self.axis, kept)
        raise RuntimeError(
            f"{self.name} is expected to have {self.dim} axes and {self.period} heads on axis "
            f"{self.axis}, from which {len(kept)} are picked; got {tuple(x.shape)}"
        )


Narrowing = tuple[str, Narrowed, Tensor]
"""A module, how it narrows an argument, and which of the units that come in now it picks."""


def narrow(module: nn.Module, one: Narrowed, kept: Tensor) -> None:
    """Have a module pick units from an argument, `kept` (n,) of those that come in now.

    Raises:
        ShrinkError: the module has an attribute of the buffer's name.
    """
    earlier = next((h for h in narrowed_of(module) if h.name == one.name), None)
    if earlier is not None:  # what comes in now is what it picked
        before: Tensor = getattr(module, earlier.buffer)
        setattr(module, earlier.buffer, before[kept.to(before.device)])
        return
    if hasattr(module, one.buffer):
        raise ShrinkError(f"a {type(module).__name__} has an attribute {one.buffer!r:.80} already")
    module.register_buffer(one.buffer, kept.to(_device_of(module)))
    module.register_forward_pre_hook(one, with_kwargs=True)


def _device_of(module: nn.Module) -> torch.device:
    held = next(iter([*module.parameters(), *module.buffers()]), torch.empty(0))
    return held.device


def narrowed_of(module: nn.Module) -> Iterator[Narrowed]:
    """What a module narrows."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, Narrowed):
            yield hook


def narrowings(handed: Sequence[Handed], removed: Tensor, classes: Tensor) -> list[Narrowing]:
    """What modules have to pick when units go: module, how, and which of the units stay.

    Args:
        removed: (classes,) bool.
        classes: of labels.
    """
    found = []
    for one in handed:
        gone = removed[classes[one.labels]]
        if gone.any():
            how = Narrowed(one.name, one.place, one.dim, one.axis, len(gone), one.inner)
            found.append((one.module, how, (~gone).nonzero().flatten()))
    return found


# -- in files --------------------------------------------------------------------------------------


def record_of(model: nn.Module) -> Narrow:
    """What is narrowed in a model."""
    found: Narrow = {}
    for path, module in model.named_modules():
        for hook in narrowed_of(module):
            said = {name: int(value) for name, value in asdict(hook).items() if name != "name"}
            said["kept"] = len(getattr(module, hook.buffer))
            found.setdefault(path, {})[hook.name] = said
    return found


def narrow_as(model: nn.Module, record: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
    """Have a model narrow what a record says. Which units are left is for its buffers to hold.

    Raises:
        ShrinkError: the record names what the model does not have.
    """
    modules = dict(model.named_modules())
    for path, arguments in record.items():
        for name, said in arguments.items():
            if path not in modules or not name.isidentifier() or said.keys() != {*_SAID}:
                raise ShrinkError(f"the model has no argument {name!r:.80} of {path!r:.80}")
            module = modules[path]
            place, dim, axis, period, inner, kept = (said[key] for key in _SAID)
            names = positional_names(module)
            placed = place == (names.index(name) if name in names else -1)
            if not placed or not 0 <= axis < dim <= _DIMS or not 0 < kept <= period:
                raise ShrinkError(f"{path!r:.80}: {name!r:.80} cannot be narrowed by {said!r:.200}")
            how = Narrowed(name, place, dim, axis, period, bool(inner))
            narrow(module, how, torch.arange(kept))


_SAID = ("place", "dim", "axis", "period", "inner", "kept")
