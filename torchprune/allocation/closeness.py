"""What a model's outputs lose to the dense ones, on a few windows that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.block_calls import floats_of
from torchprune.calibration.counted_rows import logits_of, rows_of
from torchprune.calibration.output_distance import divergence, output_change
from torchprune.errors import CalibrationError


class Closeness:
    """The dense outputs of some windows, and how far others are.

    Raises:
        CalibrationError: the model gives no tensors to compare.
    """

    def __init__(self, model: nn.Module, windows: Sequence[Batch]) -> None:
        self._model, self._windows = model, windows
        self._dense = [self._kept(self._run(window), window) for window in windows]

    @property
    def measure(self) -> str:
        """What is measured."""
        logits = isinstance(self._dense[0], Tensor)
        return "nats of KL" if logits else "of the outputs' squares"

    def lost(self, few: int | None = None) -> float:
        """KL(dense || now) in nats a row of the logits, or ||y - y'||^2 / ||y||^2, on average.

        Args:
            few: of only so many windows.
        """
        pairs = list(zip(self._windows, self._dense, strict=True))[:few]
        return fmean(self._compared(self._run(window), window, dense) for window, dense in pairs)

    def _run(self, window: Batch) -> Any:
        with (
            modes.random_numbers_kept(self._model),
            modes.calibration_mode(self._model),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            torch.manual_seed(0)
            return window.run(self._model)

    def _kept(self, out: Any, window: Batch) -> Tensor | list[Tensor]:
        logits = logits_of(out)
        if logits is not None:
            return torch.log_softmax(rows_of(logits, window), -1)
        outputs = [t.clone() for t in floats_of(out)]
        if not outputs:
            raise CalibrationError(
                f"a {type(self._model).__name__} gives no tensors to compare, so that what a "
                "budget costs cannot be judged"
            )
        return outputs

    def _compared(self, out: Any, window: Batch, dense: Tensor | list[Tensor]) -> float:
        if isinstance(dense, list):
            return output_change(dense, floats_of(out))
        logits = logits_of(out)
        assert logits is not None
        return divergence(dense, rows_of(logits, window))
