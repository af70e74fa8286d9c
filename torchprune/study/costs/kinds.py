"""What kind of layer one is, and how deep: read off its name and the model's blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def kind_of(name: str, module: nn.Module) -> str:
    """The last part of a layer's name that is no number: "q_proj", "fc1"; without one, the
    module's class.

    >>> kind_of("model.layers.3.mlp.experts.7.w1", nn.Linear(1, 1))
    'w1'
    >>> kind_of("features.4", nn.Conv2d(1, 1, 1))
    'features'
    >>> kind_of("2", nn.Linear(1, 1))
    'Linear'
    """
    words = [part for part in name.split(".") if part and not part.isdigit()]
    return words[-1] if words else type(module).__name__


def depth_of(name: str, blocks: Sequence[str]) -> int | None:
    """Which of the repeated blocks, counted in the model's order, a layer is in."""
    inside = (
        at for at, block in enumerate(blocks) if name == block or name.startswith(f"{block}.")
    )
    return next(inside, None)
