"""How far a recovery is, as a directory: safetensors and JSON, written whole and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchprune.checkpoint.checked_files import plain_file, read_json
from torchprune.checkpoint.checksums import of_content, of_tensors
from torchprune.checkpoint.whole_files import staged
from torchprune.errors import CheckpointError, SpecError

FORMAT = "torchprune.recovery"
FACTS, TENSORS = "progress.json", "progress.safetensors"

Facts = dict[str, Any]


def write_progress(
    directory: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Facts
) -> None:
    """Write what a run has come to; what was there before is replaced whole.

    Raises:
        CheckpointError: something else has that name.
    """
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    checksum = of_tensors(plain[name] for name in sorted(plain))
    data = {"format": FORMAT, **facts, "tensors": checksum}
    with staged(directory, is_progress, "the progress of a recovery") as place:
        save_file(plain, place / TENSORS)
        (place / FACTS).write_text(json.dumps({**data, "checksum": of_content(data)}, indent=1))


def read_progress(directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Facts] | None:
    """What was written; None where there is no such directory, or an empty one.

    Raises:
        CheckpointError: it holds something else, or is damaged.
    """
    place = Path(directory)
    if not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir())):
        return None
    if not place.is_dir() or not is_progress(place):
        raise CheckpointError(f"{place} holds no progress of a recovery; choose a new directory")
    facts = read_json(plain_file(place, FACTS))
    said = facts.pop("checksum", None)
    if said != of_content(facts):
        raise CheckpointError(f"{place / FACTS}: damaged: its checksum does not fit")
    try:
        tensors = load_file(plain_file(place, TENSORS))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{place / TENSORS}: damaged ({error!s:.200})") from None
    if facts.get("tensors") != of_tensors(tensors[name].contiguous() for name in sorted(tensors)):
        raise CheckpointError(f"{place / TENSORS}: damaged: its checksum does not fit")
    return tensors, facts


def is_progress(directory: Path) -> bool:
    """Whether a directory holds the progress of a recovery."""
    try:
        return read_json(plain_file(directory, FACTS)).get("format") == FORMAT
    except (CheckpointError, OSError):
        return False


def forget_progress(directory: str | os.PathLike[str]) -> None:
    """Delete what was written, once it is not needed."""
    place = Path(directory)
    if place.is_dir() and is_progress(place):
        for name in (FACTS, TENSORS):
            (place / name).unlink(missing_ok=True)
        place.rmdir()


# -- an optimizer's state --------------------------------------------------------------------------


def of_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Facts]:
    """Its state, tensors apart from plain values.

    Raises:
        SpecError: it holds something else.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            key = f"optimizer.{index}.{name}"
            if type(value) is Tensor:
                tensors[key] = value
            elif isinstance(value, bool | int | float | None):
                plain[key] = value
            else:
                raise SpecError(
                    f"recover: path= cannot keep the state of a {type(optimizer).__name__}: its "
                    f"{name} is a {type(value).__name__}"
                )
    return tensors, plain


def into_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Facts
) -> None:
    """Put a state back."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain}.items():
        _, index, name = key.split(".", 2)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
