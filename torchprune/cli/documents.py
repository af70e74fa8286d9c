"""The documents that a command line names: a file, or a dataset that `datasets` finds."""

from __future__ import annotations

from collections.abc import Iterator
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
    path = Path(source).expanduser()
    found: Iterator[str]
    if path.is_file() and path.suffix == ".jsonl":
        found = (_text_of(row, column, where) for where, row in json_rows(path))
    elif path.is_file():
        found = iter([plain_text(path)])
    elif looks_like_path(source) and not Path(source.partition(":")[0]).expanduser().exists():
        raise InputError(f"no such file: {source}")
    else:
        found = _dataset(source, column, progress)
    documents = [text for text in found if text.strip()]
    if not documents:
        raise InputError(f"{source} holds no text")
    return documents


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean a place on this disk, and not `owner/name` on a hub."""
    path = Path(name.partition(":")[0])
    return (
        name.startswith((".", "~"))
        or path.is_absolute()
        or len(path.parts) > 2
        or path.suffix in (".txt", ".md", ".json", ".jsonl", ".gz", ".parquet", ".csv")
    )


def _dataset(source: str, column: str, progress: bool) -> Iterator[str]:
    try:
        from datasets import disable_progress_bars, enable_progress_bars, load_dataset
    except ImportError:
        raise MissingExtraError("datasets", "data", f"reading the dataset {source!r}") from None
    (enable_progress_bars if progress else disable_progress_bars)()
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = fetched(name, lambda: load_dataset(name, config or None, split=split or "train"))
    except Exception as error:  # whatever is wrong, it is with what the user named
        raise InputError(
            f"{source!r} is no file here and no dataset that can be loaded: {first_line(error)}"
        ) from error
    if column not in rows.column_names:
        raise InputError(no_column(source, column, list(rows.column_names)))
    return (_text_of(row, column, source) for row in rows)


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise InputError(no_column(where, column, list(row)))
    if not isinstance(row[column], str):
        raise InputError(f"{where}: {column!r} is a {type(row[column]).__name__}, not text")
    return str(row[column])
