"""The documents that a command line names: a file, or a dataset that `datasets` finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchprune.calibration.documents import first_line, json_rows, no_column, plain_text
from torchprune.cli.hub import fetched
from torchprune.errors import InputError, MissingExtraError


def read_documents(source: str, column: str = "text", *, progress: bool = False) -> list[str]:
    """The documents of a text file or a dataset, those without text left out.

    Args:
        source: a plain text file (one document), a `.jsonl` file (one object a line), or
            `name[:config[:split]]` of a dataset that `datasets.load_dataset` finds (its split is
            "train" unless given).
        column: which field of a `.jsonl` object or a dataset's row holds the text.
        progress: let `datasets` show its progress bars.

    Raises:
        InputError: it is not there, cannot be read, or holds no text.
    """
    rows = _rows(source, progress)
    return _with_text(source, [_text_of(row, column, where) for where, row in rows])


_CONVERSATION = ("messages", "conversations")
"""Columns that hold messages."""


@dataclass(frozen=True)
class Rows:
    """What a source holds: plain documents, and conversations."""

    texts: list[str] = field(default_factory=list)
    conversations: list[Any] = field(default_factory=list)


def read_rows(source: str, column: str = "text", *, progress: bool = False) -> Rows:
    """As `read_documents`, but a row without that column may hold messages: a conversation.

    Raises:
        InputError: as for `read_documents`.
    """
    texts, conversations = list[str](), list[Any]()
    for where, row in _rows(source, progress):
        talk = None
        if not isinstance(row, str) and column not in row:
            talk = next((row[name] for name in _CONVERSATION if name in row), None)
        if talk is not None:
            if not _is_talk(talk):
                raise InputError(f"{where}: expected a list of messages, got {talk!r:.60}")
            conversations.append(talk)
        else:
            texts.append(_text_of(row, column, where))
    if conversations:
        return Rows([text for text in texts if text.strip()], conversations)
    return Rows(_with_text(source, texts))


def _is_talk(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(message, dict) for message in found)


def _with_text(source: str, found: list[str]) -> list[str]:
    documents = [text for text in found if text.strip()]
    if not documents:
        raise InputError(f"{source} holds no text")
    return documents


def _rows(source: str, progress: bool) -> Iterator[tuple[str, Any]]:
    """Where each row is, and the row; a plain text is one."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".jsonl":
        return json_rows(path)
    if path.is_file():
        return iter([(source, plain_text(path))])
    if looks_like_path(source) and not Path(source.partition(":")[0]).expanduser().exists():
        raise InputError(f"no such file: {source}")
    return ((source, row) for row in _dataset(source, progress))


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean a place on this disk, and not `owner/name` on a hub."""
    path = Path(name.partition(":")[0])
    return (
        name.startswith((".", "~"))
        or path.is_absolute()
        or len(path.parts) > 2
        or path.suffix in (".txt", ".md", ".json", ".jsonl", ".gz", ".parquet", ".csv")
    )


def _dataset(source: str, progress: bool) -> Any:
    """A split's rows."""
    try:
        from datasets import disable_progress_bars, enable_progress_bars, load_dataset
    except ImportError:
        raise MissingExtraError("datasets", "data", f"reading the dataset {source!r}") from None
    (enable_progress_bars if progress else disable_progress_bars)()
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        return fetched(name, lambda: load_dataset(name, config or None, split=split or "train"))
    except Exception as error:  # whatever is wrong, it is with what the user named
        raise InputError(
            f"{source!r} is no file here and no dataset that can be loaded: {first_line(error)}"
        ) from error


def _text_of(row: Any, column: str, where: str) -> str:
    if isinstance(row, str):
        return row
    if column not in row:
        raise InputError(no_column(where, column, list(row)))
    if not isinstance(row[column], str):
        raise InputError(f"{where}: {column!r} is a {type(row[column]).__name__}, not text")
    return str(row[column])
