"""Language models that decode greedily, one token a step, in torch and in ONNX Runtime.

Contenders take turns, a token each, so that a busy machine hurts them alike; medians are compared.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

WARM_UP = 3
"""Steps of each that are not counted."""


class Contender(Protocol):
    """Something that decodes."""

    seconds: list[float]

    def step(self) -> None:
        """Decode a token, and add the seconds that it took."""


class InTorch:
    """A transformers model with its key-value cache, after a context (1, tokens)."""

    def __init__(self, model: nn.Module, context: Tensor) -> None:
        self.model, self.seconds = model, list[float]()
        with torch.no_grad():
            out = model(context, use_cache=True)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def step(self) -> None:
        start = time.perf_counter()
        with torch.no_grad():
            out = self.model(self.token, past_key_values=self.cache, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)
        self.seconds.append(time.perf_counter() - start)


def no_past(session: onnxruntime.InferenceSession, rows: int = 1) -> list[np.ndarray]:
    """The cache before the first token, for a float32 file of `to_onnx(..., with_cache=True)`."""
    shapes = [i.shape for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    return [np.zeros((rows, heads, 0, size), np.float32) for _, heads, _, size in shapes]


def step_inputs(
    session: onnxruntime.InferenceSession,
    tokens: np.ndarray,
    mask: np.ndarray,
    past: list[np.ndarray],
) -> dict[str, np.ndarray]:
    """What such a file takes for a step.

    Args:
        tokens: (rows, new) ids.
        mask: (rows, past and new), 0 where a row is padded; shorter rows are padded on the left.
        past: as the last step gave it, or `no_past`.
    """
    given = {"input_ids": tokens, "attention_mask": mask}
    names = [i.name for i in session.get_inputs()]
    if "position_ids" in names:  # models whose positions follow from the mask do without
        given["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
    parts = [name for name in names if name.startswith("past_key_values.")]
    return given | dict(zip(parts, past, strict=True))


class InRuntime:
    """A float32 file of `to_onnx(..., with_cache=True)` in ONNX Runtime, after the same context."""

    def __init__(self, path: Path, context: Tensor) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.past = no_past(self.session)
        self.token, self.length = context.numpy(), 0
        self.seconds: list[float] = []
        self.step()
        self.seconds.clear()

    def step(self) -> None:
        start = time.perf_counter()
        self.length += self.token.shape[1]
        mask = np.ones((1, self.length), np.int64)
        inputs = step_inputs(self.session, self.token, mask, self.past)
        logits, *self.past = self.session.run(None, inputs)
        self.token = logits[:, -1:].argmax(-1)
        self.seconds.append(time.perf_counter() - start)


def race(contenders: Iterable[Contender], tokens: int) -> list[float]:
    """Let each decode so many tokens, in turns; median seconds a token of each."""
    some = list(contenders)
    for turn in range(-WARM_UP, tokens):
        for contender in some:
            if turn == 0:
                contender.seconds.clear()
            contender.step()
    return [median(contender.seconds) for contender in some]
