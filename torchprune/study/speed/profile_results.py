"""A profile as a user has it: text, Markdown, JSON, a page and a figure."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torchprune.checkpoint.whole_files import write_whole
from torchprune.reports.figure import SUFFIXES
from torchprune.reports.page import save_page
from torchprune.reports.pieces import Page
from torchprune.reports.result_text import result_of
from torchprune.reports.tables import by_rich, markdown, plain
from torchprune.study.speed.profile_page import draw_lines, page_of
from torchprune.study.speed.profile_records import FORMAT, Measured, ProfileError
from torchprune.study.speed.typed_json import read_as

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Profile(Measured):
    """What `profile` found. `print(profile)` shows the table and what the numbers say."""

    def __str__(self) -> str:
        columns, rows = self.table()
        shown = by_rich(columns, rows) or plain(columns, rows)
        facts = ", ".join(
            f"{self.machine[k]}{' threads' if k == 'threads' else ''}"
            for k in ("processor", "threads")
            if k in self.machine
        )
        lines = [shown.rstrip(), *(f"- {v.text}" for v in self.verdicts), *self.notes]
        torch = self.machine.get("torch", "")
        return "\n".join([*lines, f"{facts}, torch {torch}, {self.machine.get('date', '')}"])

    def to_markdown(self) -> str:
        """The table as GitHub's Markdown, and the verdicts below it."""
        columns, rows = self.table()
        return "\n".join([markdown(columns, rows), "", *(f"- {v.text}" for v in self.verdicts)])

    # -- kept --------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Everything, as `from_json` reads it."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """The profile that `to_json` wrote.

        Raises:
            ProfileError: it is damaged, or something else.
        """
        found = result_of(text, FORMAT, "profile", ProfileError)
        try:
            made: Profile = read_as(cls, {k: v for k, v in found.items() if k != "format"})
        except (TypeError, ValueError) as error:
            raise ProfileError(f"a damaged profile: {error}") from None
        return made

    def page(self) -> Page:
        """What a page shows of it."""
        return page_of(self)

    def figure(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Latency against rows, a line for each contender, bars from 10th to 90th percentile.

        Args:
            path: where to save it, as .png, .svg or .pdf.

        Returns:
            a `matplotlib.figure.Figure`.

        Raises:
            ProfileError: another suffix.
            MissingExtraError: the extra "figure" is absent.
        """
        check_suffix(path, SUFFIXES)
        return draw_lines(self, path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as .html (a page), .json, .md, or a figure (.png, .svg, .pdf).

        Raises:
            ProfileError: another suffix.
        """
        check_suffix(path)
        suffix = Path(path).suffix.lower()
        if suffix == ".html":
            save_page(self.page(), path)
        elif suffix == ".json":
            write_whole(path, self.to_json() + "\n")
        elif suffix == ".md":
            write_whole(path, self.to_markdown() + "\n")
        else:
            self.figure(path)


def check_suffix(
    path: str | os.PathLike[str] | None,
    known: Sequence[str] = (".html", ".json", ".md", *SUFFIXES),
) -> None:
    """See that a profile can be written under a name.

    Raises:
        ProfileError: it has another suffix.
    """
    if path is not None and Path(path).suffix.lower() not in known:
        raise ProfileError(f"{os.fspath(path)}: a profile is saved as one of {', '.join(known)}")
