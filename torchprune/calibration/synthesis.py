"""Calibration text from the model itself, for when there is no data, or little.

A generative language model samples its own calibration set: seeded, batched, with its key-value
cache. Self-generated text was found competitive with C4 for pruning (Williams, Chrysostomou and
Aletras, "Self-calibration for Language Model Quantization and Pruning", arXiv 2410.17170). What it
writes on after pieces of real text stays near that text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchprune.calibration.batches import Batch
from torchprune.modes import eval_mode

SEQUENCES = 32
LENGTH = 512
_TOGETHER = {"cpu": 32}
"""Windows sampled at once by kind of device, 16 elsewhere: their caches take memory."""
_PROMPT = 64
"""Tokens of real text that a continuation begins with."""


def can_synthesise(model: nn.Module) -> bool:
    """Whether a model is a decoder-only transformers language model that can generate."""
    can = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    return (
        callable(can)
        and bool(can())
        and getattr(model, "main_input_name", "") == "input_ids"
        and not getattr(config, "is_encoder_decoder", False)
    )


def synthesise(
    model: Any,
    *,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
    progress: bool = True,
) -> list[Tensor]:
    """Sample token sequences from a causal language model.

    Args:
        model: one that `can_synthesise`.
        sequences, length: how many, and tokens in each; the length is cut to what the model's
            position embeddings hold.
        seed: of a generator state of its own; the global one is not advanced.

    Returns:
        `sequences` tensors (1, length) of token ids on the model's device.
    """
    config = model.config.get_text_config()
    length = _within(config, length)
    with _seeded(model, seed):
        starts = _first_tokens(config, sequences).to(model.device)
        return _sampled(model, starts, length, progress=progress)


def continuations(
    model: Any,
    batches: Sequence[Batch],
    count: int,
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[Batch]:
    """Windows that a causal language model writes on after pieces of calibration windows.

    Each is as long as the longest window, and begins with up to 64 consecutive tokens from
    anywhere in a window, the windows at least half as long taking turns.

    Args:
        model: one that `can_synthesise`.
        batches: calls of it with nothing but token ids (batch, length), by position or as
            `input_ids`, and perhaps their `attention_mask` and `labels`.
        count: windows to sample.
        seed: as for `synthesise`.

    Returns:
        batches of the first one's form and size, the last perhaps smaller, without `labels`; none
        if `windows_of` finds none.
    """
    windows = windows_of(batches)
    if not windows:
        return []
    longest = max(map(len, windows))
    windows = [window for window in windows if 2 * len(window) >= longest]
    length = _within(model.config.get_text_config(), longest)
    piece = min(_PROMPT, min(map(len, windows)) // 2, length - 1)
    places = torch.Generator().manual_seed(seed)
    starts = []
    for i in range(count):
        window = windows[i % len(windows)]
        at = int(torch.randint(len(window) - piece + 1, (), generator=places))
        starts.append(window[at : at + piece])
    with _seeded(model, seed):
        texts = _sampled(model, torch.stack(starts), length, progress=progress)
    rows = next(batches[0].tensors()).shape[0]
    return [_like(batches[0], ids) for ids in torch.cat(texts).split(max(1, rows))]


def windows_of(batches: Sequence[Batch]) -> list[Tensor]:
    """Each window's token ids (length,) without its padding, where there are two and more; none at
    all if a batch holds something else."""
    windows = []
    for batch in batches:
        given = dict(batch.kwargs)
        mask = given.pop("attention_mask", None)
        given.pop("labels", None)
        alone = [*batch.args, *given.values()]
        if len(alone) != 1 or not (batch.args or "input_ids" in given):
            return []
        ids = alone[0]
        if (
            not isinstance(ids, Tensor)
            or ids.dim() != 2
            or ids.dtype not in (torch.int64, torch.int32)
        ):
            return []
        if mask is None:
            mask = torch.ones_like(ids)
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            return []
        windows += [row[real.bool()] for row, real in zip(ids, mask, strict=True)]
    return [window for window in windows if len(window) > 1]


def _like(batch: Batch, ids: Tensor) -> Batch:
    """A call of the same form with other token ids, all of which count."""
    given: dict[str, Any] = {}
    if isinstance(mask := batch.kwargs.get("attention_mask"), Tensor):
        given["attention_mask"] = mask.new_ones(ids.shape)
    return Batch((ids,), given) if batch.args else Batch((), {"input_ids": ids, **given})


@contextmanager
def _seeded(model: Any, seed: int) -> Iterator[None]:
    """The global generators from a seed, and as they were after."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _within(config: Any, length: int) -> int:
    """The length, or what the position embeddings hold if that is less."""
    return min(length, getattr(config, "max_position_embeddings", None) or length)


def _sampled(model: Any, starts: Tensor, length: int, *, progress: bool) -> list[Tensor]:
    """Texts (1, length) that begin with the rows of `starts`, by the global generator."""
    padding = _one(getattr(model.config.get_text_config(), "pad_token_id", None), 0)
    found: list[Tensor] = []
    with (
        eval_mode(model),
        torch.no_grad(),
        tqdm(total=len(starts), desc="sampling text", unit="window", disable=not progress) as bar,
    ):
        for start in starts.split(_TOGETHER.get(starts.device.type, 16)):
            text = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                num_beams=1,
                min_length=length,
                max_length=length,
                max_new_tokens=None,
                use_cache=True,
                pad_token_id=padding,
            )
            found += list(text.split(1))
            bar.update(len(start))
    return found


def _first_tokens(config: Any, count: int) -> Tensor:
    """(count, 1) ids: the model's own first token, or random ones where it has none."""
    first = _one(getattr(config, "bos_token_id", None), None)
    if first is None:
        return torch.randint(config.vocab_size, (count, 1))
    return torch.full((count, 1), first)


def _one(value: Any, default: int | None) -> int | None:
    """A token id that may be given as a list."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return default if value is None else int(value)
