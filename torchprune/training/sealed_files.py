"""Tensors in a file with its checksum beside it: what is read back is what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchprune.checkpoint.checksums import checksum
from torchprune.errors import CheckpointError

_NOTE = "note"
_CHUNK = 1 << 24


def write_sealed(path: Path, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write tensors, copied to the CPU, and a note; the name must be one that nothing reads yet."""
    plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    save_file(plain, str(path), metadata={_NOTE: json.dumps(note)})
    _seal(path).write_text(_sum_of(path), "utf-8")


def read_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, each with memory of its own, and the note.

    Raises:
        CheckpointError: a file is absent or damaged.
    """
    for needed in (path, _seal(path)):
        if not needed.is_file():
            raise CheckpointError(f"{needed} is missing, or no regular file")
    if (found := _sum_of(path)) != (written := _seal(path).read_text("utf-8", "replace")):
        raise CheckpointError(
            f"{path}: damaged or changed: it has the checksum {found}, but was written with "
            f"{written!r:.20}"
        )
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            note = json.loads(file.metadata()[_NOTE])
            return {name: file.get_tensor(name).clone() for name in file.keys()}, note  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error!s:.200})") from None


def remove_sealed(path: Path) -> None:
    """Remove what `write_sealed` wrote there, if anything."""
    for file in (path, _seal(path)):
        file.unlink(missing_ok=True)


def _seal(path: Path) -> Path:
    return path.with_suffix(".sum")


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return checksum(iter(lambda: file.read(_CHUNK), b""))
