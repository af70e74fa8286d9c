"""Thread-wide state around calibration: grad mode, autocast, eval mode, caches.

Coroutines share their thread's state, so a batch that stops inside the model's own
`torch.no_grad()` or `torch.autocast()` must hand the driver's state back while it waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


@dataclass(frozen=True)
class Modes:
    """What a forward pass may switch for its thread."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    function_modes: int

    @staticmethod
    def now() -> Modes:
        """The thread's present state."""
        return Modes(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(
                (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d))
                for d in _AUTOCAST_DEVICES
            ),
            len(_get_current_function_mode_stack()),
        )


@contextmanager
def restored(outer: Modes) -> Iterator[None]:
    """Go back to an outer state for a while; the present one returns at the end."""
    now = Modes.now()
    inner_modes: list[TorchFunctionMode] = []
    while len(_get_current_function_mode_stack()) > outer.function_modes:
        inner_modes.append(_pop_mode())
    try:
        with ExitStack() as stack:
            if now.inference != outer.inference:
                stack.enter_context(torch.inference_mode(outer.inference))
            for have, want in zip(now.autocast, outer.autocast, strict=True):
                if have != want:
                    device, enabled, dtype = want
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            stack.enter_context(torch.set_grad_enabled(outer.grad))
            yield
    finally:
        for mode in reversed(inner_modes):
            torch.overrides._push_mode(mode)


@contextmanager
def exact() -> Iterator[None]:
    """No grad, no autocast, float32 products in full precision (no TF32, no bf16 passes)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
            for device in _AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations too small to share: waking threads for them costs more than it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Let what is drawn, on the CPU or the model's devices, leave no trace."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
        yield


@contextmanager
def eval_mode(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Eval mode, or training mode where asked; each module's own again after."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in before:
            module.training = mode


_TABLES_OF_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Run a part of a model once more by itself: whatever watches it sees each of its runs once.

    Hooks of torch's own stay: they make weights (`weight_norm`) or gather shards; and those that
    say that they make arguments.
    """
    silenced: list[tuple[dict[int, Any], dict[int, Any]]] = []
    try:
        for inner in module.modules():
            for table in (getattr(inner, name) for name in _TABLES_OF_HOOKS):
                if others := {k: hook for k, hook in table.items() if not _stays(hook)}:
                    silenced.append((table, dict(table)))
                    for key in others:
                        del table[key]
        yield
    finally:
        for table, hooks in silenced:
            table.clear()
            table.update(hooks)


def _stays(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.split(".")[0] == "torch" or getattr(hook, "makes_arguments", False)


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """No key-value caches: one would only hold every key and value until the end."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def calibration_mode(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Eval mode (or training), no key-value caches, plain Python forwards; all restored at the
    end.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it goes around the layers' own forward
        with (
            eval_mode(model, training=training),
            without_caches(model),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
