"""A model's state as it is now, to go back to: cheap, since tensors are shared and not copied."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchprune.masking.mask import keep_zeros

_TABLES = (
    *("_parameters", "_buffers", "_modules"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


class Snapshot:
    """What every module holds. Good as long as tensors are replaced, never written in place."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (m, type(m), dict(vars(m)), {name: dict(getattr(m, name)) for name in _TABLES})
            for m in model.modules()
        ]
        configs: dict[int, Any] = {}
        for module in model.modules():
            _note(getattr(module, "config", None), configs)
        self._configs = [(config, dict(vars(config))) for config in configs.values()]

    def restore(self) -> None:
        """Make every module and configuration what it was."""
        for module, kind, attributes, tables in self._modules:
            module.__class__ = kind
            state = vars(module)
            state.clear()
            state.update(attributes)
            for name, table in tables.items():
                held = state[name]
                held.clear()
                held.update(table)
        for module, *_ in self._modules:
            keep_zeros(module)
        for config, attributes in self._configs:
            state = vars(config)
            state.clear()
            state.update(attributes)


def _note(config: Any, found: dict[int, Any]) -> None:
    """A configuration, and those inside it."""
    if config is None or not hasattr(config, "__dict__") or id(config) in found:
        return
    found[id(config)] = config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict"):
            _note(value, found)
