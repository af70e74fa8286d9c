"""Masks in files of their own, beside a checkpoint of transformers that holds folded plain weights.

Stock `from_pretrained` reads the checkpoint and never looks at these files; `load` and `load_into`
read both. What is here names every tensor of the model and has a checksum of its plain values, so
masks that were left behind by another save are noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from torchprune.checkpoint.checked_files import plain_file, read_json
from torchprune.checkpoint.checksums import of_tensors
from torchprune.checkpoint.encoding import (
    Decoded,
    WeightsFile,
    check_plain,
    entry_of,
    header_of,
    open_weights,
    write_blobs,
)
from torchprune.checkpoint.manifest import (
    BITS_BESIDE,
    CODES,
    MANIFEST_BESIDE,
    Entry,
    Manifest,
    has_masks_beside,
    write_manifest,
)
from torchprune.errors import CheckpointError
from torchprune.masking.mask import Mask
from torchprune.masking.packing import as_words, masked, pack_bits
from torchprune.masking.plain_state import Slot, obstacle, slots_of, ties_of

Convert = Callable[[dict[str, Tensor], torch.dtype], dict[str, Tensor]]
"""A checkpoint's tensors as the model names and joins them; floats are cast to the dtype."""

# -- writing ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Folded:
    """A masked model's state by plain names: what a model without masks would have, folded."""

    state: dict[str, Any]


def folded_state(model: nn.Module, state: Mapping[str, Any]) -> Folded:
    """A state of a masked model as the plain model has it. Folded tensors are on the CPU.

    Args:
        state: the model's `state_dict`, or part of one; plain names in it stay as they are.

    Raises:
        CheckpointError: a masked tensor is tied, offloaded or sharded, or the names are of a
            wrapper around the model.
    """
    slots = slots_of(model)
    for key, owner in ties_of(slots).items():
        if slots[key].mask is not slots[owner].mask:
            raise CheckpointError(
                f"{key} is tied to {owner}, and masked; give it a weight of its own first"
            )
    plain: dict[str, Any] = {}
    made: dict[tuple[int, int], Tensor] = {}
    parts = {name: (key, role) for key, s in slots.items() for name, role in _names(key, s)}
    for name, value in state.items():
        key, role = parts.get(name, (name, "plain"))
        if role == "plain":
            plain[name] = value
        elif role == "original":
            _check_dense(key, value)
            keep = _mask_of(slots[key]).mask.to(value.device)
            twin = value.data_ptr(), id(slots[key].mask)  # a shared module stays shared
            if twin not in made:
                made[twin] = masked(value, keep).cpu()
            plain[key] = made[twin]
    for name in plain:
        if is_mask_name(name, plain):
            raise CheckpointError(
                f"state_dict has {name!r:.200}, which the {type(model).__name__} has not: give the "
                "state of the model itself, without what wraps it, or none"
            )
    return Folded(plain)


def is_mask_name(name: str, names: Any) -> bool:
    """Whether a name in a state is that of a mask on another tensor in it."""
    path, _, last = name.rpartition(".0.")
    inside = path.split(".")[-2:-1] == ["parametrizations"]
    return last in ("bits", "mask") and inside and f"{path}.original" in names


def _names(key: str, slot: Slot) -> list[tuple[str, str]]:
    """What a masked tensor and its mask are called in a `state_dict`."""
    if slot.mask is None:
        return []
    stem = f"{key.removesuffix(slot.name)}parametrizations.{slot.name}"
    parts = ((f"{stem}.0.{part}", "") for part in ("bits", "hidden", "dense", "mask"))
    return [(f"{stem}.original", "original"), *parts]


def _mask_of(slot: Slot) -> Mask:
    assert slot.mask is not None
    return slot.mask


def _check_dense(key: str, value: Any) -> None:
    what = obstacle(value) if isinstance(value, Tensor) else f"is a {type(value).__name__}"
    if what is not None:
        raise CheckpointError(
            f"{key} is masked and {what}: its zeros cannot be written; gather the model's tensors "
            "(load it without offloading or sharding), or torchprune.fold it before that"
        )


def write_beside(
    directory: Path, model: nn.Module, folded: Folded, manifest: Manifest, *, hidden: bool
) -> None:
    """Write the masks of a model into the directory of its plain checkpoint.

    Args:
        folded: the state that the checkpoint is written from. If it lacks some of the model's
            tensors nothing is written, and masks of an earlier save go.
        manifest: all but tensors and header.
        hidden: write the values behind the masks' zeros too, for `densify` to go back to.

    Raises:
        CheckpointError: a tensor holds no plain values.
    """
    slots = slots_of(model)
    ties = ties_of(slots)
    entries: dict[str, Entry] = {}
    blobs: dict[str, Tensor] = {}
    remove_beside(directory)
    for key, slot in slots.items():
        if slot.kind == "transient" and not slot.tensor.is_floating_point():
            continue
        value = slot.tensor if slot.kind == "transient" else folded.state.get(key)
        if not isinstance(value, Tensor):
            return
        stored = replace(slot, tensor=value)
        check_plain(stored)
        if key in ties:
            entries[key] = entry_of(stored, "tied", to=ties[key])
        else:
            entries[key], parts = _encode(stored, hidden)
            blobs |= {f"{key}{suffix}": tensor for suffix, tensor in parts.items()}
    partial = directory / f".{BITS_BESIDE}.partial"
    try:
        header = write_blobs(partial, blobs)
        partial.chmod(directory.stat().st_mode & 0o666)
        partial.replace(directory / BITS_BESIDE)
    finally:
        partial.unlink(missing_ok=True)
    write_manifest(directory, replace(manifest, tensors=entries, header=header), model)


def _encode(slot: Slot, hidden: bool) -> tuple[Entry, dict[str, Tensor]]:
    value = slot.tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if slot.mask is None:
        parts = {"": value} if slot.kind == "transient" else {}
        before = [] if parts else [value]
        entry = entry_of(slot, "dense")
    else:
        keep = slot.mask.mask.cpu()
        parts, before = {".bits": pack_bits(keep)}, [value]
        if hidden and slot.mask.hidden is not None:
            parts[".hidden"] = slot.mask.hidden.detach().cpu()
        if slot.mask.dense is not None:
            parts[".dense"] = slot.mask.dense.detach().cpu().contiguous().clone()
        entry = entry_of(
            slot,
            "masked",
            dense=".dense" in parts,
            hidden=".hidden" in parts,
            reversible=".hidden" in parts,
            record=slot.mask.record,
        )
    return replace(entry, checksum=of_tensors([*before, *parts.values()])), parts


def remove_beside(directory: Path) -> None:
    """Take away the masks of an earlier save: the plain checkpoint is another one now."""
    if has_masks_beside(directory):
        (directory / MANIFEST_BESIDE).unlink()
        (directory / BITS_BESIDE).unlink(missing_ok=True)


# -- reading ---------------------------------------------------------------------------------------


class PlainFiles:
    """A plain checkpoint and the masks beside it, as one."""

    def __init__(
        self,
        manifest: Manifest,
        masks: WeightsFile,
        plain: dict[str, tuple[Path, Any]],
        convert: Convert,
    ) -> None:
        self._entries, self._masks, self._plain = manifest.tensors, masks, plain
        self._convert = convert
        self._converted: dict[str, Tensor] | None = None
        self._twins: dict[str, list[str]] = {}
        for key, entry in manifest.tensors.items():
            self._twins.setdefault(entry.to or key, []).append(key)

    def decode(self, key: str) -> Decoded:
        """Read a tensor that is not tied.

        Raises:
            CheckpointError: it is absent, or is not what was saved with its mask.
        """
        entry = self._entries[key]
        if entry.kind == "transient":
            return self._masks.decode(key)
        path, value = self._value(key, entry)
        self._masks.verify(key, value, path=path)
        if entry.encoding == "dense":
            return Decoded(value)
        mask = self._masks.read_mask(key)
        if entry.hidden:
            hidden, places = self._masks.read(f"{key}.hidden"), ~mask.reshape(-1)
            self._masks.check_count(key, int(torch.count_nonzero(places)), hidden)
            as_words(value).masked_scatter_(places, as_words(hidden))
        return Decoded(value, mask, self._masks.read(f"{key}.dense") if entry.dense else None)

    def plain_value(self, key: str) -> Tensor:
        """What stock transformers reads of a tensor that is not tied, whatever its mask says.

        Raises:
            CheckpointError: it is absent, or of another dtype or shape.
        """
        return self._value(key, self._entries[key])[1]

    def _value(self, key: str, entry: Entry) -> tuple[Path, Tensor]:
        """Where a tensor's plain values are, and these, contiguous and its own."""
        for name in self._twins[key]:  # of tied tensors transformers writes one
            if name in self._plain:
                path, file = self._plain[name]
                view = file.get_slice(name)
                code, shape = view.get_dtype(), tuple(view.get_shape())
                if code != CODES[entry.dtype]:
                    raise CheckpointError(
                        f"{path}: {name}: expected {CODES[entry.dtype]}, got {code}"
                    )
                if shape == entry.shape:
                    return path, file.get_tensor(name).clone()
        first = next((path for path, _ in self._plain.values()), self._masks.path)
        converted = self._as_model(first)
        found = converted.get(key)
        if found is None or tuple(found.shape) != entry.shape:
            got = "nothing" if found is None else tuple(found.shape)
            raise CheckpointError(f"{first}: {key}: expected {entry.shape}, got {got}")
        return first, found.to(entry.torch_dtype, copy=True).contiguous()

    def _as_model(self, first: Path) -> dict[str, Tensor]:
        """All plain values, where transformers writes them under other names or in parts."""
        if self._converted is None:
            whole = {name: file.get_tensor(name) for name, (_, file) in self._plain.items()}
            wide = any(e.dtype == "float64" for e in self._entries.values())
            try:  # a cast to a wider dtype and back changes no bit
                self._converted = self._convert(whole, torch.float64 if wide else torch.float32)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{first}: its tensors are not those that were saved ({error!s:.400})"
                ) from error
        return self._converted


@contextmanager
def opened(
    home: Path, manifest: Manifest, verify: bool, convert: Convert
) -> Iterator[WeightsFile | PlainFiles]:
    """What decodes the tensors of a directory, wherever their values stand.

    Args:
        convert: used where the plain checkpoint's tensors are not the model's own.

    Raises:
        CheckpointError: a file is damaged or absent, or holds other tensors than the manifest says.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_weights(home, manifest, verify=verify))
        if not manifest.beside:
            yield file
            return
        plain: dict[str, tuple[Path, Any]] = {}
        for path in plain_files(home, manifest.variant):
            header_of(path)
            try:
                part = stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            except SafetensorError as error:
                raise CheckpointError(f"{path}: damaged or truncated ({error!s:.200})") from None
            plain |= dict.fromkeys(part.keys(), (path, part))
        yield PlainFiles(manifest, file, plain, convert)


def plain_files(home: Path, variant: str | None) -> list[Path]:
    """The weights files of a checkpoint of transformers, as it looks for them.

    Raises:
        CheckpointError: one is absent, or the index is malformed.
    """
    more = "" if variant is None else f".{variant}"
    single, index = f"model{more}.safetensors", f"model.safetensors.index{more}.json"
    if (home / single).exists() or not (home / index).exists():
        return [plain_file(home, single)]
    names = read_json(plain_file(home, index)).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise CheckpointError(f"{home / index}: weight_map must be an object of file names")
    return [plain_file(home, name) for name in sorted(set(names.values()))]
