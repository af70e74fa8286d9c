"""What a recovery was, for a report and for files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torchprune.specs.options import Checked


@dataclass(frozen=True)
class RecoverySpec(Checked):
    """One call of `recover`, as its record; `recover` takes these as arguments.

    Args:
        train: "weights", "norms", or the text of a `MaskLoRA(...)`.
        objective: the text of what was made small.
        effort: the level, where no minutes were given.
        minutes: the time, where one was given.
        seed: of the order of the batches.
        targets, ignore: none; a record of a run has them.
    """

    train: str = "weights"
    objective: str = "OwnLoss()"
    effort: str | None = None
    minutes: float | None = None
    seed: int = 0
    targets: str | None = None
    ignore: str | None = None

    method: ClassVar[str] = "recover"
