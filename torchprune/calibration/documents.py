"""Texts and conversations out of what users have: lists, files, rows, datasets, streams."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from torchprune.errors import InputError, did_you_mean

RUN = 64
"""Neighbouring rows of a large source that are taken together."""

_CONVERSATION = ("messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": "assistant"}
"""Who speaks in {"from": ..., "value": ...}, in the words that chat templates know."""

ACCEPTED_SOURCE = (
    "a list of strings, the path of a text file or a .jsonl file, rows with a column 'text', or "
    "a split of a dataset"
)


def in_seeded_order(source: Any, seed: int) -> Iterator[tuple[int, Any]]:
    """The rows of a source and their numbers: in a seeded order where a row can be had by its
    number, else as they come.

    Raises:
        InputError: it is no source of rows, or a path where no file is.
    """
    if isinstance(source, str | os.PathLike):
        path = _file(source)
        jsonl = path.suffix == ".jsonl"
        source = [row for _, row in json_rows(path)] if jsonl else [plain_text(path)]
    if isinstance(source, Mapping):
        names = ", ".join(map(repr, source))
        raise InputError(
            f"source is a {type(source).__name__} of {names}; expected {ACCEPTED_SOURCE}. Give one "
            f"of them, such as source[{next(iter(source), 'train')!r}]"
        )
    if callable(plain := getattr(source, "tolist", None)):  # an array or a table's column
        source = plain()
    if isinstance(source, bytes | bytearray | Set) or not isinstance(source, Iterable):
        raise InputError(f"source is a {type(source).__name__}; expected {ACCEPTED_SOURCE}")
    rows: Any = source
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        return enumerate(rows)
    return ((i, rows[i]) for i in _order(len(rows), seed))


def texts_of(rows: Iterable[tuple[int, Any]]) -> Iterator[str]:
    """The text of each row, those without a letter left out.

    Raises:
        InputError: a row is neither a string nor has a column of text.
    """
    for i, row in rows:
        where = f"row {i} of the source"
        if isinstance(row, Mapping):
            row = row[column_of(row, "text", where)]
        if not isinstance(row, str):
            if _is_conversation(row):
                raise InputError(f"{where} is a conversation: text_batches(..., chat=True)")
            hint = "; batches need no tokenizer" if hasattr(row, "shape") else ""
            raise InputError(f"{where} is a {type(row).__name__}, not text{hint}")
        if row.strip():
            yield str(row)


def conversations_of(rows: Iterable[tuple[int, Any]], tokenizer: Any) -> Iterator[str]:
    """Each row's conversation as the tokenizer's chat template writes it, empty ones left out.

    Raises:
        InputError: a row is no conversation, or the template is absent or refuses it.
    """
    template = getattr(tokenizer, "apply_chat_template", None)
    if template is None or getattr(tokenizer, "chat_template", template) is None:
        raise InputError(
            f"the {type(tokenizer).__name__} has no chat template, which chat=True needs: take "
            "the tokenizer of a chat model, set its chat_template, or give texts without chat"
        )
    for i, row in rows:
        where = f"row {i} of the source"
        if isinstance(row, Mapping):
            row = row[_conversation_column(row, where)]
        if not isinstance(row, str | bytes) and isinstance(row, Iterable):
            row = list(row)
        if row == []:
            continue
        if not _is_conversation(row):
            raise InputError(
                f"{where} is a {type(row).__name__}; chat=True expects conversations: lists of "
                '{"role": "user", "content": "..."} (texts go without chat)'
            )
        try:
            yield str(template([_message(m) for m in row], tokenize=False))
        except Exception as error:  # whatever a template objects to, it is of this conversation
            raise InputError(f"{where}: the template refuses it: {first_line(error)}") from error


def column_of(row: Mapping[str, Any], wanted: str, where: str) -> str:
    """The column of that name, or the only one there is.

    Raises:
        InputError: there are several, and none has that name.
    """
    if wanted in row:
        return wanted
    if len(row) == 1:
        return str(next(iter(row)))
    one = repr(next(iter(row), wanted))
    raise InputError(
        f"{no_column(where, wanted, list(map(str, row)))}; give one alone, such as "
        f"[row[{one}] for row in source]"
    )


def no_column(where: str, column: str, known: list[str]) -> str:
    """What to say of a column that is not there."""
    hint = did_you_mean(column, known)
    return f"{where} has no column {column!r}{hint}; it has {', '.join(map(repr, known))}"


def plain_text(path: Path) -> str:
    """The whole of a text file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a `.jsonl` file, and where it is.

    Raises:
        InputError: the file cannot be read, or a line is no object.
    """
    for number, line in enumerate(plain_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{where} is a {type(row).__name__}, not an object")
        yield where, row


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _order(count: int, seed: int) -> Iterator[int]:
    """Runs of neighbours in a seeded order; single rows where there are few."""
    run = min(RUN, max(1, count // 256))
    starts = range(0, count, run)
    for start in random.Random(seed).sample(starts, len(starts)):
        yield from range(start, min(start + run, count))


def _file(source: str | os.PathLike[str]) -> Path:
    path = Path(source).expanduser()
    try:
        found = path.is_file()
    except OSError:  # a text is too long for a name
        found = False
    if found:
        return path
    short = str(source) if len(str(source)) < 80 else str(source)[:80] + "..."
    raise InputError(
        f"no such file: {short!r}. A string names a text file or a .jsonl file; give a text as "
        "[text], and a dataset as a split: datasets.load_dataset(name, split='train')"
    )


def _is_conversation(row: Any) -> bool:
    return isinstance(row, list | tuple) and all(
        isinstance(m, Mapping) and ("role" in m or "from" in m) for m in row
    )


def _conversation_column(row: Mapping[str, Any], where: str) -> str:
    if "role" in row:
        raise InputError(f"{where} is one message; give a list of conversations: [conversation]")
    for name in _CONVERSATION:
        if name in row:
            return name
    return column_of(row, _CONVERSATION[0], where)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if "role" in message:
        return dict(message)
    speaker = message["from"]
    return {"role": _ROLES.get(speaker, speaker), "content": message.get("value", "")}
