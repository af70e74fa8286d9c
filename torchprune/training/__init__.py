"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""

from typing import TYPE_CHECKING, Any

from torchprune.training.regrowth import SET as SET
from torchprune.training.regrowth import MagnitudeRegrowth as MagnitudeRegrowth
from torchprune.training.regrowth import RigL as RigL
from torchprune.training.schedules import Constant as Constant
from torchprune.training.schedules import Cosine as Cosine
from torchprune.training.schedules import Cubic as Cubic
from torchprune.training.schedules import Iterative as Iterative
from torchprune.training.schedules import Linear as Linear
from torchprune.training.schedules import OneShot as OneShot
from torchprune.training.straight_through import StraightThrough as StraightThrough

if TYPE_CHECKING:
    from torchprune.training.callback import PruningCallback as PruningCallback

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
