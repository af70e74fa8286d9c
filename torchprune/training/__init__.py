"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""

from torchprune.training.iterate import prune_iteratively
from torchprune.training.level_history import History, LevelRow
from torchprune.training.level_specs import geometric
from torchprune.training.run_records import RunError
from torchprune.training.stop_rules import Within
from torchprune.training.student_intervals import Interval
from torchprune.training.ticket_results import Round, Tickets, Trial
from torchprune.training.tickets import find_ticket

__all__ = [
    "History",
    "Interval",
    "LevelRow",
    "Round",
    "RunError",
    "Tickets",
    "Trial",
    "Within",
    "find_ticket",
    "geometric",
    "prune_iteratively",
]
