"""Saving and loading: one safetensors file of exact bits and a manifest that says what they are.

The law: `load(d)` after `save(m, d)` has bit-equal masks, bit-equal effective weights and buffers,
and an equal report. Pruned weights are not stored: a masked tensor takes one bit a weight and the
values its mask keeps. So a loaded model cannot be densified, unless `keep_dense` kept the dense
weights, which are stored then.
"""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchprune.checkpoint.beside import Convert, PlainFiles, opened
from torchprune.checkpoint.checked_files import MAX_JSON, plain_file
from torchprune.checkpoint.checksums import checksum
from torchprune.checkpoint.encoding import Decoded, WeightsFile, encode, write_blobs
from torchprune.checkpoint.foreign_files import fill_foreign, is_foreign, load_foreign
from torchprune.checkpoint.manifest import (
    SKIP,
    WEIGHTS,
    Entry,
    Manifest,
    is_saved,
    read_manifest,
    write_manifest,
)
from torchprune.checkpoint.skeleton import Skeleton, converted_by, write_config
from torchprune.checkpoint.whole_files import staged
from torchprune.errors import CheckpointError, ShrinkError
from torchprune.lowering.modules import BitmaskLinear
from torchprune.masking.mask import attach, detach, mask_of
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.plain_state import Slot, obstacle, slots_of, ties_of
from torchprune.reports.report import keep_runs, remember_source, runs_of
from torchprune.structure.size_record import resize, resized_of
from torchprune.structure.snapshot import Snapshot

Model = TypeVar("Model", bound=nn.Module)
Directory = str | os.PathLike[str]

_UNCHECKED = (
    "read from a file without checksums, written by an earlier torchprune: damage to it would not "
    "have been noticed (torchprune.save writes them)"
)


def save(model: nn.Module, directory: Directory, *, tokenizer: Any = None) -> None:
    """Write a model, masked or not, to a directory: tensors, masks, records, and what rebuilds it.

    The directory appears whole or not at all. An earlier save under that name is replaced, with
    everything in it.

    Args:
        model: any module. For a model of a transformers class its config and generation settings
            are saved, so that `load` can rebuild it.
        directory: a new or empty one, or one that holds an earlier save.
        tokenizer: saved along if given (its `save_pretrained` is called).

    Raises:
        CheckpointError: the directory holds something else, or the model holds what cannot be
            saved: tensors without plain values (meta, quantized, sparse, sharded), extra state, a
            masked weight that is tied.
    """
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"{path or 'the model'} has extra state, which is no tensor")
        if isinstance(module, BitmaskLinear):
            raise CheckpointError(
                f"{path or 'the model'} is lowered; save before torchprune.lower, or after "
                "torchprune.lift (files hold bitmasks and nonzeros in any case)"
            )
    entries, blobs = encode(slots_of(model))
    with staged(directory, is_saved, "a torchprune save") as partial:
        config, generation = write_config(model, partial)
        written = [name for name in (config, generation) if name is not None]
        header = write_blobs(partial / WEIGHTS, blobs)
        manifest = Manifest(
            tensors=entries,
            runs=runs_of(model),
            architecture=type(model).__name__,
            resized=resized_of(model),
            config=config,
            generation=generation,
            made_with=versions(),
            header=header,
            settings={name: checksum([(partial / name).read_bytes()]) for name in written},
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        write_manifest(partial, manifest, model)


@on_ordinary_tensors
def load(directory: Directory, *, verify: bool = True) -> nn.Module:
    """The transformers model that `save` wrote: same class, dtypes, masks and records, on the CPU.

    It is in evaluation mode, and its tensors are its own: the directory may go. No code from
    outside transformers is run.

    Args:
        directory: of `save`, or of a masked model's own `save_pretrained`, which a checkpoint of
            `Trainer` is too: folded plain weights, and the masks beside them. Or of another
            library's pruned model in safetensors: compressed-tensors and SparseML (bitmasks, or
            plain weights whose configuration says that they are pruned), torch.nn.utils.prune,
            ModelOpt, torch.ao.pruning. What its configuration says of sparsity is left out.
        verify: compare every file and tensor with its checksum. Directories from before there were
            checksums load too; the model's report says so.

    Raises:
        CheckpointError: the directory is damaged, hostile or of another version, or its model is
            not of transformers (build it, and use `load_into`).
        MissingExtraError: transformers is absent.
    """
    home = Path(directory)
    if is_foreign(home):
        return load_foreign(home)
    manifest = read_manifest(home, verify=verify)
    if manifest.config is None:
        raise CheckpointError(
            f"{home} holds a {manifest.architecture}, which is no class of transformers; build "
            "the model and use torchprune.load_into(model, directory)"
        )
    entries = manifest.tensors
    with opened(home, manifest, verify, lambda *some: skeleton.converted(*some)) as file:
        skeleton = _skeleton(home, manifest, verify)
        outline = skeleton.on_meta()
        _check_fit(entries, slots_of(outline), outline, any_float=True)
        model = skeleton.with_buffers()
        slots = slots_of(model)
        _check_fit(entries, slots, model, any_float=True)
        decoded = _decode(file, entries, slots)
    held = {key: read.value for key, read in decoded.items()}
    for key in held.keys() & {key for key, e in entries.items() if e.kind == "parameter"}:
        held[key] = nn.Parameter(held[key], slots[key].tensor.requires_grad)
    _place(entries, slots, held)
    for key, slot in slots_of(model).items():
        if slot.tensor.is_meta:
            raise CheckpointError(f"{key}: {home} holds no values for it, and its class makes none")
    _dress(model, manifest, decoded)
    return model.eval()


@on_ordinary_tensors
def load_into(model: Model, directory: Directory, *, verify: bool = True) -> Model:
    """Give a model the tensors, masks and records that `save` wrote, in place.

    Parameters stay the same objects (optimizers keep them), on their devices; tensors that were
    tied when saved are tied. A layer without a mask in the file loses the one it has.

    Args:
        model: of the saved model's architecture and dtypes, masked or not.
        directory: as for `load`.
        verify: compare the manifest and every tensor with its checksum, as for `load`.

    Returns:
        the same model.

    Raises:
        CheckpointError: the directory is damaged, hostile or of another version, or a tensor
            differs: named, with what was expected and got. The model is then as it was.
    """
    home = Path(directory)
    if is_foreign(home):
        fill_foreign(model, home)
        return model
    manifest = read_manifest(home, verify=verify)
    before = Snapshot(model)
    try:
        _resize(model, manifest)
        _fill(model, home, manifest, verify)
    except BaseException:
        before.restore()
        raise
    return model


def _resize(model: nn.Module, manifest: Manifest) -> None:
    """Give a model the sizes of a shrunk one, if the manifest tells how and it lacks them."""
    shapes = {key: entry.shape for key, entry in manifest.tensors.items()}
    same = all(tuple(s.tensor.shape) == shapes.get(k) for k, s in slots_of(model).items())
    if manifest.resized is not None and not same:
        try:
            resize(model, manifest.resized, shapes)
        except ShrinkError as error:
            raise CheckpointError(f"the manifest's sizes do not fit: {error}") from None


def _fill(model: nn.Module, home: Path, manifest: Manifest, verify: bool) -> None:
    entries, slots = manifest.tensors, slots_of(model)
    with opened(home, manifest, verify, partial(_converted, model)) as file:
        _check_fit(entries, slots, model, any_float=False)
        _check_ready(entries, slots)
        decoded = _decode(file, entries, slots)
    # From here on nothing can fail.
    for key, slot in slots.items():
        if slot.mask is None or mask_of(slot.module, slot.name) is None:
            continue
        if entries[entries[key].to or key].encoding != "masked":
            detach(slot.module, slot.name)
    held = {}
    for key, read in decoded.items():
        held[key] = read.value
        if slots[key].tensor.dtype == read.value.dtype:  # else a transient buffer in another one
            held[key] = slots[key].tensor
            held[key].data = read.value
    _place(entries, slots, held)
    _dress(model, manifest, decoded)


def _converted(model: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    if not hasattr(type(model), "from_pretrained"):
        raise CheckpointError(
            f"the checkpoint's tensors are not those of the {type(model).__name__}"
        )
    try:
        return converted_by(type(model), copy.deepcopy(model.config), tensors, dtype)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{type(model).__name__}: {error!s:.300}") from error


# -- comparing -------------------------------------------------------------------------------------


def _check_fit(
    entries: dict[str, Entry], slots: dict[str, Slot], model: nn.Module, *, any_float: bool
) -> None:
    """Raise CheckpointError unless model and file have the same tensors of the same kinds."""
    name = type(model).__name__
    lasting = {key: slot for key, slot in slots.items() if slot.kind != "transient"}
    for key, slot in lasting.items():
        if key not in entries:
            raise CheckpointError(f"{key}: expected by the {name}, absent from the saved model")
        entry, expected = entries[key], _described(slot.kind, slot.tensor.shape, slot.tensor.dtype)
        got = _described(entry.kind, entry.shape, entry.torch_dtype)
        floats = entry.torch_dtype.is_floating_point and slot.tensor.is_floating_point()
        if any_float and floats:
            expected = _described(slot.kind, slot.tensor.shape, entry.torch_dtype)
        if expected != got:
            raise CheckpointError(f"{key}: expected {expected} in the {name}, got {got}")
    prunable = {key for key, s in slots.items() if s.kind == "parameter"}
    for key, entry in entries.items():
        if entry.kind != "transient" and key not in lasting:
            raise CheckpointError(f"{key}: in the saved model, but the {name} has no such tensor")
        if entry.encoding == "masked" and key not in prunable:
            raise CheckpointError(f"{key}: masked when saved, but the {name} cannot mask it")
        owner = entry.to
        if owner is not None and entries[owner].encoding == "masked":
            places = [(slots[k].module, slots[k].name) for k in (key, owner)]
            if places[0] != places[1]:
                raise CheckpointError(f"{key}: expected one module with {owner}, got two")


def _described(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{kind} {str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _check_ready(entries: dict[str, Entry], slots: dict[str, Slot]) -> None:
    """Raise CheckpointError if tensors cannot be overwritten, or are tied otherwise than saved."""
    for key, slot in slots.items():
        if what := obstacle(slot.tensor):
            raise CheckpointError(f"{key}: expected a plain tensor in the model, but it {what}")
    for key, owner in ties_of(slots).items():
        if slots[key].kind == "transient":
            continue
        if (entries[key].to or key) != (entries[owner].to or owner):
            raise CheckpointError(
                f"{key}: expected two tensors, since {owner} was saved apart from it, got one tied"
            )


# -- filling ---------------------------------------------------------------------------------------


def _decode(
    file: WeightsFile | PlainFiles, entries: dict[str, Entry], slots: dict[str, Slot]
) -> dict[str, Decoded]:
    """Every stored tensor that the model has a place for, on the place's device in its layout."""
    decoded = {}
    for key, entry in entries.items():
        if entry.to is not None or not _has_place(key, entry, slots):
            continue
        place, read = slots[key].tensor, file.decode(key)
        if place.shape == read.value.shape and place.stride() != read.value.stride():
            laid = torch.empty_like(place, dtype=read.value.dtype, device="cpu")
            read = replace(read, value=laid.copy_(read.value))  # channels_last, for one
        decoded[key] = read if place.is_meta else read.to(place.device)
    return decoded


def _has_place(key: str, entry: Entry, slots: dict[str, Slot]) -> bool:
    """Transient buffers are taken where the model has them in that shape: some grow with use."""
    slot = slots.get(key)
    return slot is not None and (
        entry.kind != "transient" or (slot.kind == "transient" and slot.tensor.shape == entry.shape)
    )


def _place(entries: dict[str, Entry], slots: dict[str, Slot], held: dict[str, Tensor]) -> None:
    """Put every tensor where it belongs; tied ones are one object."""
    for key, entry in entries.items():
        tensor = held.get(entry.to or key)
        if tensor is None or not _has_place(key, entry, slots) or tensor is slots[key].tensor:
            continue
        slot = slots[key]
        if isinstance(tensor, nn.Parameter):
            slot.module._parameters[slot.name] = tensor
        else:
            slot.module._buffers[slot.name] = tensor


def _dress(model: nn.Module, manifest: Manifest, decoded: dict[str, Decoded]) -> None:
    """Attach the masks and what is known of them."""
    for key, slot in slots_of(model).items():
        entry = manifest.tensors.get(key)  # none where another parametrization holds it
        if entry is None or entry.record is None or key not in decoded:
            continue
        read = decoded[key]
        assert read.mask is not None
        hides = entry.hidden and entry.reversible  # else pruned values were not stored
        mask = mask_of(slot.module, slot.name)
        if mask is None:
            mask = attach(slot.module, slot.name, read.mask, entry.record, reversible=hides)
        else:
            mask.hidden = None  # of what the model was
            mask.change(slot.tensor, read.mask, entry.record, reversible=hides)
        mask.dense = read.dense
    keep_runs(model, manifest.runs)
    remember_source(model, None if manifest.header is not None else _UNCHECKED)


def _skeleton(home: Path, manifest: Manifest, verify: bool) -> Skeleton:
    assert manifest.config is not None
    entries, generation = manifest.tensors.values(), manifest.generation
    return Skeleton(
        _settings_file(home, manifest, manifest.config, verify),
        None if generation is None else _settings_file(home, manifest, generation, verify),
        tensors=len(entries),
        largest=max((max(e.shape, default=1) for e in entries), default=1),
        held=sum(e.numel * e.torch_dtype.itemsize for e in entries),
        adjust=lambda model: _resize(model, manifest),
        settings={} if manifest.resized is None else dict(manifest.resized.original),
    )


def converter_of(home: Path, manifest: Manifest) -> Convert:
    """What makes the model's tensors of those in the plain checkpoint of a directory, where that
    names or cuts them otherwise; it raises CheckpointError if it cannot."""

    def convert(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        if manifest.config is None:
            raise CheckpointError(f"no class of transformers is called {manifest.architecture!r}")
        skeleton = _skeleton(home, manifest, verify=False)
        skeleton.on_meta()
        return skeleton.converted(tensors, dtype)

    return convert


def _settings_file(home: Path, manifest: Manifest, name: str, verify: bool) -> Path:
    path = plain_file(home, name)
    written = manifest.settings.get(name)
    if verify and manifest.header is not None and not manifest.beside:
        with path.open("rb") as file:
            found = checksum([file.read(MAX_JSON + 1)])
        if found != written:
            raise CheckpointError(
                f"{path}: damaged or changed: it has the checksum {found}, but was written with "
                f"{written} ({SKIP})"
            )
    return path


def versions() -> dict[str, str]:
    """Of what a file is made with."""
    found = {}
    for package in ("torchprune", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
