"""Text for calibration and evaluation: files and datasets read, tokenised once, cut in windows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprune.errors import MissingExtraError, TorchpruneError, did_you_mean


class InputError(TorchpruneError, ValueError):
    """A file, directory, dataset or model that the user named cannot be used."""


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
    if path.is_file():
        found = _lines(path, column) if path.suffix == ".jsonl" else iter([_plain(path)])
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


def tokenise(tokenizer: Any, documents: Sequence[str]) -> Tensor:
    """All documents, joined by blank lines and tokenised once: (tokens,) int64."""
    ids = tokenizer("\n\n".join(documents), verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def some_documents(documents: Sequence[str], characters: int, seed: int) -> list[str]:
    """Documents in a seeded order until there are enough characters, the last one cut."""
    taken: list[str] = []
    for text in random.Random(seed).sample(documents, len(documents)):
        if characters <= 0:
            break
        taken.append(text[:characters])
        characters -= len(text)
    return taken


def draw_windows(tokens: Tensor, count: int, length: int, seed: int) -> Tensor:
    """`count` windows at seeded random places: (count, length).

    Raises:
        InputError: the text is shorter than one window.
    """
    if len(tokens) < length:
        raise InputError(
            f"the text has {len(tokens)} tokens, a window needs {length}: use a longer text or a "
            "smaller length"
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length + 1, (count,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length)]


def _plain(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _lines(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_plain(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number} is a {type(row).__name__}, not an object")
        yield _text_of(row, column, f"{path}, line {number}")


def _dataset(source: str, column: str, progress: bool) -> Iterator[str]:
    try:
        from datasets import disable_progress_bars, enable_progress_bars, load_dataset
    except ImportError:
        raise MissingExtraError("datasets", "data", f"reading the dataset {source!r}") from None
    (enable_progress_bars if progress else disable_progress_bars)()
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # whatever is wrong, it is with what the user named
        raise InputError(
            f"{source!r} is no file here and no dataset that can be loaded: {first_line(error)}"
        ) from error
    if column not in rows.column_names:
        raise InputError(_no_column(source, column, list(rows.column_names)))
    return (_text_of(row, column, source) for row in rows)


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise InputError(_no_column(where, column, list(row)))
    if not isinstance(row[column], str):
        raise InputError(f"{where}: {column!r} is a {type(row[column]).__name__}, not text")
    return str(row[column])


def _no_column(where: str, column: str, known: list[str]) -> str:
    hint = did_you_mean(column, known)
    return f"{where} has no column {column!r}{hint}; it has {', '.join(map(repr, known))}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
