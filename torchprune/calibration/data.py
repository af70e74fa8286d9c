"""What calibrates: the batches that were given, text that the model samples itself, or both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchprune.calibration.batches import ACCEPTED_DATA, Batch, read_batches
from torchprune.calibration.synthesis import (
    SEQUENCES,
    can_synthesise,
    continuations,
    synthesise,
    windows_of,
)
from torchprune.calibration.text import LONGEST, context_of, longest_of, text_batches
from torchprune.calibration.token_masks import TokenMask
from torchprune.errors import CalibrationError


@dataclass(frozen=True, eq=False)
class Data:
    """What a user gave to calibrate on, not read yet.

    Attributes:
        given: an iterable of batches, texts with a tokenizer, or None for the model's own text.
        tokenizer: the model's, where the data are texts, else None.
        max_batches: how many of them are read at most.
        seed: of sampled text.
        progress: whether sampling shows a bar.
        token_mask: which tokens count, where the user says so.
    """

    given: Iterable[Any] | None
    tokenizer: Any
    max_batches: int
    seed: int
    progress: bool
    token_mask: TokenMask = None

    def read(
        self, model: nn.Module, asker: str, *, at_least: int = 0
    ) -> tuple[list[Batch], list[str]]:
        """The batches on the model's device, and what the report should say of them.

        Args:
            asker: whose data they are, for errors.
            at_least: so many windows are sampled, where there are no data.

        Raises:
            CalibrationError: no data and a model that writes none, or no usable batches.
        """
        notes, given = [], self.given
        if given is None:
            if not can_synthesise(model):
                raise CalibrationError(
                    f"{asker} needs calibration data for a {type(model).__name__}: "
                    f"sparsify(model, spec, data). {ACCEPTED_DATA}. (Only decoder-only "
                    "transformers language models can calibrate on text of their own; "
                    "MagnitudeSpec needs no data.)"
                )
            sequences = max(SEQUENCES, at_least)
            given = synthesise(model, sequences=sequences, seed=self.seed, progress=self.progress)
            notes.append("calibrated on text sampled from the model itself")
        elif self.tokenizer is not None:
            length = min(LONGEST, context_of(model) or LONGEST, longest_of(self.tokenizer))
            windows = text_batches(
                self.tokenizer, given, samples=self.max_batches, length=length, seed=self.seed
            )
            size = windows[0]["input_ids"].shape[1]
            notes.append(
                f"calibrated on {len(windows)} windows of {size} tokens of the given texts"
            )
            given = windows
        taken = read_batches(given, model, self.max_batches, self.token_mask)
        if taken.strangers:
            notes.append(
                f"left out of the batches, since a {type(model).__name__} does not take them: "
                + ", ".join(taken.strangers)
            )
        if taken.more:
            notes.append(
                f"used the first {self.max_batches} batches; more were offered (max_batches)"
            )
        return taken.batches, notes

    def written_on(
        self, model: nn.Module, batches: Sequence[Batch], windows: int
    ) -> tuple[list[Batch], list[str]]:
        """What the model adds until there are so many windows, and what the report should say."""
        if not windows:
            return [], []
        given = len(windows_of(batches)) if can_synthesise(model) else 0
        if not given:
            return [], [
                "no text was added to the calibration data: that takes a decoder-only transformers "
                "language model and batches of token ids"
            ]
        missing = windows - given
        if missing <= 0:
            return [], []
        own = continuations(model, batches, missing, seed=self.seed, progress=self.progress)
        return own, [f"{missing} calibration windows more were sampled as continuations of {given}"]
