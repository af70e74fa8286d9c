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


class InRuntime:
    """A float32 file of `to_onnx(..., with_cache=True)` in ONNX Runtime, after the same context."""

    def __init__(self, path: Path, context: Tensor) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self.names = [i.name for i in inputs]
        shapes = [i.shape for i in inputs[2:]]
        self.past = [np.zeros((1, heads, 0, size), np.float32) for _, heads, _, size in shapes]
        self.token, self.length = context.numpy(), 0
        self.seconds: list[float] = []
        self.step()
        self.seconds.clear()

    def step(self) -> None:
        start = time.perf_counter()
        self.length += self.token.shape[1]
        mask = np.ones((1, self.length), np.int64)
        inputs = dict(zip(self.names, [self.token, mask, *self.past], strict=True))
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
