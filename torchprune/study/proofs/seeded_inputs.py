"""Inputs that anybody can make again, for a model whose class says what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SEED = 20260731
ROWS, LENGTH = 2, 8


def seeded_inputs(model: nn.Module, rows: int = ROWS, length: int = LENGTH) -> dict[str, Tensor]:
    """Keyword inputs of a transformers model, the same for the same seed; {} where nobody knows.

    Args:
        rows: of the batch.
        length: of token sequences.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is None or not isinstance(name, str):
        return {}
    generator = torch.Generator().manual_seed(SEED)
    if name == "input_ids":
        return _tokens(config, rows, length, generator)
    if name == "pixel_values":
        return _images(config, model, rows, generator)
    return {}


def _tokens(config: Any, rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    size = getattr(config.get_text_config(), "vocab_size", 0)
    if not isinstance(size, int) or size < 2:
        return {}
    low = min(3, size - 1)  # 0 to 2 are padding and ends of texts, mostly

    def drawn() -> Tensor:
        return torch.randint(low, size, (rows, length), generator=generator)

    inputs = {"input_ids": drawn()}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = drawn()
    return inputs


def _images(
    config: Any, model: nn.Module, rows: int, generator: torch.Generator
) -> dict[str, Tensor]:
    side = getattr(config, "image_size", 32) or 32
    height, width = side if isinstance(side, list | tuple) else (side, side)
    channels = getattr(config, "num_channels", 3)
    pixels = torch.randn(rows, channels, int(height), int(width), generator=generator)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), pixels.dtype)
    return {"pixel_values": pixels.to(dtype)}


def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The floating point tensors that a model gives, caches left out, in order."""
    with torch.no_grad():
        out = model(**inputs)
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, Mapping) else out
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
