"""Files that may be hostile: found by plain names inside their directory, and of bounded size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torchprune.errors import CheckpointError

MAX_JSON = 32 << 20
"""Bytes of the largest JSON file that is read."""


def plain_file(directory: Path, name: object) -> Path:
    """The regular file of that plain name inside a directory.

    Raises:
        CheckpointError: the name is no plain name, leads outside, or no regular file has it.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}", name):
        raise CheckpointError(f"{directory}: {name!r:.80} is not the plain name of a file in it")
    path, home = (directory / name).resolve(), directory.resolve()
    if path.parent != home:
        raise CheckpointError(f"{directory / name} is a link that leads outside its directory")
    if not path.is_file():
        raise CheckpointError(f"{directory / name} is missing, or no regular file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of bounded size.

    Raises:
        CheckpointError: it is too large, no JSON, nested too deeply, or not an object.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        raise CheckpointError(f"{path}: larger than {MAX_JSON >> 20} MiB, which no such file is")
    try:
        data = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged or truncated, not JSON ({error!s:.200})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(data).__name__}")
    return data
