"""What a change of the model costs: its loss and its outputs beside the dense model's, by window.

Each window is run dense once, and its blocks' outputs are kept; after a change only what follows
the first block that it touches is computed (`calibration/suffix.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.block_calls import floats_of
from torchprune.calibration.counted_rows import logits_of, rows_of
from torchprune.calibration.output_distance import divergence, output_change
from torchprune.calibration.suffix import AstrayError, Suffix, Tape, same_bits
from torchprune.errors import CalibrationError
from torchprune.specs.allocation import Loss
from torchprune.structure.scores import default_loss, loss_on

Damage = dict[str, float]
"""By name of the measure: "loss", "kl", "change"."""


@dataclass(frozen=True)
class Estimate:
    """A mean over windows, and its standard error (None of a single window)."""

    mean: float
    error: float | None = None

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")


def estimates(damages: Sequence[Damage]) -> dict[str, Estimate]:
    """The mean over windows and its standard error, of each measure."""
    found = {}
    for name in damages[0] if damages else ():
        values = [damage[name] for damage in damages]
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        found[name] = Estimate(fmean(values), error)
    return found


@dataclass(eq=False)
class _Window:
    """One batch, and what the dense model makes of it."""

    batch: Batch
    tape: Tape
    loss: float | None
    logs: Tensor | None
    outputs: list[Tensor] = field(default_factory=list)


class Judge:
    """Compares a changed model with the dense one on some windows. Use inside `judging`.

    Attributes:
        replays: whether runs begin at the first changed block; otherwise they are whole.
    """

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, nn.Module], watched: Sequence[nn.Module]
    ) -> None:
        self.model, self.replays = model, bool(blocks)
        self._suffix = Suffix(model, blocks, watched)
        self._loss: Loss | None = None
        self._windows: list[_Window] = []

    @property
    def measures(self) -> list[str]:
        """What is measured here, the most telling first."""
        window = self._windows[0]
        known = (("kl", window.logs), ("loss", window.loss), ("change", window.outputs or None))
        return [name for name, value in known if value is not None]

    @property
    def loss(self) -> float | None:
        """The dense model's mean loss."""
        losses = [window.loss for window in self._windows if window.loss is not None]
        return fmean(losses) if losses else None

    def look(self, batches: Sequence[Batch], loss: Loss | None) -> None:
        """Run the windows dense, and try whether runs can begin in the middle.

        Raises:
            CalibrationError: nothing can be measured, or the dense loss is not finite.
        """
        self._loss = loss or self._own_loss(batches[0])
        self._windows = [self._dense(batch) for batch in batches]
        if not self.measures:
            raise CalibrationError(
                f"a {type(self.model).__name__} gives no tensors to compare; pass loss=, a "
                "callable (model, batch) -> scalar"
            )
        self.replays = self.replays and self._holds(self._windows[0])

    def damage(self, modules: Sequence[nn.Module]) -> list[Damage]:
        """By window, what a change of what these modules hold costs."""
        return [self._compared(window, self._start(window, modules)) for window in self._windows]

    def _start(self, window: _Window, modules: Sequence[nn.Module]) -> int:
        if not self.replays:
            return 0
        return min(self._suffix.start_of(window.tape, module) for module in modules)

    def _own_loss(self, batch: Batch) -> Loss | None:
        """The model's own loss, if it gives one."""
        try:
            loss_on(self.model, batch, default_loss)
        except Exception:  # whatever labels that it was not made for do to it
            return None
        return default_loss

    def _run(self, batch: Batch) -> tuple[float | None, Any]:
        outputs: list[Any] = []
        handle = self.model.register_forward_hook(lambda *given: outputs.append(given[2]))
        torch.manual_seed(0)
        try:
            if self._loss is None:
                batch.run(self.model)
                return None, outputs[-1]
            value = float(loss_on(self.model, batch, self._loss))
            return value, outputs[-1] if outputs else None
        finally:
            handle.remove()

    def _dense(self, batch: Batch) -> _Window:
        (loss, out), tape = self._suffix.record(lambda: self._run(batch))
        if loss is not None and not math.isfinite(loss):
            raise CalibrationError(f"the dense model's loss on the windows is {loss}")
        logits = logits_of(out)
        if logits is None:
            kept = [t.clone() for t in floats_of(out)]
            return _Window(batch, tape, loss, None, kept)
        return _Window(batch, tape, loss, torch.log_softmax(rows_of(logits, batch), -1))

    def _holds(self, window: _Window) -> bool:
        """Whether runs from every block on give the dense model's bits."""
        expected = self._run(window.batch)
        starts = range(len(window.tape.calls) + 1)
        try:
            return all(
                same_bits(_plain(expected), _plain(self._from(window, start))) for start in starts
            )
        except AstrayError:
            return False

    def _from(self, window: _Window, start: int) -> tuple[float | None, Any]:
        return self._suffix.run_from(window.tape, start, lambda: self._run(window.batch))

    def _compared(self, window: _Window, start: int) -> Damage:
        loss, out = self._from(window, start)
        found: Damage = {}
        if window.logs is not None and (logits := logits_of(out)) is not None:
            found["kl"] = divergence(window.logs, rows_of(logits, window.batch))
        if window.loss is not None and loss is not None:
            found["loss"] = loss - window.loss
        if window.outputs:
            found["change"] = output_change(window.outputs, floats_of(out))
        return found


@contextmanager
def judging(
    model: nn.Module, blocks: Mapping[str, nn.Module], watched: Sequence[nn.Module]
) -> Iterator[Judge]:
    """A judge; eval mode, no gradients and the random numbers restored at the end."""
    with (
        modes.random_numbers_kept(model),
        modes.calibration_mode(model),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield Judge(model, blocks, watched)


def _plain(found: tuple[float | None, Any]) -> Any:
    loss, out = found
    return [torch.tensor(math.nan if loss is None else loss, dtype=torch.float64), floats_of(out)]
