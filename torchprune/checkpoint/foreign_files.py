"""Directories with pruned models of other libraries, read into masked ones."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchprune.checkpoint.checked_files import plain_file, read_json
from torchprune.checkpoint.foreign_masks import mask_names, plain_tensors
from torchprune.checkpoint.manifest import MANIFEST, MANIFEST_BESIDE
from torchprune.checkpoint.skeleton import CONFIG, GENERATION, Skeleton
from torchprune.errors import CheckpointError, MaskError
from torchprune.masking.mask import apply_masks
from torchprune.structure.snapshot import Snapshot

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

_SPARSITY = ("sparsity_config", "compression_config", "quantization_config")
"""Settings in which a configuration says how its weights were pruned or compressed."""

_SPARSE = 0.25
"""Share of zeros from which a plain weight of a checkpoint that says it is pruned has a mask."""


def is_foreign(directory: Path) -> bool:
    """Whether a directory holds a pruned model that another library wrote.

    Raises:
        CheckpointError: it holds damaged files, or one whose weights are quantized too.
    """
    if (directory / MANIFEST).exists() or (directory / MANIFEST_BESIDE).exists():
        return False
    return bool(mask_names(_names(directory))) or _sparsity_of(directory) is not None


def load_foreign(directory: Path) -> nn.Module:
    """The masked transformers model that such a directory holds; see `torchprune.load`."""
    plain, masks = _read(directory)
    config = read_json(plain_file(directory, CONFIG))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        stripped = {key: value for key, value in config.items() if key not in _SPARSITY}
        (home / CONFIG).write_text(json.dumps(stripped), "utf-8")
        generation = directory / GENERATION
        if generation.is_file():
            settings = read_json(plain_file(directory, GENERATION))
            (home / GENERATION).write_text(json.dumps(settings), "utf-8")
        save_file(plain, home / _WEIGHTS, metadata={"format": "pt"})
        skeleton = Skeleton(
            home / CONFIG,
            None,
            tensors=len(plain),
            largest=max((max(t.shape, default=1) for t in plain.values()), default=1),
            held=sum(t.nbytes for t in plain.values()),
        )
        skeleton.on_meta()
        model, found = skeleton.read_plain(home)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(what):
            some = ", ".join(sorted(map(str, found[what])))
            raise CheckpointError(f"{directory}: {what.replace('_', ' ')}: {some:.300}")
    _mask(model, masks, directory)
    return model


def fill_foreign(model: nn.Module, directory: Path) -> None:
    """Give a model the weights and masks of such a directory, in place; all or none of them."""
    plain, masks = _read(directory)
    own = model.state_dict()
    if own.keys() != plain.keys():
        differing = ", ".join(sorted(own.keys() ^ plain.keys()))
        raise CheckpointError(f"{directory} and the model differ in {differing:.300}")
    for name, value in plain.items():
        if value.shape != own[name].shape or value.dtype != own[name].dtype:
            raise CheckpointError(
                f"{name}: expected {own[name].dtype} {tuple(own[name].shape)}, got {value.dtype} "
                f"{tuple(value.shape)}"
            )
    before = Snapshot(model)
    try:
        with torch.no_grad():
            for name, value in plain.items():
                own[name].copy_(value)
        _mask(model, masks, directory)
    except BaseException:
        before.restore()
        raise


def _read(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Plain tensors and masks; those of plain weights where the configuration says pruned."""
    tensors: dict[str, Tensor] = {}
    for path in _files(directory):
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in tensors:
                        raise CheckpointError(f"{directory}: {name} is in two files")
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or truncated: {error}") from error
    try:
        plain, masks = plain_tensors(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    if _sparsity_of(directory) is not None:
        for name, tensor in plain.items():
            pruned = name not in masks and tensor.dim() > 1 and tensor.is_floating_point()
            if pruned and int((tensor == 0).sum()) >= _SPARSE * tensor.numel():
                masks[name] = tensor != 0
                plain[name] = torch.where(masks[name], tensor, torch.zeros((), dtype=tensor.dtype))
    return plain, masks


def _names(directory: Path) -> set[str]:
    names = set[str]()
    for path in _files(directory):
        try:
            with safe_open(str(path), framework="pt") as file:
                names |= set(file.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or truncated: {error}") from error
    return names


def _files(directory: Path) -> list[Path]:
    """The files that transformers reads, or all there are where it reads none."""
    if (directory / _INDEX).is_file():
        shards = read_json(plain_file(directory, _INDEX)).get("weight_map")
        if not isinstance(shards, dict):
            raise CheckpointError(f"{directory / _INDEX}: it has no weight_map")
        names = sorted(set(map(str, shards.values())))
    elif (directory / _WEIGHTS).is_file():
        names = [_WEIGHTS]
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    return [plain_file(directory, name) for name in names]


def _sparsity_of(directory: Path) -> Mapping[str, Any] | None:
    """What a configuration says of its sparsity, if anything.

    Raises:
        CheckpointError: it says that the weights are quantized too.
    """
    if not (directory / CONFIG).is_file():
        return None
    config = read_json(plain_file(directory, CONFIG))
    found: Mapping[str, Any] | None = None
    for key in _SPARSITY:
        said = config.get(key)
        if not isinstance(said, Mapping):
            continue
        groups = said.get("config_groups") or (said.get("quantization_config") or {})
        inner = said if key == "sparsity_config" else said.get("sparsity_config")
        if isinstance(inner, Mapping) and inner:
            found = inner
            if groups:
                raise CheckpointError(
                    f"{directory}: its {key} says that weights are quantized too, which is not "
                    "read here; decompress it with the library that wrote it"
                )
    return found


def _mask(model: nn.Module, masks: Mapping[str, Tensor], directory: Path) -> None:
    try:
        apply_masks(model, masks)
    except MaskError as error:
        raise CheckpointError(f"{directory}: {error}") from error
