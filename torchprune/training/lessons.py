"""What recovery trains on: batches as calls of a model, and what of their predictions counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.calibration.batches import Batch
from torchprune.calibration.block_calls import floats_of
from torchprune.calibration.data import Data
from torchprune.calibration.nested import mapped, tensors_in
from torchprune.calibration.synthesis import can_synthesise, windows_of
from torchprune.errors import CalibrationError

Loss = Callable[[Any, Any], Tensor]
"""A user's own: (model, batch) -> a scalar. Whatever it calls, it calls the model itself."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """One batch.

    Attributes:
        item: a call of the model; or, for a loss of the user's, the batch as it was given, on the
            model's device.
        labels: what the model is to predict, where it was not told: (batch, length) token ids,
            -100 where they do not count; None where the batch holds its own, or there are none.
        counts: (batch, length) bool, which predictions count; None: all.
    """

    item: Any
    labels: Tensor | None = None
    counts: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model said of a lesson.

    Attributes:
        logits: by call of the model, its predictions; mostly of one.
        loss: the scalar that it, or the user's function, gave; None without.
    """

    logits: list[Tensor]
    loss: Tensor | None


def read_lessons(data: Data, model: nn.Module, loss: Loss | None) -> tuple[list[Lesson], list[str]]:
    """The lessons, and what the report should say of them.

    Raises:
        CalibrationError: no usable data.
    """
    if loss is None or data.tokenizer is not None:
        batches, notes = data.read(model, "recover")
        notes = [note.replace("calibrated on", "trained on") for note in notes]
        if loss is None:
            return [lesson_of(batch, model) for batch in batches], notes
        return [Lesson(batch.kwargs) for batch in batches], notes
    if not isinstance(data.given, Iterable) or isinstance(data.given, Tensor | Mapping | str):
        raise CalibrationError(
            "recover: data must be an iterable of batches, such as loss(model, batch) takes, got a "
            f"{type(data.given).__name__}"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    items = list(islice(iter(data.given), data.max_batches + 1))
    if not items:
        raise CalibrationError("recover: data holds no batches (an exhausted generator?)")
    notes = []
    if len(items) > data.max_batches:
        notes.append(f"used the first {data.max_batches} batches; more were offered (max_batches)")
    some = items[: data.max_batches]
    return [Lesson(mapped(item, lambda _, t: t.to(device))) for item in some], notes


def lesson_of(batch: Batch, model: nn.Module) -> Lesson:
    """A lesson of a call: for a causal language model, what it should predict is the text."""
    labels = batch.kwargs.get("labels")
    causal = can_synthesise(model)
    if isinstance(labels, Tensor):
        counts = labels != -100
        if causal and labels.dim() == 2:  # a token is predicted one place earlier
            counts = torch.cat([counts[:, 1:], counts.new_zeros(len(counts), 1)], 1)
        return Lesson(batch, None, counts if labels.dim() == 2 else None)
    if not causal or not windows_of([batch]):
        return Lesson(batch)
    ids = batch.args[0] if batch.args else batch.kwargs["input_ids"]
    real: Any = batch.kwargs.get("attention_mask")
    real = real.bool() if isinstance(real, Tensor) else batch.tokens
    return Lesson(batch, ids if real is None else ids.masked_fill(~real, -100), real)


def has_labels(lesson: Lesson) -> bool:
    """Whether a transformers model can give a loss for it."""
    own = isinstance(lesson.item, Batch) and lesson.item.kwargs.get("labels") is not None
    return own or lesson.labels is not None


def ask(model: nn.Module, lesson: Lesson, loss: Loss | None, *, labelled: bool) -> Answer:
    """Call a model, for its predictions and its loss.

    Args:
        labelled: whether the loss is wanted.

    Raises:
        CalibrationError: the loss is no scalar.
    """
    if loss is None:
        batch: Batch = lesson.item
        if labelled and lesson.labels is not None:
            batch = Batch(batch.args, {**batch.kwargs, "labels": lesson.labels})
        out = batch.run(model)
        found = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        return Answer([logits_of(out)], found)
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, args, out: seen.append(logits_of(out)))
    try:
        value = loss(model, lesson.item)
    finally:
        handle.remove()
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise CalibrationError(
            "recover: loss(model, batch) must give a scalar tensor, got "
            + (f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__)
        )
    return Answer(seen, value.reshape(()))


def logits_of(out: Any) -> Tensor:
    """A model's predictions: its output, or what that has under `logits`, or its first tensor."""
    named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if isinstance(named, Tensor):
        return named
    found = floats_of(out)
    return found[0] if found else torch.empty(0)


def parted(
    lessons: Sequence[Lesson], share: float, own: int = 0
) -> tuple[list[Lesson], list[Lesson]]:
    """Those to learn from, and the last ones to judge by, at most 8; all for both if too few.

    Args:
        own: so many, the first ones, are a model's own text, which judges nothing.
    """
    count = min(8, len(lessons) - 1, max(1, round(share * (len(lessons) - own))))
    if count < 1 or not share:
        return list(lessons), list(lessons)
    return list(lessons[:-count]), list(lessons[-count:])


def tokens_in(lesson: Lesson) -> int:
    """Tokens of a text, or else items of a batch."""
    if lesson.counts is not None:
        return int(lesson.counts.sum())
    if lesson.labels is not None:
        return lesson.labels.numel()
    first = next(iter(tensors_of(lesson)), None)
    if first is None or not first.dim():
        return 1
    return first.numel() if not first.is_floating_point() else len(first)


def tensors_of(lesson: Lesson) -> list[Tensor]:
    """The tensors that its batch is made of."""
    item = lesson.item
    if isinstance(item, Batch):
        return list(item.tensors())
    return [tensor for _, tensor in tensors_in(item)]
