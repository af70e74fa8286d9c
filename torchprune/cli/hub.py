"""Names on a hub: looked up on this disk first, and asked for once where there is no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from torchprune.calibration.documents import first_line
from torchprune.errors import InputError

Found = TypeVar("Found")

PATIENCE = 10.0
"""Seconds that a hub has to answer at all."""


def fetched(name: str, read: Callable[[], Found]) -> Found:
    """What `read` gives for a directory, or for a name on the hub: from the hub's cache on this
    disk if all of it is there, else from the hub, if that can be reached.

    Raises:
        InputError: it is not on this disk, and no hub answers.
        Exception: whatever `read` raises.
    """
    if Path(name).expanduser().exists():
        return read()
    try:
        with _on_this_disk():
            return read()
    except Exception as error:  # something is missing here, or wrong with what is here
        local = error
    if why := _unreachable():
        if not _is_for_want_of_the_hub(local):
            raise local
        raise InputError(f"it is not on this disk, and {why}") from local
    return read()


@contextmanager
def _on_this_disk() -> Iterator[None]:
    """Without the hub for a while, as if `HF_HUB_OFFLINE` were set: nothing is sent."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@cache
def _unreachable() -> str:
    """Why the hub cannot be reached, or nothing; asked once in a process, without retries."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE keeps the hub from being asked"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # any answer would do, and there is none
        return f"the hub cannot be reached ({constants.ENDPOINT}: {first_line(error)})"
    return ""


def _is_for_want_of_the_hub(error: BaseException | None) -> bool:
    """Whether an error goes back to a file that is not in the cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    wanting: tuple[Any, ...] = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    while error is not None:
        if isinstance(error, wanting):
            return True
        error = error.__cause__ or error.__context__
    return False
