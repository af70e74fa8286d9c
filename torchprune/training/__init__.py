"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""

from torchprune.specs.quantize import Int4 as Int4
from torchprune.specs.quantize import Int8 as Int8
from torchprune.training.lost_zeros import lost_zeros as lost_zeros
from torchprune.training.quantized_training import quantized_aware as quantized_aware
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

__all__ = [
    "SET",
    "Constant",
    "Cosine",
    "Cubic",
    "Int4",
    "Int8",
    "Iterative",
    "Linear",
    "MagnitudeRegrowth",
    "OneShot",
    "RigL",
    "StraightThrough",
    "lost_zeros",
    "quantized_aware",
]
