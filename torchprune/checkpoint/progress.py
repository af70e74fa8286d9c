"""How far a long run is, as a directory: safetensors and JSON, written whole and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchprune.checkpoint.checked_files import plain_file, read_json
from torchprune.checkpoint.checksums import of_content, of_tensors
from torchprune.checkpoint.whole_files import staged
from torchprune.errors import CheckpointError

FACTS, TENSORS = "progress.json", "progress.safetensors"

Facts = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """What one kind of run keeps.

    Attributes:
        form: its name in files.
        what: its name for people: "progress of a recovery".
    """

    form: str
    what: str

    def write(
        self, directory: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Facts
    ) -> None:
        """Write what a run has come to; what was there before is replaced whole.

        Raises:
            CheckpointError: something else has that name.
        """
        plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        checksum = of_tensors(plain[name] for name in sorted(plain))
        data = {"format": self.form, **facts, "tensors": checksum}
        with staged(directory, self.holds, self.what) as place:
            save_file(plain, place / TENSORS)
            (place / FACTS).write_text(json.dumps({**data, "checksum": of_content(data)}, indent=1))

    def read(self, directory: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Facts] | None:
        """What was written; None where there is no such directory, or an empty one.

        Raises:
            CheckpointError: it holds something else, or is damaged.
        """
        place = Path(directory)
        if not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir())):
            return None
        if not (place / FACTS).is_file():
            raise CheckpointError(f"{place} holds no {self.what}; choose a new directory")
        facts = read_json(plain_file(place, FACTS))
        if facts.get("format") != self.form:
            raise CheckpointError(f"{place / FACTS} is no {self.what}; choose a new directory")
        said = facts.pop("checksum", None)
        if said != of_content(facts):
            raise CheckpointError(f"{place / FACTS}: damaged: its checksum does not fit")
        try:
            tensors = load_file(plain_file(place, TENSORS))
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{place / TENSORS}: damaged ({error!s:.200})") from None
        found = of_tensors(tensors[name].contiguous() for name in sorted(tensors))
        if facts.get("tensors") != found:
            raise CheckpointError(f"{place / TENSORS}: damaged: its checksum does not fit")
        return tensors, facts

    def holds(self, directory: Path) -> bool:
        """Whether a directory is of this kind."""
        try:
            return read_json(plain_file(directory, FACTS)).get("format") == self.form
        except (CheckpointError, OSError):
            return False

    def forget(self, directory: str | os.PathLike[str]) -> None:
        """Delete what was written, once it is not needed."""
        place = Path(directory)
        if place.is_dir() and self.holds(place):
            for name in (FACTS, TENSORS):
                (place / name).unlink(missing_ok=True)
            place.rmdir()
