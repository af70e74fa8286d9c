"""The file that a long measurement goes on from: its rows so far, and what tells it from others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torchprune.checkpoint.whole_files import write_whole
from torchprune.study.costs.costs import Cost, SensitivityError
from torchprune.study.costs.sensitivities import SensitivityResult


class HalfDone:
    """Rows that are known already, and those that come, in a file where one was asked for.

    Raises:
        SensitivityError: the file is damaged, something else, or of another measurement.
    """

    def __init__(self, path: str | os.PathLike[str] | None, empty: SensitivityResult) -> None:
        self._path = None if path is None else Path(path)
        self.result, self._written = empty, empty
        if self._path is None:
            return
        if os.path.lexists(self._path):
            self._written = self._earlier(self._path, empty)
            self.result = replace(empty, rows=self._written.rows)
        else:
            self._write()  # that it cannot be written shows before the work and not after it

    def find(self, name: str, level: str) -> Cost | None:
        """The row of a layer at a level, if it is known."""
        same = (row for row in self.result.rows if (row.name, row.level) == (name, level))
        return next(same, None)

    def keep(self, rows: Sequence[Cost]) -> None:
        """Add rows and write the file."""
        self.result = replace(self.result, rows=(*self.result.rows, *rows))
        self._write()

    def end(self, ended: SensitivityResult) -> SensitivityResult:
        """The whole result, in place of the rows as they came."""
        self.result = ended
        if ended != self._written:
            self._write()
        return ended

    def _earlier(self, path: Path, empty: SensitivityResult) -> SensitivityResult:
        try:
            found = SensitivityResult.from_json(path.read_text("utf-8"))
        except (SensitivityError, UnicodeDecodeError, OSError) as error:
            raise SensitivityError(f"{path}: {error}; name another file, or remove it") from None
        if found.problem != empty.problem:
            raise SensitivityError(
                f"{path}: written for another model, spec, data or other options; name another "
                "file, or remove it"
            )
        return found

    def _write(self) -> None:
        if self._path is not None:
            write_whole(self._path, self.result.to_json() + "\n")
            self._written = self.result
