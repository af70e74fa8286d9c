"""What this command was asked for, as all who speak and write for it know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

_SPEECH = ("as_json", "quiet", "debug", "resume")
"""Options that change no result."""


@dataclass(frozen=True)
class Run:
    """One call of a command.

    Attributes:
        command: its name.
        keys: parameter -> the name of its option in files.
        options: parameter -> value, all that are in effect.
    """

    command: str
    keys: Mapping[str, str]
    options: Mapping[str, Any]

    def table(self, *, speech: bool = True) -> dict[str, Any]:
        """The options by their names in files, those that were not given and have no default left
        out.

        Args:
            speech: also those that say how to speak and whether to go on.
        """
        wanted = {k: v for k, v in self.options.items() if speech or k not in _SPEECH}
        return {self.keys[k]: v for k, v in wanted.items() if v is not None and v not in ([], ())}


_NOW: ContextVar[Run | None] = ContextVar("torchprune_run", default=None)


@contextmanager
def running(run: Run) -> Iterator[None]:
    """For the time of a command, let it be this one."""
    token = _NOW.set(run)
    try:
        yield
    finally:
        _NOW.reset(token)


def this_run() -> Run | None:
    """The command that runs, if one does."""
    return _NOW.get()


def json_wanted() -> bool:
    """Whether standard output is for one JSON object."""
    run = _NOW.get()
    return run is not None and bool(run.options.get("as_json"))
