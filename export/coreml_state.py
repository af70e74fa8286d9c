"""A decoder whose key-value cache is state inside the program: a window over the last tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.errors import ExportError
from torchprune.export.cached import CachedModel
from torchprune.export.call import Call, Sample, run

_STEPS = 3
"""Steps after one another that are checked."""


class StatefulModel(nn.Module):
    """`model(input_ids, attention_mask, prepared)` -> logits; the past is in its buffers.

    They hold the last `length` tokens, the newest at the end: every step drops as many of the
    oldest as it adds. `attention_mask` is (batch, length + new), zero for what is not filled yet,
    on the left. float16, which is the only type of Core ML's states.
    """

    def __init__(self, cached: CachedModel, batch: int, length: int) -> None:
        super().__init__()
        self.cached = cached
        self.states = [f"past_{layer}_{p}" for layer in cached.layers for p in ("key", "value")]
        for name, ((heads, _, size), _) in zip(self.states, cached.empty, strict=True):
            self.register_buffer(name, torch.zeros(batch, heads, length, size, dtype=torch.float16))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, prepared: list[Tensor]) -> Tensor:
        """One step over the new tokens; the buffers move on."""
        kept: list[Tensor] = [getattr(self, name) for name in self.states]
        types = [dtype for _, dtype in self.cached.empty]
        past = [state.to(dtype) for state, dtype in zip(kept, types, strict=True)]
        logits, present = self.cached(input_ids, attention_mask, prepared, past)
        for state, now in zip(kept, present, strict=True):
            state.copy_(now[:, :, input_ids.shape[1] :].to(state.dtype))
        return logits  # type: ignore[no-any-return]


def with_state(call: Call, length: int) -> Call:
    """The steps of a call with a cache, with the cache as state of `length` tokens.

    Raises:
        ExportError: it is shorter than a step, or the model takes inputs that grow with the past.
    """
    cached: Any = call.module
    tokens: Tensor = call.samples[0].args[0]
    batch, new = tokens.shape
    if length < new:
        raise ExportError(f"state: {length} tokens of past for steps of {new}; at least {new}")
    count = min(_STEPS, length // new + 1)
    texts = tokens.repeat(1, count)
    samples, past = [], [torch.zeros(batch, *shape, dtype=dtype) for shape, dtype in cached.empty]
    for at in range(count):
        seen = (at + 1) * new
        ids, mask = texts[:, :seen], torch.ones(batch, seen, dtype=torch.int64)
        prepared = cached.prepared_of(ids, mask, at * new)
        step = (ids[:, -new:], mask, prepared, past)
        logits, *past = run(cached, step, {})
        whole = torch.cat([torch.zeros(batch, length + new - seen, dtype=torch.int64), mask], 1)
        samples.append(Sample((step[0], whole, prepared), {}, [logits]))
    shapes = {tuple(tuple(t.shape) for t in sample.args[2]) for sample in samples}
    if len(shapes) > 1:
        raise ExportError("state: generate gives this model inputs that grow with the past")
    names = ["input_ids", "attention_mask", *cached.prepared]
    return replace(
        call,
        module=StatefulModel(cached, batch, length),
        args=samples[0].args,
        kwargs={},
        dynamic_shapes=None,
        samples=samples,
        inputs=names,
        wanted=[set() for _ in names],
        names=(names, ["logits"]),
    )
