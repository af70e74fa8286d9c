"""Calibration text from the model itself, for when there is no data.

A generative language model samples its own calibration set: seeded, batched, with its key-value
cache. Self-generated text was found competitive with C4 for pruning (Williams, Chrysostomou and
Aletras, "Self-calibration for Language Model Quantization and Pruning", arXiv 2410.17170).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

SEQUENCES = 32
LENGTH = 512
_TOGETHER = 16


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
    limit = getattr(config, "max_position_embeddings", None) or length
    length = min(length, limit)
    device = model.device
    training = [module for module in model.modules() if module.training]
    model.eval()
    found: list[Tensor] = []
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        tqdm(total=sequences, desc="sampling text", unit="sequence", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        while len(found) < sequences:
            count = min(_TOGETHER, sequences - len(found))
            start = _first_tokens(config, count).to(device)
            text = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_length=length,
                max_length=length,
                max_new_tokens=None,
                use_cache=True,
                pad_token_id=_one(getattr(config, "pad_token_id", None), 0),
            )
            found += list(text.split(1))
            bar.update(count)
    for module in training:
        module.training = True
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
