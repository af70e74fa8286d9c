"""Errors that are promised: what runtimes and torch raise, as `ExportError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torchprune.errors import ExportError, TorchpruneError


class SizesError(ExportError):
    """A model could not be exported with sizes that vary, or computes otherwise at some."""


@contextmanager
def promised(what: str) -> Iterator[None]:
    """Have whatever another library raises, at whichever of its steps, be an ExportError.

    Args:
        what: cannot be done then.
    """
    try:
        yield
    except (TorchpruneError, OSError):
        raise
    except Exception as error:
        raise ExportError(f"{what}: {reason_of(error)}; nothing was written") from error


def reason_of(error: BaseException) -> str:
    """What lies behind an error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
