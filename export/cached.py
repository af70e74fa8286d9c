"""A decoder-only language model with its key-value cache as plain tensors in and out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchprune.errors import ExportError, MissingExtraError

_PAST = 3
"""Tokens in the cache of the example; any number at run time."""


class CachedModel(nn.Module):
    """`model(input_ids, attention_mask, past)` -> logits, the cache with the new tokens.

    `past` is a flat list, for every layer its keys and its values, (batch, heads, past, size) each.
    A past of length 0 begins a text.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers = 0

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step over the new tokens."""
        try:
            from transformers import DynamicCache
        except ImportError:
            raise MissingExtraError("transformers", "transformers", "with_cache") from None
        pairs = list(zip(past[::2], past[1::2], strict=True))
        cache: Any = DynamicCache(pairs, config=self.model.config)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, _flat(out.past_key_values)

    def example(self, tokens: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Inputs of a step after a few tokens, made by running the model over those."""
        if tokens.shape[0] < 2 or tokens.shape[1] < 2:  # sizes of 1 would be taken for constants
            tokens = tokens.repeat(2, 2)
        begin = tokens[:, :1].repeat(1, _PAST)
        with torch.no_grad():
            out = self.model(begin, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        if not hasattr(cache, "layers") or not hasattr(out, "logits"):
            raise ExportError(
                f"with_cache is for decoder-only language models; a {type(self.model).__name__} "
                "gives no logits with a cache of layers"
            )
        past = _flat(cache)
        if any(part.dim() != 4 or part.shape[2] != _PAST for part in past):
            raise ExportError(
                f"with_cache: the cache of a {type(self.model).__name__} is not keys and values of "
                "all past tokens; export it without"
            )
        self.layers = len(past) // 2
        mask = torch.ones(len(tokens), _PAST + tokens.shape[1], dtype=torch.int64)
        return tokens, mask, past

    def names(self) -> tuple[list[str], list[str]]:
        """Names of inputs and outputs, as is usual for such graphs."""
        parts = [f"{i}.{part}" for i in range(self.layers) for part in ("key", "value")]
        return (
            ["input_ids", "attention_mask", *(f"past_key_values.{part}" for part in parts)],
            ["logits", *(f"present.{part}" for part in parts)],
        )

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """Batch, new tokens and past vary."""
        auto = torch.export.Dim.AUTO
        return {0: auto, 1: auto}, {0: auto, 1: auto}, [{0: auto, 2: auto}] * (2 * self.layers)


def _flat(cache: Any) -> list[Tensor]:
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]
