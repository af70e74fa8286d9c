"""A model's whole state in files, to come back to: bit for bit, with its masks and what they hide.

The law: after `keep(m, at)` and whatever training or pruning, `bring_back(m, at)` makes every
parameter, buffer, mask, hidden value and record of `m` what it was, and its training flags;
parameters stay the same objects. The directory is one of `torchprune.save`; what that leaves out
lies in a second file beside it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchprune.checkpoint.checksums import checksum
from torchprune.checkpoint.save_load import load_into, save
from torchprune.errors import CheckpointError
from torchprune.masking.mask import Mask
from torchprune.masking.plain_state import slots_of

_FLAGS = "flags"
_CHUNK = 1 << 24


def keep(model: nn.Module, at: Path) -> None:
    """Write a model's state under a name that nothing reads yet.

    Raises:
        CheckpointError: the model holds what cannot be saved; see `torchprune.save`.
    """
    save(model, at)
    slots = slots_of(model)
    blobs: dict[str, Tensor] = {}
    for key, slot in slots.items():
        if slot.mask is not None and slot.mask.hidden is not None:
            blobs[f"hidden {key}"] = _plain(slot.mask.hidden)
        elif slot.kind == "transient" and not slot.tensor.is_floating_point():
            blobs[f"buffer {key}"] = _plain(slot.tensor)
    flags = {
        "eval": [name for name, module in model.named_modules() if not module.training],
        "frozen": [k for k, s in slots.items() if s.kind == "parameter" and not _learns(s.tensor)],
    }
    save_file(blobs, str(_beside(at)), metadata={_FLAGS: json.dumps(flags)})
    seal = _beside(at).with_suffix(".sum")
    seal.write_text(_sum_of(_beside(at)), "utf-8")


def bring_back(model: nn.Module, at: Path) -> None:
    """Make a model what it was when it was kept there; it may be another copy of it.

    Raises:
        CheckpointError: files are damaged or absent, or of another model. The model is then as it
            was.
    """
    blobs, flags = _read(at)
    load_into(model, at)
    slots = slots_of(model)
    for key, slot in slots.items():
        hidden, buffer = blobs.get(f"hidden {key}"), blobs.get(f"buffer {key}")
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
    for path in (_beside(at), _beside(at).with_suffix(".sum")):
        path.unlink(missing_ok=True)


def _beside(at: Path) -> Path:
    return at.with_name(f"{at.name}.rest.safetensors")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _learns(tensor: Tensor) -> bool:
    return tensor.requires_grad


def _hide(mask: Mask, hidden: Tensor | None) -> None:
    mask.hidden = None if hidden is None else hidden.to(mask.bits.device)


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return checksum(iter(lambda: file.read(_CHUNK), b""))


def _read(at: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path, seal = _beside(at), _beside(at).with_suffix(".sum")
    for needed in (path, seal):
        if not needed.is_file():
            raise CheckpointError(f"{needed} is missing, or no regular file")
    if (found := _sum_of(path)) != (written := seal.read_text("utf-8", "replace")):
        raise CheckpointError(
            f"{path}: damaged or changed: it has the checksum {found}, but was written with "
            f"{written!r:.20}"
        )
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            flags = json.loads(file.metadata()[_FLAGS])
            return {name: file.get_tensor(name).clone() for name in file.keys()}, flags  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error!s:.200})") from None
