"""Adapters are refused where the weight that they would change is packed."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchprune.errors import LoweringError
from torchprune.masking.adapters import FIRST_LIFT, PACKED

ALL = "all-linear"
"""What peft's configurations say for every linear layer."""


def refuse_packed(tuner: Any, model: nn.Module, adapter: str) -> None:
    """Raise LoweringError if one of peft's tuners is about to adapt a lowered layer, or to pass
    over one where it was asked for all linear layers."""
    config = tuner.peft_config[adapter]
    wanted = getattr(config, "target_modules", None)
    if not wanted:
        return
    for name, module in model.named_modules():
        if hasattr(type(module), PACKED) and (
            wanted == ALL or tuner._check_target_module_exists(config, name)
        ):
            raise LoweringError(
                f"{name} is lowered, so its weight is packed, and an adapter ({adapter!r}) has "
                f"nothing there to be added or merged to: {FIRST_LIFT}"
            )
