"""Where trials are made: the model, what was asked, what calibrates and judges, what is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from torchprune.calibration.batches import Batch
from torchprune.specs.allocation import Loss
from torchprune.specs.goals import Goal
from torchprune.specs.spec import Spec
from torchprune.structure.specs import LayerSpec, StructuredSpec
from torchprune.study.costs.damage import Judge, judging
from torchprune.study.costs.half_done import HalfDone


@dataclass(frozen=True)
class Asked:
    """What a call of `sensitivity` asks for, checked."""

    spec: Spec | StructuredSpec | LayerSpec
    units: str
    mode: str
    goals: Mapping[str, Goal]
    loss: Loss | None
    solve: bool
    probes: int
    seed: int
    progress: bool

    @property
    def exact(self) -> bool:
        return self.mode == "exact"

    @property
    def tells(self) -> tuple[Any, ...]:
        """What tells its results from others'."""
        own = (self.solve,) if self.exact else (self.probes, self.seed)
        return (self.spec, self.units, self.mode, dict(self.goals), self.loss, *own)


@dataclass(eq=False)
class Bench:
    """Where trials are made: the model, what calibrates and judges, and what is known already."""

    model: nn.Module
    asked: Asked
    batches: Sequence[Batch]
    judges: Sequence[Batch]
    file: HalfDone
    notes: list[str]
    dense_loss: float | None = None

    @contextmanager
    def judge(
        self, blocks: Mapping[str, nn.Module], modules: Sequence[nn.Module]
    ) -> Iterator[Judge]:
        """The windows, run dense."""
        with judging(self.model, blocks, modules) as judge:
            judge.look(self.judges, self.asked.loss or getattr(self.asked.spec, "loss", None))
            self.dense_loss = judge.loss
            if blocks and not judge.replays:
                self.notes.append(
                    "every trial ran the whole model: from the middle on it gives other bits"
                )
            yield judge

    def bar(self, total: int) -> Any:
        """A progress bar over trials."""
        quiet = not self.asked.progress
        return tqdm(total=total, desc="sensitivity", unit="trial", disable=quiet)
