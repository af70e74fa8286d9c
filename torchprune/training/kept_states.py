"""A model's whole state in files, to come back to: bit for bit, with its masks and what they hide.

The law: after `keep(m, at)` and whatever training or pruning, `bring_back(m, at)` makes every
parameter, buffer, mask, hidden value and record of `m` what it was, and its training flags;
parameters stay the same objects. The directory is one of `torchprune.save`; what that leaves out
lies in a second file beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor, nn

from torchprune.checkpoint.save_load import load_into, save
from torchprune.masking.mask import Mask
from torchprune.masking.plain_state import slots_of
from torchprune.training.sealed_files import read_sealed, remove_sealed, write_sealed


def keep(model: nn.Module, at: Path) -> None:
    """Write a model's state under a name that nothing reads yet.

    Raises:
        CheckpointError: the model holds what cannot be saved; see `torchprune.save`.
    """
    save(model, at)
    slots = slots_of(model)
    rest: dict[str, Tensor] = {}
    for key, slot in slots.items():
        if slot.mask is not None and slot.mask.hidden is not None:
            rest[f"hidden {key}"] = slot.mask.hidden
        elif slot.kind == "transient" and not slot.tensor.is_floating_point():
            rest[f"buffer {key}"] = slot.tensor
    parameters = [slot for slot in slots.values() if slot.kind == "parameter"]
    flags = {
        "eval": [name for name, module in model.named_modules() if not module.training],
        "frozen": [slot.key for slot in parameters if not slot.tensor.requires_grad],
    }
    write_sealed(_beside(at), rest, flags)


def bring_back(model: nn.Module, at: Path) -> None:
    """Make a model what it was when it was kept there; it may be another copy of it.

    Raises:
        CheckpointError: files are damaged or absent, or of another model. The model is then as it
            was.
    """
    rest, flags = read_sealed(_beside(at))
    load_into(model, at)
    for key, slot in slots_of(model).items():
        hidden, buffer = rest.get(f"hidden {key}"), rest.get(f"buffer {key}")
        if slot.mask is not None:
            _hide(slot.mask, hidden)
        if buffer is not None and buffer.dtype == slot.tensor.dtype:
            slot.tensor.data = buffer.to(slot.tensor.device)
        if slot.kind == "parameter":
            slot.tensor.requires_grad_(key not in flags["frozen"])
    evaluating = set(flags["eval"])
    for name, module in model.named_modules():
        module.training = name not in evaluating


def discard(at: Path) -> None:
    """Remove what `keep` wrote there, if anything."""
    shutil.rmtree(at, ignore_errors=True)
    remove_sealed(_beside(at))


def _beside(at: Path) -> Path:
    return at.with_name(f"{at.name}.rest.safetensors")


def _hide(mask: Mask, hidden: Tensor | None) -> None:
    mask.hidden = None if hidden is None else hidden.to(mask.bits.device)
