"""A text file that is there whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file under a temporary name beside it, then give it its own.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name[:80]}.{uuid.uuid4().hex[:12]}.partial")
    try:
        partial.write_text(text, "utf-8")
        flush(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk hold a file before its name does."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
