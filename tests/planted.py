"""Violations planted in saved artifacts, with the checksums of what is there then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from saved import reseal, sealed
from torch import Tensor, nn

import torchprune
from torchprune.checkpoint.checksums import checksum, of_tensors
from torchprune.checkpoint.encoding import header_of
from torchprune.checkpoint.manifest import BITS_BESIDE, MANIFEST_BESIDE
from torchprune.masking.packing import pack_bits, pack_values, unpack_bits, unpack_values

Remask = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(mask, values, dense values) of one tensor -> another mask and other values."""

WEIGHTS = "weights.safetensors"


class Good:
    """An artifact that breaks no law, and the dense model that it was pruned from."""

    def __init__(self, family: str, spec: Any, dtype: torch.dtype = torch.float32, **how: Any):
        self.family, self.spec, self.dtype, self.how = family, spec, dtype, how

    def dense(self) -> nn.Module:
        return FAMILIES[self.family].make(self.dtype)

    def pruned(self) -> nn.Module:
        model, family = self.dense(), FAMILIES[self.family]
        data = family.data(self.dtype) if self.spec.needs_data else None
        return torchprune.sparsify(model, self.spec, data, progress=False, **self.how)

    def saved(self, directory: Path) -> Path:
        torchprune.save(self.pruned(), directory)
        return directory


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a save, and seal it anew."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    reseal(path.parent)


def edit_entry(home: Path, key: str, **values: Any) -> None:
    edit(home / "manifest.json", lambda m: m["tensors"][key].update(values))


def edit_blobs(home: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    blobs = load_file(home / WEIGHTS)
    change(blobs)
    save_file(blobs, home / WEIGHTS)
    reseal(home)


def shape_of(home: Path, key: str) -> tuple[int, ...]:
    return tuple(json.loads((home / "manifest.json").read_text())["tensors"][key]["shape"])


def remask(home: Path, key: str, dense: nn.Module, change: Remask) -> None:
    """Give a masked tensor of a save another mask or other values."""
    shape, was = shape_of(home, key), dense.state_dict()[key].detach()

    def changed(blobs: dict[str, Tensor]) -> None:
        keep = unpack_bits(blobs[f"{key}.bits"], shape)
        value = unpack_values(blobs[f"{key}.values"], keep)
        keep, value = change(keep.clone(), value.clone(), was)
        blobs[f"{key}.bits"] = pack_bits(keep)
        blobs[f"{key}.values"] = pack_values(value, keep)

    edit_blobs(home, changed)


def first(keep: Tensor, wanted: bool) -> tuple[int, ...]:
    """The place of the first weight that is kept, or pruned."""
    return tuple((keep == wanted).nonzero()[0].tolist())


def lost(keep: Tensor, value: Tensor, was: Tensor) -> tuple[Tensor, Tensor]:
    """One kept weight is pruned."""
    keep[first(keep, True)] = False
    return keep, value


def revived(keep: Tensor, value: Tensor, was: Tensor) -> tuple[Tensor, Tensor]:
    """One pruned weight is kept, with the value that it had."""
    at = first(keep, False)
    keep[at], value[at] = True, was[at]
    return keep, value


def wrote(number: float) -> Remask:
    """One kept weight has another value."""

    def change(keep: Tensor, value: Tensor, was: Tensor) -> tuple[Tensor, Tensor]:
        value[first(keep, True)] = number
        return keep, value

    return change


def shifted(axis: int) -> Remask:
    """One weight goes from a group of four to the next along an axis, with the values of then."""

    def change(keep: Tensor, value: Tensor, was: Tensor) -> tuple[Tensor, Tensor]:
        lines = keep.movedim(axis, -1)
        filled = was.movedim(axis, -1)
        row = lines.reshape(-1, lines.shape[-1])[0]
        gone, come = int(row[:4].nonzero()[0]), 4 + int((~row[4:8]).nonzero()[0])
        zero = (0,) * (lines.dim() - 1)
        lines[(*zero, gone)], lines[(*zero, come)] = False, True
        value.movedim(axis, -1)[(*zero, come)] = filled[(*zero, come)]
        return keep, value

    return change


def swapped(home: Path, one: str, two: str) -> None:
    """Two layers of one shape have each other's masks and values."""

    def change(blobs: dict[str, Tensor]) -> None:
        for end in (".bits", ".values"):
            blobs[one + end], blobs[two + end] = blobs[two + end], blobs[one + end]

    edit_blobs(home, change)


def edit_plain(home: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a plain checkpoint; masks beside it are sealed anew."""
    path = home / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if (home / MANIFEST_BESIDE).exists():
        reseal_beside(home)


def reseal_beside(home: Path) -> None:
    path = home / MANIFEST_BESIDE
    manifest = json.loads(path.read_text())
    plain, bits = load_file(home / "model.safetensors"), load_file(home / BITS_BESIDE)
    manifest["header"] = checksum([header_of(home / BITS_BESIDE)])
    for key, entry in manifest["tensors"].items():
        parts = [bits[key + end] for end in (".bits", ".hidden", ".dense") if key + end in bits]
        if key in bits:
            parts = [bits[key]]
        elif key in plain:
            parts = [plain[key], *parts]
        if entry.get("encoding") != "tied" and (key in plain or key in bits):
            entry["checksum"] = of_tensors(parts)
    path.write_text(json.dumps(sealed(manifest)))
