"""Batches from texts: read as far as is needed, tokenised, cut in windows at seeded places."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.calibration.documents import conversations_of, in_seeded_order, texts_of
from torchprune.errors import InputError

LONGEST = 2048
"""The window of a model whose context is longer, or unknown, where none is asked for."""

CHARACTERS_PER_TOKEN = 16
"""How much text is tokenised for each token that is wanted: of prose, about four times as much."""


def text_batches(
    tokenizer: Any,
    source: Iterable[Any] | str | os.PathLike[str],
    *,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    chat: bool = False,
) -> list[dict[str, Tensor]]:
    r"""Calibration batches of one window each, from texts and the model's own tokenizer.

    >>> letters = lambda text: {"input_ids": [ord(c) for c in text]}  # as a tokenizer is called
    >>> batches = text_batches(letters, ["one text", "another"], samples=2, length=4)
    >>> [tuple(batch["input_ids"].shape) for batch in batches]
    [(1, 4), (1, 4)]

    The texts are joined by blank lines, tokenised once and cut at random places, so that every
    window is full and nothing is padded. Of a large source only a part is read, about four times
    what the windows hold.

    Args:
        tokenizer: one of transformers, or anything that gives `tokenizer(text)["input_ids"]`.
        source: a list of strings; rows with a column "text" or with one column alone, such as a
            split of `datasets`; the path of a text file (one text) or of a `.jsonl` file of rows.
            A list or a split is read in a seeded order (a large one in runs of neighbouring rows,
            which often are one article); a generator or a streaming split in its own order, and no
            further than needed. Texts without a letter are left out.
        samples: how many windows.
        length: tokens in each; cut to the tokenizer's `model_max_length`, with a warning.
        seed: of the order and of the places; the same gives the same bits.
        chat: the source holds conversations: lists of {"role": ..., "content": ...}, or rows with
            a column "messages" or "conversations" (also of {"from": ..., "value": ...}). They are
            written by the tokenizer's chat template, and windows begin where one of them begins.

    Returns:
        `samples` times {"input_ids": (1, length) int64}, which `sparsify`, `compare` and
        `perplexity` take. Fewer if there are not so many different windows, and a single shorter
        one if all texts together are shorter than that; both with a warning.

    Raises:
        InputError: the source is none of these, or holds no text; the tokenizer gives no token
            ids, or has no chat template.
    """
    for name, number in (("samples", samples), ("length", length)):
        if number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")
    if not callable(tokenizer):
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__}; expected one of transformers, or a "
            'callable that gives tokenizer(text)["input_ids"]'
        )
    if (most := longest_of(tokenizer)) < length:
        _warn(
            f"the tokenizer's model_max_length is {most}: windows have so many tokens, not {length}"
        )
        length = most
    rows = in_seeded_order(source, seed)
    characters = CHARACTERS_PER_TOKEN * samples * length
    if chat:
        texts = conversations_of(rows, tokenizer)
        tokens, places = _conversations(tokenizer, texts, characters, samples, length)
    else:
        tokens, places = _joined(tokenizer, texts_of(rows), characters, length)
    if not len(tokens):
        raise InputError("the source holds no text")
    if len(tokens) < length:
        _warn(f"the texts have {len(tokens)} tokens: one window of these, none of {length}")
        return [{"input_ids": tokens[None]}]
    if len(places) < samples:
        _warn(f"the texts hold {len(places)} different windows of {length} tokens, not {samples}")
    return [{"input_ids": tokens[i : i + length][None]} for i in _drawn(places, samples, seed)]


def tokenise(tokenizer: Any, documents: Sequence[str]) -> Tensor:
    """All documents, joined by blank lines and tokenised once: (tokens,) int64."""
    return _ids(tokenizer, "\n\n".join(documents))


def some_documents(documents: Sequence[str], characters: int, seed: int) -> list[str]:
    """Documents in a seeded order until there are enough characters, the last one cut."""
    return _first((text for _, text in in_seeded_order(documents, seed)), characters)


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
    return tokens[_random(len(tokens) - length + 1, count, seed)[:, None] + torch.arange(length)]


def longest_of(tokenizer: Any) -> int:
    """How many tokens a transformers tokenizer says that its model reads; where it does not say,
    it gives a very large number, and so does this."""
    most = getattr(tokenizer, "model_max_length", None)
    return int(most) if isinstance(most, int | float) and most >= 1 else 1 << 60


def context_of(model: nn.Module) -> int | None:
    """How many tokens a transformers model's position embeddings hold, or None."""
    config = getattr(model, "config", None)
    if callable(text_config := getattr(config, "get_text_config", None)):
        config = text_config()
    return getattr(config, "max_position_embeddings", None)


def _joined(
    tokenizer: Any, texts: Iterator[str], characters: int, length: int
) -> tuple[Tensor, Sequence[int]]:
    """Enough texts as one row of tokens, and where a window may begin: anywhere."""
    taken = _first(texts, characters)
    tokens = tokenise(tokenizer, taken) if taken else torch.empty(0, dtype=torch.int64)
    while len(tokens) < length and (more := _first(texts, characters)):
        taken += more  # the tokenizer makes few tokens of much text
        tokens = tokenise(tokenizer, taken)
    return tokens, range(max(0, len(tokens) - length + 1))


def _conversations(
    tokenizer: Any, texts: Iterator[str], characters: int, samples: int, length: int
) -> tuple[Tensor, Sequence[int]]:
    """Enough conversations as one row of tokens, and where one begins that is a full window."""
    parts: list[Tensor] = []
    starts, total = list[int](), 0
    for text in texts:
        starts.append(total)
        parts.append(_ids(tokenizer, text, add_special_tokens=False))  # the template writes them
        total, characters = total + len(parts[-1]), characters - len(text)
        windows = bisect_right(starts, total - length)
        if characters <= 0 and windows >= samples:
            break
    tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    return tokens, starts[: bisect_right(starts, total - length)]


def _drawn(places: Sequence[int], count: int, seed: int) -> list[int]:
    """So many of the places, or every one once."""
    if len(places) <= count:
        return list(places)
    if isinstance(places, range):  # so many that none comes twice but by a rare chance
        return [places[i] for i in _random(len(places), count, seed).tolist()]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    return [places[i] for i in order[:count].tolist()]


def _random(below: int, count: int, seed: int) -> Tensor:
    return torch.randint(below, (count,), generator=torch.Generator().manual_seed(seed))


def _first(texts: Iterable[str], characters: int) -> list[str]:
    """Texts until there are enough characters, the last one cut; no text more is asked for."""
    texts, taken = iter(texts), list[str]()
    while characters > 0 and (one := list(islice(texts, 1))):
        taken.append(one[0][:characters])
        characters -= len(one[0])
    return taken


def _ids(tokenizer: Any, text: str, **options: Any) -> Tensor:
    """(tokens,) int64."""
    if hasattr(tokenizer, "model_max_length"):  # and so would warn of texts longer than that
        options["verbose"] = False
    found = tokenizer(text, **options)
    try:
        ids = torch.as_tensor(found["input_ids"])
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError):
        raise InputError(
            f'the tokenizer gave a {type(found).__name__} without usable "input_ids" for a text; '
            "expected what a transformers tokenizer gives"
        ) from None
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1 or (len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise InputError(
            f'the tokenizer gave "input_ids" {ids.dtype} {tuple(ids.shape)} for a text; expected '
            "one row of whole numbers"
        )
    return ids.to("cpu", torch.int64)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
