"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""

from torchprune.training.iterate import prune_iteratively
from torchprune.training.level_history import History, LevelRow
from torchprune.training.level_specs import geometric
from torchprune.training.run_records import RunError
from torchprune.training.stop_rules import Within

__all__ = [
    "History",
    "LevelRow",
    "RunError",
    "Within",
    "geometric",
    "prune_iteratively",
]
