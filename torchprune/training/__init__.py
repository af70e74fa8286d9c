"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""

from typing import TYPE_CHECKING, Any

from torchprune.specs.quantize import Int4 as Int4
from torchprune.specs.quantize import Int8 as Int8
from torchprune.training.level_history import History, LevelRow
from torchprune.training.lost_zeros import lost_zeros as lost_zeros
from torchprune.training.mask_lora import MaskLoRA, add_mask_lora, merge_mask_lora, remove_mask_lora
from torchprune.training.objectives import KL, OwnLoss, SquareHead
from torchprune.training.quantized_training import quantized_aware as quantized_aware
from torchprune.training.regrowth import SET, MagnitudeRegrowth, RigL
from torchprune.training.run_records import RunError
from torchprune.training.schedules import Constant, Cosine, Cubic, Iterative, Linear, OneShot
from torchprune.training.stop_rules import Within
from torchprune.training.straight_through import StraightThrough
from torchprune.training.student_intervals import Interval
from torchprune.training.ticket_results import Round, Tickets, Trial

if TYPE_CHECKING:
    from torchprune.training.callback import PruningCallback

__all__ = [
    "KL",
    "SET",
    "Constant",
    "Cosine",
    "Cubic",
    "History",
    "Int4",
    "Int8",
    "Interval",
    "Iterative",
    "LevelRow",
    "Linear",
    "MagnitudeRegrowth",
    "MaskLoRA",
    "OneShot",
    "OwnLoss",
    "PruningCallback",
    "RigL",
    "Round",
    "RunError",
    "SquareHead",
    "StraightThrough",
    "Tickets",
    "Trial",
    "Within",
    "add_mask_lora",
    "lost_zeros",
    "merge_mask_lora",
    "quantized_aware",
    "remove_mask_lora",
]


def __getattr__(name: str) -> Any:
    if name == "PruningCallback":  # imports transformers
        from torchprune.training.callback import PruningCallback

        return PruningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
