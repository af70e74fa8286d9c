"""Whether a model still generates with its key-value cache after it became smaller.

A cache asks the configuration and the modules for more than a forward does: what kind each block
is, and which place in the cache is its own.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.calibration.batches import Batch

_STEPS = 3
_PROMPT = 16
"""Tokens of the example that are read, where it is text alone."""


def generated(model: nn.Module, example: Batch) -> list[Tensor] | None:
    """The logits of a few tokens after an example, one step a tensor.

    Returns:
        None if the model does not generate, or not from what the example holds.

    Raises:
        Exception: the model's own.
    """
    able = getattr(model, "can_generate", None)
    if not callable(getattr(model, "generate", None)) or not callable(able) or not able():
        return None
    prompt = _prompt(model, example.private())
    if prompt is None:
        return None
    owner: Any = model
    with modes.eval_mode(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = owner.generate(
            **prompt,
            max_new_tokens=_STEPS,
            min_new_tokens=_STEPS,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = getattr(out, "logits", None)
    return list(logits) if logits else None


def differing(found: list[Tensor], expected: list[Tensor], tolerance: float) -> str:
    """How the steps differ, as far as they chose the same tokens; empty if they do not."""
    for got, want in zip(found, expected, strict=False):
        largest = float(want.abs().max())
        apart = float((got - want).abs().max())
        if got.shape != want.shape or not apart <= tolerance * largest + 1e-6:
            return f"gives logits that differ by {apart:.3g} where the largest is {largest:.3g}"
        if not torch.equal(got.argmax(-1), want.argmax(-1)):
            return ""  # a tie: from here on they read different tokens
    return ""


def _prompt(model: Any, example: Batch) -> dict[str, Any] | None:
    """The part of an example that comes before what is generated."""
    main = getattr(model, "main_input_name", "input_ids")
    given = {**dict(zip([main], example.args, strict=False)), **example.kwargs}
    if len(example.args) > 1 or not isinstance(given.get(main), Tensor):
        return None
    apart = ("labels", "use_cache", "past_key_values", "return_dict")
    given = {
        name: value.clone() if isinstance(value, Tensor) else value  # some write into their prompt
        for name, value in given.items()
        if name not in apart and not name.startswith("decoder_")
    }
    ids = given[main]
    if given.keys() <= {main, "attention_mask"} and not ids.is_floating_point():
        given = {name: value[:1, :_PROMPT] for name, value in given.items()}
    return given
