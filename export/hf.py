"""Plain transformers checkpoints: masks folded into dense weights, nothing else to know."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchprune.checkpoint.checked_files import plain_file, read_json
from torchprune.checkpoint.whole_files import staged
from torchprune.errors import CheckpointError, MissingExtraError
from torchprune.lowering.lower import lift
from torchprune.masking.mask import detach, masked_layers
from torchprune.masking.plain_state import slots_of, ties_of
from torchprune.reports.report import report
from torchprune.structure.config import is_accepted, is_native
from torchprune.structure.narrowed import record_of
from torchprune.structure.pad import pad_to_widest

NOTE = "torchprune.json"
"""The file that says how the exported weights came about. Loaders ignore it."""

_FORMAT = "torchprune-export"


def to_hf(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    pad_to_max: bool = False,
    example_inputs: Any = None,
) -> None:
    """Write a transformers model as a checkpoint that stock transformers reads, masks folded and
    lowered layers dense again.

    The law: `AutoModelForCausalLM.from_pretrained(directory)`, or the Auto class of the model's
    kind, gives logits equal to the model's, as far as `save_pretrained` can keep them: weights are
    cast to the first one's dtype, and buffers outside the `state_dict` computed anew (which undoes
    the rounding of rotary frequencies by `model.bfloat16()`; `torchprune.save` keeps it). The model
    keeps its masks. `torchprune.json` holds the report.

    A shrunk model must have a configuration that says its sizes. A Llama whose number of heads does
    not divide its width, which the class refuses, is written as the Mistral it equals.

    Args:
        model: a transformers model, masked, lowered (which it stays) or neither.
        directory: a new or empty one, or one that holds an earlier export, which is replaced with
            everything in it. It appears whole or not at all.
        tokenizer: saved along if given.
        pad_to_max: where a shrunk model's widths differ from layer to layer, fill them up with
            zeros to the widest, which stock classes can hold.
        example_inputs: one call of the model, to find by export what is to be filled up; by default
            the model's own `dummy_inputs`.

    Raises:
        MissingExtraError: transformers is absent.
        CheckpointError: the model is not of transformers, a masked weight is tied, its class has no
            configuration for its sizes, or for the heads that an attention with ALiBi kept, or the
            directory holds something else.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError:
        raise MissingExtraError("transformers", "transformers", "torchprune.export.to_hf") from None
    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(
            f"to_hf writes transformers models, got a {type(model).__name__}; torchprune.save "
            "writes any"
        )
    if narrowed := record_of(model):
        raise CheckpointError(
            f"{next(iter(narrowed))} picks what belongs to its heads from what it is given for all "
            "of them, which no class of transformers does; torchprune.save keeps that, for "
            "torchprune.load"
        )
    folded: Any = lift(folded_copy(model))
    if pad_to_max and not is_native(folded):
        pad_to_widest(folded, folded.dummy_inputs if example_inputs is None else example_inputs)
    folded = _in_stock_form(folded, pad_to_max)
    with staged(directory, _is_export, "an export of torchprune") as partial:
        folded.save_pretrained(str(partial))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        note = {"format": _FORMAT, "report": report(model).to_dict()}
        (partial / NOTE).write_text(json.dumps(note, indent=1) + "\n", "utf-8")


def _in_stock_form(model: Any, padded: bool) -> Any:
    """The model as a class of transformers that makes its sizes from a configuration it accepts."""
    name = type(model).__name__
    if not is_native(model):
        hint = (
            "even padded" if padded else "to_hf(..., pad_to_max=True) fills them up where they vary"
        )
        raise CheckpointError(
            f"the configuration of a {name} cannot say the sizes of this one's tensors ({hint}); "
            "torchprune.save keeps them, for torchprune.load"
        )
    refusal = is_accepted(model)
    if refusal is None:
        return model
    if name != "LlamaForCausalLM" or model.config.attention_bias or model.config.mlp_bias:
        raise CheckpointError(
            f"transformers would refuse the configuration ({refusal}); remove another number of "
            "heads, or use torchprune.save, which keeps them for torchprune.load"
        )
    return _as_mistral(model)


def _as_mistral(llama: Any) -> Any:
    """The same tensors under a class that computes the same and accepts any number of heads."""
    from transformers import MistralConfig, MistralForCausalLM

    settings = llama.config.to_dict()
    for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):
        settings.pop(name, None)
    config = MistralConfig(**{**settings, "sliding_window": None})
    with torch.device("meta"):
        mistral: Any = MistralForCausalLM(config)
    mistral.load_state_dict(llama.state_dict(), assign=True)
    mistral.tie_weights()
    mistral.model.rotary_emb = llama.model.rotary_emb
    mistral.generation_config = llama.generation_config
    return mistral.eval()


def folded_copy(model: nn.Module) -> nn.Module:
    """A copy without masks whose weights are the folded ones; it shares all the other tensors.

    Raises:
        CheckpointError: a masked weight is tied to another.
    """
    slots = slots_of(model)
    for key, owner in ties_of(slots).items():
        if slots[key].mask is not slots[owner].mask:
            raise CheckpointError(
                f"{key} is tied to {owner}, and masked; give it a weight of its own first"
            )
    memo: dict[int, Any] = {}
    for slot in slots.values():
        memo[id(slot.tensor)] = slot.tensor
        if slot.mask is not None:
            if not slot.mask.makes_ready(slot.tensor):
                with torch.no_grad():
                    folded = slot.mask(slot.tensor)
                memo[id(slot.tensor)] = nn.Parameter(folded, slot.tensor.requires_grad)
            for part in slot.mask.buffers():
                memo[id(part)] = part
    plain = copy.deepcopy(model, memo)
    for layer, _ in list(masked_layers(plain)):
        detach(layer.module, layer.tensor)
    return plain


def _is_export(directory: Path) -> bool:
    try:
        return read_json(plain_file(directory, NOTE)).get("format") == _FORMAT
    except (CheckpointError, OSError):
        return False
