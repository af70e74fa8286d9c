"""The errors a user can meet. Each message names the module, what was expected, what was got."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TorchpruneError(Exception):
    """Base of every error torchprune raises on purpose."""


class SpecError(TorchpruneError, ValueError):
    """A spec contradicts itself, or asks a layer for something its shape cannot give."""


class TargetError(TorchpruneError, ValueError):
    """A selector matches nothing, or names something that cannot be pruned."""


class CalibrationError(TorchpruneError, RuntimeError):
    """Calibration data is missing or unusable, or a layer's statistics are not finite."""


class MaskError(TorchpruneError, ValueError):
    """A mask does not fit its weight, or masks or dense weights that are needed are absent."""


class LoweringError(TorchpruneError, ValueError):
    """A weight cannot take the form it was to be lowered to, or nothing here can."""


class ExportError(TorchpruneError, ValueError):
    """A model cannot be written for another runtime, or computes otherwise there."""


class ShrinkError(TorchpruneError, ValueError):
    """A model's structure cannot be read, or what is to be removed cannot go."""


class CheckpointError(TorchpruneError, ValueError):
    """A saved directory is damaged, hostile, of another version, or does not fit the model."""


class InputError(TorchpruneError, ValueError):
    """A text, file, directory, dataset or model that the user named cannot be used."""


class MissingExtraError(TorchpruneError, ImportError):
    """An optional dependency is absent; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}: pip install 'torchprune[{extra}]'"
        )


def did_you_mean(word: str, known: Iterable[str], limit: int = 3) -> str:
    """A hint such as ` (did you mean 'pattern'?)`, or nothing when no name is close."""
    close = difflib.get_close_matches(word, list(known), n=limit, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""
