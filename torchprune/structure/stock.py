"""The model that a class of transformers makes of settings, without weights, and what it is like.

What a model is like is read off what was built, not off the settings: every module's class, its
tensors' sizes, and the plain values it keeps (`layer_type`, `is_sliding`, `use_rope`). Two models
that are alike in all of them compute the same function of their weights and their configuration.
"""

from __future__ import annotations

import copy
import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry
from torch.overrides import TorchFunctionMode

from torchprune.masking.plain_state import slots_of

Settings = dict[str, Any]
"""A configuration as a file holds it: numbers, words, lists, and settings inside settings."""

Trait = tuple[str, str]
"""A module's name, and what of it: its class, an attribute, a tensor."""

Traits = dict[Trait, Any]
"""-> the class, the plain value, the tensor's size."""

CLASS = "class"
"""What of a module is its class: no attribute can be called so."""


def is_configured(model: nn.Module) -> bool:
    """Whether a model is built from a transformers configuration."""
    config = getattr(model, "config", None)
    return hasattr(config, "to_dict") and hasattr(type(model), "config_class")


def settings_of(config: Any, *, whole: bool = True) -> Settings:
    """A configuration's settings as a file holds them.

    Args:
        whole: also what a file leaves out, since it is the class's default.
    """
    text = config.to_json_string(use_diff=not whole)
    found: Settings = json.loads(text, object_hook=_special)
    return found


def _special(found: dict[str, Any]) -> Any:
    """Floats that JSON has no word for, as transformers writes them."""
    return float(found["__float__"]) if found.keys() == {"__float__"} else found


def read(config: Any, settings: Settings) -> Any:
    """The configuration of the same class that a file of these settings holds.

    Raises:
        Exception: whatever the class makes of settings that contradict each other.
    """
    return type(config).from_dict(copy.deepcopy(settings))


def make(model: nn.Module, config: Any, *, buffers: bool = False) -> nn.Module:
    """What a model's class makes of a configuration, without memory for parameters.

    Args:
        buffers: have them computed; else they are without memory too.

    Raises:
        Exception: as `read`.
    """
    kind: Any = type(model)
    where = parameters_on_meta() if buffers else torch.device("meta")
    with where, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = kind(config)
    return made


# -- what it is like -------------------------------------------------------------------------------


def traits_of(model: nn.Module) -> Traits:
    """What every module of a model is, keeps and holds, the values of tensors apart.

    Modules that only training knows, as stochastic depth, are all one class; for what is computed
    whatever a file holds see `tables_of`.
    """
    found: Traits = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if _only_trains(module):
            found[path, CLASS] = nn.Identity
            continue
        found[path, CLASS] = type(module)
        for name, value in vars(module).items():
            if name in _own_of_modules():
                continue
            if (plain := _plain(value)) is not _OTHER:
                found[path, name] = plain
        lasting = {n: b for n, b in module._buffers.items() if n not in _transient(module)}
        for name, tensor in {**module._parameters, **lasting}.items():
            found[path, name] = None if tensor is None else tensor.shape
    return found


def _transient(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set


def _only_trains(module: nn.Module) -> bool:
    """Whether a module without tensors hands on what it gets, but in training."""
    if module._modules or module._parameters or module._buffers:
        return False
    given, before = torch.tensor([[1.0, -2.0], [-0.5, 7.0]]), module.training
    module.training = False
    try:
        return torch.equal(module(given), given)
    except Exception:  # one that takes other things
        return False
    finally:
        module.training = before


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The sizes of a model's lasting tensors by plain name."""
    return {
        key: tuple(slot.tensor.shape)
        for key, slot in slots_of(model).items()
        if slot.kind != "transient"
    }


def unlike(want: Traits, got: Traits) -> list[Trait]:
    """Where two models differ, in the order of the first."""
    return [key for key in {**want, **got} if want.get(key, _OTHER) != got.get(key, _OTHER)]


def tables_of(model: nn.Module) -> dict[str, Tensor]:
    """Buffers outside the `state_dict` by name: what a class computes whatever a file holds."""
    return {key: slot.tensor for key, slot in slots_of(model).items() if slot.kind == "transient"}


class Table(tuple[Any, ...]):
    """The keys and the values of a mapping that a module keeps."""


@dataclass(frozen=True, eq=False)
class Real:
    """A float that a module keeps: NaN equals itself, and what rounding makes of it is no other."""

    value: float

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Real):
            return False
        return math.isclose(self.value, other.value, rel_tol=1e-9) or (
            math.isnan(self.value) and math.isnan(other.value)
        )

    def __hash__(self) -> int:
        return 0  # near ones are equal

    def __repr__(self) -> str:
        return f"{self.value:.6g}"


_OTHER = object()
_PLAIN = (bool, int, str, type(None), torch.dtype)


def _plain(value: Any) -> Any:
    """A value to compare, if it is a plain one; else `_OTHER`."""
    if isinstance(value, float):
        return Real(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return value.__module__, value.__qualname__
    if isinstance(value, Mapping):
        pair = _all_plain(value.keys()), _all_plain(value.values())
        return _OTHER if _OTHER in pair else Table(pair)
    if isinstance(value, list | tuple):
        return _all_plain(value)
    if isinstance(value, set | frozenset):
        return _all_plain(sorted(value, key=repr))
    return _OTHER


def _all_plain(values: Iterable[Any]) -> Any:
    plain = tuple(map(_plain, values))
    return _OTHER if any(value is _OTHER for value in plain) else plain


@lru_cache(maxsize=1)
def _own_of_modules() -> frozenset[str]:
    return frozenset(vars(nn.Module()))


# -- without memory --------------------------------------------------------------------------------


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, which most parameters are made by, allocates nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that this thread registers have no memory, or lose it at once; buffers have."""
    thread = threading.get_ident()

    def emptied(_: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch's annotation forgets that a hook may return what is to be registered instead.
    hook = registry.register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        with torch.device("cpu"), _EmptyOnMeta():
            yield
    finally:
        hook.remove()
