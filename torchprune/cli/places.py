"""Places that results go to: whether they can be written, asked before the work, not after it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torchprune.errors import InputError


def check_place(path: Path | None, *, directory: bool = False) -> None:
    """Refuse a place that nothing can be written to. Nothing is left there.

    Args:
        directory: it is to be one, and else a file.

    Raises:
        InputError: it lies below a file, in a directory that takes no files, or is one of the
            other kind.
    """
    if path is None:
        return
    place = path.expanduser().absolute()
    if not directory and place.is_dir():
        raise InputError(f"{path} is a directory; name a file in it")
    if directory and place.exists() and not place.is_dir():
        raise InputError(f"{path} is a file; name a directory")
    nearest = next(above for above in place.parents if above.exists())
    if not nearest.is_dir():
        raise InputError(f"{path} cannot be written: {nearest} is a file; name another place")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {nearest} takes no files ({error.strerror}); "
            "name another place"
        ) from None
