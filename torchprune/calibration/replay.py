"""Run a module again from the state that its first run started from.

A forward may write to what it is given (a key-value cache grows, an input is added to in place) and
to what its modules keep. Before a module runs that will run again, `Replays.start` notes all of
that: contents of containers and objects by reference, and how often each tensor was written.
Tensors are copied only where a module writes to them: all of them before its first run, which shows
what it writes to, and from then on those alone.

What is not undone: writes to parameters, and to what neither the arguments nor the modules hold.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from torchprune.errors import CalibrationError

_ATOMS = (
    *(bool, int, float, complex, str, bytes, type, type(None), type(Ellipsis), slice, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.Generator),
    *(BuiltinFunctionType, FunctionType, MethodType, ModuleType),
)
"""Types of values that a forward cannot change, or that are not followed."""

_MACHINERY = frozenset(vars(nn.Module())) | {"forward"}
"""What every module has. Of it only buffers are a forward's to change."""

Path = tuple[str, ...]


def private(value: Any) -> Any:
    """A call's argument that the call may change: caches and other objects copied, tensors not."""
    if isinstance(value, (*_ATOMS, Tensor, nn.Module)):
        return value
    if type(value) in (list, tuple):
        return type(value)(private(item) for item in value)
    if type(value) is dict:
        return {key: private(item) for key, item in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:  # whatever an object of the user's makes of being copied
        return value


@dataclass(eq=False)
class Replays:
    """The runs of one module that will run again on the same arguments.

    Attributes:
        written: the tensors, by where they are, that it writes to in place; None before it ran.
    """

    name: str
    module: nn.Module
    written: set[Path] | None = None

    def start(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Start:
        """Note what the module is about to start from."""
        start = Start(self)
        start.note(("args",), args)
        start.note(("kwargs",), dict(kwargs))
        for name, module in _members(self.module, ""):
            start.note_module((name,), module)
        return start


@dataclass(eq=False)
class _Noted:
    """A tensor as it was: its writes counted, and its values if they may be written to."""

    path: Path
    tensor: Tensor
    version: int | None
    values: Tensor | None

    def changed(self) -> bool:
        if self.version is not None:
            return self.tensor._version != self.version
        same = self.values is not None and self.tensor.shape == self.values.shape
        return not (same and torch.equal(self.tensor, self.values))  # type: ignore[arg-type]


@dataclass(eq=False)
class Start:
    """What one run of a module started from; `restore` as often as it runs again."""

    replays: Replays
    _tensors: list[_Noted] = field(default_factory=list)
    _contents: list[tuple[Any, Any, Callable[[Any, Any], None]]] = field(default_factory=list)
    _met: dict[int, Any] = field(default_factory=dict)

    def restore(self) -> None:
        """Make arguments and modules what they were before the run.

        Raises:
            CalibrationError: a tensor was written to that the first run left alone.
        """
        for held, saved, put_back in self._contents:
            put_back(held, saved)
        changed = [noted for noted in self._tensors if noted.changed()]
        if self.replays.written is None:
            self.replays.written = {noted.path for noted in changed}
            self._tensors = [n for n in self._tensors if n.version is not None or n in changed]
            for noted in self._tensors:
                if noted.version is not None and noted not in changed:
                    noted.values = None
        for noted in changed:
            if noted.values is None:
                raise CalibrationError(
                    f"{self.replays.name or 'the model'}: it writes in place to "
                    f"{'.'.join(noted.path)} on some batches and not on the first, so it cannot be "
                    'run again; use sequential="layer" without reconstruct for this model'
                )
            with torch.inference_mode(noted.tensor.is_inference()), torch.no_grad():
                noted.tensor.copy_(noted.values)
            if noted.version is not None:
                noted.version = noted.tensor._version

    def note(self, path: Path, value: Any) -> None:
        """Note a value and all that it holds."""
        if isinstance(value, (*_ATOMS, nn.Module)) or id(value) in self._met:
            return
        self._met[id(value)] = value
        if isinstance(value, Tensor):
            self._note_tensor(path, value)
            return
        if isinstance(value, dict):
            self._note_items(path, value, dict(value), _put_items)
        elif isinstance(value, list):
            self._contents.append((value, list(value), _put_list))
            for at, item in enumerate(value):
                self.note((*path, str(at)), item)
        elif isinstance(value, tuple):
            for at, item in enumerate(value):
                self.note((*path, str(at)), item)
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict) and own:
            self._note_items(path, own, dict(own), _put_items)

    def note_module(self, path: Path, module: nn.Module) -> None:
        """Note a module's buffers and attributes, not those of the modules inside."""
        own = vars(module)
        kept = {key: value for key, value in own.items() if key not in _MACHINERY}
        self._note_items(path, own, kept, _put_values)
        self._note_items(path, module._buffers, dict(module._buffers), _put_values)

    def _note_items(
        self,
        path: Path,
        held: dict[Any, Any],
        saved: dict[Any, Any],
        put_back: Callable[[Any, Any], None],
    ) -> None:
        self._contents.append((held, saved, put_back))
        for key, item in saved.items():
            self.note((*path, str(key)), item)

    def _note_tensor(self, path: Path, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter) or tensor.device.type == "meta":
            return
        version = None if tensor.is_inference() else tensor._version
        written = self.replays.written
        copied = version is None or written is None or path in written
        values = tensor.detach().clone() if copied else None
        self._tensors.append(_Noted(path, tensor, version, values))


def _members(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and those inside, without what parametrizations are made of."""
    yield name, module
    for key, child in module._modules.items():
        if child is not None and not isinstance(child, ParametrizationList):
            yield from _members(child, f"{name}.{key}" if name else key)


def _put_list(held: list[Any], saved: list[Any]) -> None:
    if len(held) != len(saved) or any(a is not b for a, b in zip(held, saved, strict=True)):
        held[:] = saved


def _put_items(held: dict[Any, Any], saved: dict[Any, Any]) -> None:
    kind: Any = (
        OrderedDict if isinstance(held, OrderedDict) else dict
    )  # some forbid their own `del`
    for key in [key for key in held if key not in saved]:
        kind.__delitem__(held, key)
    _put_values(held, saved)


def _put_values(held: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """What a module was given since, by whoever prunes it, stays."""
    for key, value in saved.items():
        if key not in held or held[key] is not value:
            held[key] = value
