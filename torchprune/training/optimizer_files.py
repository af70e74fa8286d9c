"""An optimizer's state as what files hold: tensors, and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchprune.checkpoint.progress import Facts
from torchprune.errors import SpecError


def of_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Facts]:
    """An optimizer's state, tensors apart from plain values.

    Raises:
        SpecError: it holds something else.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            key = f"optimizer.{index}.{name}"
            if type(value) is Tensor:
                tensors[key] = value
            elif isinstance(value, bool | int | float | None):
                plain[key] = value
            else:
                raise SpecError(
                    f"recover: path= cannot keep the state of a {type(optimizer).__name__}: its "
                    f"{name} is a {type(value).__name__}"
                )
    return tensors, plain


def into_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Facts
) -> None:
    """Put a state back."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain}.items():
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
