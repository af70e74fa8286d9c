"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""

from torchprune.training.mask_lora import MaskLoRA, add_mask_lora, merge_mask_lora, remove_mask_lora
from torchprune.training.objectives import KL, OwnLoss, SquareHead
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
    "KL",
    "SET",
    "Constant",
    "Cosine",
    "Cubic",
    "Iterative",
    "Linear",
    "MagnitudeRegrowth",
    "MaskLoRA",
    "OneShot",
    "OwnLoss",
    "RigL",
    "SquareHead",
    "StraightThrough",
    "add_mask_lora",
    "merge_mask_lora",
    "remove_mask_lora",
]
