"""What a model writes for some prompts, to be read beside another's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchprune.calibration.text import context_of
from torchprune.errors import InputError
from torchprune.modes import eval_mode
from torchprune.reports.pieces import Pair, Pairs

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, in a small village by the sea,",
    "To make a good cup of tea, first",
)
"""For a quick look: two facts, a story, a procedure."""


def greedy(model: Any, tokenizer: Any, prompts: Sequence[str], *, tokens: int = 48) -> list[str]:
    """The likeliest continuation of each prompt, one token at a time, without the prompt.

    Args:
        model: a causal language model of transformers.
        tokens: at most so many new ones, fewer where the model's context ends before.

    Raises:
        InputError: a prompt fills the context.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    context, found = context_of(model), []
    with eval_mode(model), torch.no_grad():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
            room = tokens if context is None else min(tokens, context - ids.shape[1])
            if room < 1:
                raise InputError(
                    f"a prompt of {ids.shape[1]} tokens leaves no room in the model's context of "
                    f"{context}: {prompt!r:.60}; give a shorter one"
                )
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=room,
                pad_token_id=0 if end is None else end,
            )
            text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            found.append(text)
    return found


def pairs_of(prompts: Sequence[str], dense: Sequence[str], pruned: Sequence[str]) -> Pairs:
    """Both models' texts for a page."""
    triples = zip(prompts, dense, pruned, strict=True)
    return Pairs("Greedy continuations", [Pair(*triple) for triple in triples])
