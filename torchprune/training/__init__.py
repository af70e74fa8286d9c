"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""

from typing import TYPE_CHECKING, Any

from torchprune.training.regrowth import SET, MagnitudeRegrowth, RigL
from torchprune.training.schedules import Constant, Cosine, Cubic, Iterative, Linear, OneShot
from torchprune.training.straight_through import StraightThrough

if TYPE_CHECKING:
    from torchprune.training.callback import PruningCallback

__all__ = [
    "SET",
    "Constant",
    "Cosine",
    "Cubic",
    "Iterative",
    "Linear",
    "MagnitudeRegrowth",
    "OneShot",
    "PruningCallback",
    "RigL",
    "StraightThrough",
]


def __getattr__(name: str) -> Any:
    if name == "PruningCallback":  # imports transformers
        from torchprune.training.callback import PruningCallback

        return PruningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
