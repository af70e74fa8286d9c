"""Directories and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchprune.errors import CheckpointError
from torchprune.reports.whole_texts import flush
from torchprune.reports.whole_texts import write_whole as write_whole  # a result's own is below us


@contextmanager
def staged(
    directory: str | os.PathLike[str], ours: Callable[[Path], bool], what: str
) -> Iterator[Path]:
    """A new directory beside `directory` to write into; it takes that name when the block ends.

    After an error in the block nothing has changed. What was under that name before is replaced
    whole, and only if it is an empty directory or one that `ours` accepts. (Both are complete
    while they change places; a process killed between the two renames leaves the old one beside,
    as `.NAME.*.old`.)

    Args:
        what: what an acceptable directory holds, for the error.

    Raises:
        CheckpointError: something else has that name.
    """
    target = Path(os.path.realpath(directory))
    _check_replaceable(target, ours, what)
    target.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{target.name[:80]}.{uuid.uuid4().hex[:12]}"
    partial, old = target.with_name(f"{stem}.partial"), target.with_name(f"{stem}.old")
    partial.mkdir()
    try:
        yield partial
        readers = partial.stat().st_mode & 0o666  # what the umask grants; safetensors writes 0600
        for path in partial.rglob("*"):
            if path.is_file():
                path.chmod(readers)
                flush(path)
        _check_replaceable(target, ours, what)
        _exchange(partial, target, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(target: Path, ours: Callable[[Path], bool], what: str) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; a directory is needed")
    if any(target.iterdir()) and not ours(target):
        raise CheckpointError(
            f"{target} holds something other than {what}; choose an empty or a new directory"
        )


def _exchange(partial: Path, target: Path, old: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
