"""Calibration windows out of what `--data` names: one source or several, texts or conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprune.cli.console import (
    ChatOption,
    ColumnOption,
    DataOption,
    LengthOption,
    SamplesOption,
    SeedOption,
)
from torchprune.cli.documents import read_rows
from torchprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """What one `--data` names, read.

    Attributes:
        weight: its share of the windows, beside the others' weights.
        texts: plain documents.
        conversations: lists of messages, of rows that have such and no column of text.
    """

    name: str
    weight: float = 1.0
    texts: Sequence[str] = ()
    conversations: Sequence[Any] = field(default=(), repr=False)


@dataclass(frozen=True)
class Calibration:
    """Options of what calibrates. (See `registry` for what becomes of such a class.)"""

    data: DataOption = None
    column: ColumnOption = "text"
    chat: ChatOption = True
    samples: SamplesOption = 32
    length: LengthOption = 512
    seed: SeedOption = 0

    def sources(self, progress: bool) -> list[Source]:
        """What `--data` names, read.

        Raises:
            InputError: as for `read_sources`.
        """
        return read_sources(self.data or (), self.column, progress=progress)

    def windows(
        self,
        model: Any,
        tokenizer: Any,
        sources: Sequence[Source],
        *,
        say: Say,
        progress: bool,
        writer: Any = None,
    ) -> tuple[list[Tensor] | None, str]:
        """Windows (1, length) for a model, and what to note of them.

        Args:
            sources: what was given; none, and the model writes them itself.
            writer: who writes in the model's place.

        Returns:
            no windows where none are given and the writer can write none.
        """
        from torchprune.calibration.synthesis import can_synthesise, synthesise

        writer = model if writer is None else writer
        count, length = self.samples, fitting(model, self.length, say)
        own = "the model itself" if writer is model else "the teacher"
        taken = f"{count} {'window' if count == 1 else 'windows'} of {length} tokens"
        say(f"taking {taken} of {named(sources) if sources else own}")
        note = f"calibrated on {taken} "
        if sources:
            found = drawn(tokenizer, sources, count, length, self.seed, chat=self.chat, say=say)
            return found, note + f"of {named(sources)}"
        if not can_synthesise(writer):
            return None, ""
        how: dict[str, Any] = {"seed": self.seed, "progress": progress}
        windows = synthesise(writer, sequences=count, length=length, **how)
        return windows, note + f"sampled from {own}"


def read_sources(data: Sequence[str], column: str, *, progress: bool = False) -> list[Source]:
    """What `--data` names, in its order.

    Raises:
        InputError: one cannot be read, holds no text, or weighs nothing.
    """
    return [_read(item, column, progress) for item in data]


def _read(item: str, column: str, progress: bool) -> Source:
    name, weight = parted(item)
    rows = read_rows(name, column, progress=progress)
    return Source(name, weight, rows.texts, rows.conversations)


def parted(item: str) -> tuple[str, float]:
    """`NAME=WEIGHT` as both; the weight is 1 where none is given.

    Raises:
        InputError: the weight is not above 0.
    """
    name, found, text = item.rpartition("=")
    if not (found and name) or Path(item).expanduser().exists():
        return item, 1.0
    try:
        weight = float(text)
    except ValueError:
        return item, 1.0
    if not 0 < weight < float("inf"):
        raise InputError(f"{item}: a weight must be above 0, got {text}")
    return name, weight


def shares(weights: Sequence[float], count: int) -> list[int]:
    """A count shared by weights to whole numbers that sum to it: what is left goes to the largest
    remainders, the first of equal ones.
    """
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [int(part) for part in exact]
    order = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in order[: count - sum(whole)]:
        whole[i] += 1
    return whole


def named(sources: Sequence[Source]) -> str:
    """For people: "notes.txt", or "notes.txt (0.7) and chat.jsonl (0.3)"."""
    if len(sources) == 1:
        return sources[0].name
    return " and ".join(f"{source.name} ({source.weight:g})" for source in sources)


def drawn(
    tokenizer: Any,
    sources: Sequence[Source],
    count: int,
    length: int,
    seed: int,
    *,
    chat: bool,
    say: Say,
) -> list[Tensor]:
    """Windows (1, length) of token ids from all sources, by their weights, in the sources' order.

    Args:
        chat: write conversations by the tokenizer's template, where it has one; else they are
            plain text, a paragraph a message.

    Raises:
        InputError: a source is shorter than a window, or the template refuses a conversation.
    """
    counts = shares([source.weight for source in sources], count)
    windows: list[Tensor] = []
    for place, (source, some) in enumerate(zip(sources, counts, strict=True)):
        if some:
            windows += _windows(tokenizer, source, some, length, seed + place, chat, say)
        else:
            say(f"{source.name} has no share in {count} windows")
    return windows


def _windows(
    tokenizer: Any, source: Source, count: int, length: int, seed: int, chat: bool, say: Say
) -> list[Tensor]:
    from torchprune.calibration.text import text_batches

    template = getattr(tokenizer, "chat_template", None)
    if source.conversations and chat and template is not None:
        talk = list(source.conversations)
        few = {"samples": count, "length": length, "seed": seed}
        windows = [b["input_ids"] for b in text_batches(tokenizer, talk, **few, chat=True)]
        if source.texts:
            say(f"{source.name}: rows without messages are left out")
        return windows
    if source.conversations and chat:
        say(f"the tokenizer has no chat template: {source.name} is read as plain text")
    return _plain_windows(tokenizer, [*source.texts, *_plain(source)], count, length, seed)


def _plain(source: Source) -> list[str]:
    """Conversations as text, a paragraph a message."""
    return [
        "\n\n".join(str(m.get("content", m.get("value", ""))) for m in talk)
        for talk in source.conversations
    ]


def _plain_windows(
    tokenizer: Any, documents: list[str], count: int, length: int, seed: int
) -> list[Tensor]:
    from torchprune.calibration.text import (
        CHARACTERS_PER_TOKEN,
        draw_windows,
        some_documents,
        tokenise,
    )

    some = some_documents(documents, count * length * CHARACTERS_PER_TOKEN, seed)
    return [w[None] for w in draw_windows(tokenise(tokenizer, some), count, length, seed)]


def fitting(model: Any, length: int, say: Say) -> int:
    """The length, cut to the model's context."""
    from torchprune.calibration.text import context_of

    context = context_of(model) or length
    if length > context:
        say(f"the model's context is {context} tokens: windows are cut to that")
    return min(length, context)
