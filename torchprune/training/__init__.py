"""Masks while models learn: schedules, regrowth, recovery, adapters and lottery tickets."""

from torchprune.training.level_history import History as History
from torchprune.training.level_history import LevelRow as LevelRow
from torchprune.training.regrowth import SET as SET
from torchprune.training.regrowth import MagnitudeRegrowth as MagnitudeRegrowth
from torchprune.training.regrowth import RigL as RigL
from torchprune.training.run_records import RunError as RunError
from torchprune.training.schedules import Constant as Constant
from torchprune.training.schedules import Cosine as Cosine
from torchprune.training.schedules import Cubic as Cubic
from torchprune.training.schedules import Iterative as Iterative
from torchprune.training.schedules import Linear as Linear
from torchprune.training.schedules import OneShot as OneShot
from torchprune.training.stop_rules import Within as Within
from torchprune.training.straight_through import StraightThrough as StraightThrough
from torchprune.training.student_intervals import Interval as Interval
from torchprune.training.ticket_results import Round as Round
from torchprune.training.ticket_results import Tickets as Tickets
from torchprune.training.ticket_results import Trial as Trial

__all__ = [
    "SET",
    "Constant",
    "Cosine",
    "Cubic",
    "History",
    "Interval",
    "Iterative",
    "LevelRow",
    "Linear",
    "MagnitudeRegrowth",
    "OneShot",
    "RigL",
    "Round",
    "RunError",
    "StraightThrough",
    "Tickets",
    "Trial",
    "Within",
]
