"""A directory as it may be: a save of ours, masks beside a plain checkpoint, or that alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import nn

from torchprune.checkpoint.beside import plain_files
from torchprune.checkpoint.checked_files import plain_file, read_json
from torchprune.checkpoint.encoding import header_of
from torchprune.checkpoint.manifest import MANIFEST, MANIFEST_BESIDE, Manifest
from torchprune.checkpoint.save_load import load, load_into
from torchprune.checkpoint.skeleton import CONFIG, Skeleton
from torchprune.errors import CheckpointError
from torchprune.masking.mask import masked_layers
from torchprune.masking.parametrization import Record
from torchprune.masking.plain_state import slots_of
from torchprune.study.proofs.dense_beside import plain_record
from torchprune.study.proofs.proof import Breaches

Kind = Literal["saved", "beside", "plain"]

KINDS = {
    "saved": "a save of torchprune",
    "beside": "a checkpoint of transformers with masks beside it",
    "plain": "a plain checkpoint of transformers",
}
NOTE = "torchprune.json"
"""What `torchprune.export.to_hf` writes beside a plain checkpoint."""


def kind_of(home: Path) -> Kind | None:
    """What a directory holds, by the names of its files."""
    if (home / MANIFEST).exists() or (home / MANIFEST).is_symlink():
        return "saved"
    if (home / MANIFEST_BESIDE).exists() or (home / MANIFEST_BESIDE).is_symlink():
        return "beside"
    names = ("model.safetensors", "model.safetensors.index.json")
    if (home / CONFIG).exists() and any((home / name).exists() for name in names):
        return "plain"
    return None


def loaded(home: Path, manifest: Manifest, dense: nn.Module | None) -> nn.Module | None:
    """The masked model of a manifest, or None where nobody can build it.

    Args:
        dense: of a class that is not of transformers, a model to read it into a copy of.

    Raises:
        CheckpointError: files and model do not fit each other.
    """
    if manifest.config is not None:
        return load(home, verify=False)
    if dense is None or next(masked_layers(dense), None) is not None:
        return None
    return load_into(copy.deepcopy(dense), home, verify=False).eval()


@dataclass(frozen=True, eq=False)
class PlainArtifact:
    """A plain checkpoint.

    Attributes:
        files: of its weights.
        shapes: of their tensors, by the names that the files give.
        records: what an export's report says of its pruned layers, by the layer's name.
        zeros: how many zeros it says each has, and weights.
    """

    home: Path
    files: list[Path]
    shapes: Mapping[str, tuple[int, ...]]
    itemsize: int
    records: Mapping[str, Record] = field(default_factory=dict)
    zeros: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def read(self, found: Breaches) -> nn.Module:
        """The model; tensors that are missing, too many or of other sizes are noted.

        Raises:
            CheckpointError: it cannot be built.
        """
        skeleton = Skeleton(
            plain_file(self.home, CONFIG),
            None,
            tensors=len(self.shapes),
            largest=max((max(s, default=1) for s in self.shapes.values()), default=1),
            held=self.itemsize * sum(_product(s) for s in self.shapes.values()),
        )
        slots = slots_of(skeleton.on_meta())
        needed = sum(s.tensor.numel() for s in slots.values() if s.kind == "parameter")
        held = sum(_product(s) for s in self.shapes.values())
        if needed > 4 * held + (1 << 24):
            raise CheckpointError(f"{CONFIG} asks for {needed:,} weights, the files hold {held:,}")
        for name, shape in self.shapes.items():
            if name in slots and tuple(slots[name].tensor.shape) != shape:
                found.add(name, f"{tuple(slots[name].tensor.shape)} by {CONFIG}", shape)
        if found.count:
            raise CheckpointError(f"{CONFIG} and the files have other sizes")
        model, told = skeleton.read_plain(self.home)
        keys = slots_of(model)
        for name in self.records:
            if key_of(name, keys) is None:
                found.add(name, f"a layer that {NOTE} records", "none")
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            for key in sorted(map(str, told.get(what, ()))):
                found.add(key, f"no {what.replace('_', ' ')}", what.split("_")[0])
        return model


def key_of(name: str, keys: Mapping[str, object]) -> str | None:
    """The tensor that a layer of a report is: its own name, or its module's weight."""
    return next((key for key in (f"{name}.weight", name) if key in keys), None)


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def read_artifact(home: Path) -> PlainArtifact:
    """What a plain checkpoint holds, by its headers and the report beside it.

    Raises:
        CheckpointError: a file is damaged or absent.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files = plain_files(home, None)
    size = 1
    for path in files:
        header_of(path)
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                for key in sorted(file.keys()):
                    view = file.get_slice(key)
                    shapes[key] = tuple(view.get_shape())
            size = max(size, path.stat().st_size)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or truncated ({error!s:.200})") from None
    records, zeros = _noted(home)
    return PlainArtifact(home, files, shapes, 4, records, zeros)


def _noted(home: Path) -> tuple[dict[str, Record], dict[str, tuple[int, int]]]:
    """What the report beside an export says of its layers, each field of the type it has.

    Raises:
        CheckpointError: the report is malformed.
    """
    if not (home / NOTE).exists():
        return {}, {}
    data = read_json(plain_file(home, NOTE))
    told = data.get("report")
    layers: Any = told.get("layers") if isinstance(told, dict) else None
    if not isinstance(layers, list):
        raise CheckpointError(f"{home / NOTE}: a report with a list of layers is expected")
    records: dict[str, Record] = {}
    zeros: dict[str, tuple[int, int]] = {}
    for at, layer in enumerate(layers):
        texts = (
            [layer.get(k) for k in ("name", "method", "pattern", "note")]
            if isinstance(layer, dict)
            else []
        )
        if not texts or not all(isinstance(t, str) for t in texts):
            raise CheckpointError(f"{home / NOTE}: layers[{at}] is malformed")
        name, method, pattern, note = map(str, texts)
        counted, size = layer.get("zeros"), layer.get("size")
        if not all(type(n) is int and 0 <= n < 1 << 60 for n in (counted, size)):
            raise CheckpointError(f"{home / NOTE}: {name!r:.100} has no counts of zeros")
        records[name] = plain_record(method, pattern, note)
        zeros[name] = (counted, size)
    return records, zeros
