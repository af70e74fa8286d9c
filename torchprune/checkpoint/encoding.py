"""A model's tensors as blobs of one safetensors file, and back, checked before it is believed.

A tensor `x` is the blob `x`, or `x.values` and `x.bits` where it is packed or masked (see
`packing`), and `x.dense` besides where the weights from before the pruning were kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchprune.checkpoint.checked_files import MAX_JSON, plain_file
from torchprune.checkpoint.checksums import checksum, of_tensors
from torchprune.checkpoint.manifest import CODES, SKIP, Entry, Manifest
from torchprune.errors import CheckpointError
from torchprune.masking.packing import (
    can_pack,
    nonzero_bits,
    pack_bits,
    pack_values,
    packed_size,
    padding_is_zero,
    unpack_bits,
    unpack_values,
)
from torchprune.masking.plain_state import Slot, obstacle, ties_of

_HEADER_COST = 256
"""Bytes that a second blob costs in the file's header, about."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """A tensor read back: its values, and for a masked one its mask and dense values."""

    value: Tensor
    mask: Tensor | None = None
    dense: Tensor | None = None

    def to(self, device: torch.device) -> Decoded:
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        dense = None if self.dense is None else self.dense.to(device)
        return Decoded(self.value.to(device), mask, dense)


# -- writing ---------------------------------------------------------------------------------------


def encode(slots: dict[str, Slot]) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """What the manifest says of each tensor, and the blobs, contiguous and on the CPU.

    Transient buffers are kept if they are floating point: what a class computes anew may differ
    from them after a cast (`model.bfloat16()` rounds rotary frequencies).

    Raises:
        CheckpointError: a tensor holds no plain values, or is masked and tied.
    """
    kept = {k: s for k, s in slots.items() if s.kind != "transient" or s.tensor.is_floating_point()}
    ties = ties_of(kept)
    entries: dict[str, Entry] = {}
    blobs: dict[str, Tensor] = {}
    for key, slot in kept.items():
        check_plain(slot)
        if key in ties:
            _check_tie(slot, kept[ties[key]])
            entries[key] = entry_of(slot, "tied", to=ties[key])
        else:
            entry, parts = _encode(slot)
            for suffix in parts:
                if f"{key}{suffix}" in blobs or (suffix and f"{key}{suffix}" in kept):
                    raise CheckpointError(f"two tensors would be stored as {key + suffix!r}")
            written = {f"{key}{suffix}": t.cpu().contiguous() for suffix, t in parts.items()}
            entries[key] = replace(entry, checksum=of_tensors(written.values()))
            blobs |= written
    return entries, blobs


def _encode(slot: Slot) -> tuple[Entry, dict[str, Tensor]]:
    tensor = slot.tensor.detach().resolve_conj().resolve_neg()
    if slot.mask is not None:
        keep = slot.mask.mask
        parts = {".bits": pack_bits(keep), ".values": pack_values(tensor, keep)}
        if slot.mask.dense is not None:
            parts[".dense"] = slot.mask.dense.detach().clone()
        return entry_of(slot, "masked", dense=".dense" in parts, record=slot.mask.record), parts
    if can_pack(tensor.dtype):
        keep = nonzero_bits(tensor)
        values = int(torch.count_nonzero(keep)) * tensor.itemsize
        cost = values + packed_size(tensor.numel()) + _HEADER_COST
        if cost < tensor.numel() * tensor.itemsize:
            parts = {".bits": pack_bits(keep), ".values": pack_values(tensor, keep)}
            return entry_of(slot, "packed"), parts
    return entry_of(slot, "dense"), {"": _apart(tensor)}


def _apart(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it shares its storage with others (safetensors refuses that)."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    return (
        tensor
        if whole and tensor.is_contiguous()
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def entry_of(slot: Slot, encoding: str, **more: Any) -> Entry:
    """What the manifest says of a tensor."""
    return Entry(_dtype_name(slot.tensor), tuple(slot.tensor.shape), encoding, slot.kind, **more)


def check_plain(slot: Slot) -> None:
    """Raise CheckpointError if a tensor has no values that can be saved."""
    tensor = slot.tensor
    what = obstacle(tensor)
    if what is None and _dtype_name(tensor) not in CODES:
        what = f"is {tensor.dtype}"
    if what is not None:
        raise CheckpointError(f"{slot.key} {what}, which holds no values that can be saved")


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_tie(slot: Slot, owner: Slot) -> None:
    # A shared module has one mask under two names; modules that share a weight have two, or one.
    if slot.mask is not owner.mask:
        raise CheckpointError(
            f"{slot.key} is tied to {owner.key}, and masked; give it a weight of its own first"
        )


def write_blobs(path: Path, blobs: dict[str, Tensor]) -> str:
    """Write the weights file.

    Returns:
        the checksum of its header.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        save_file(blobs, str(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: could not be written ({error})") from error
    return checksum([header_of(path)])


# -- reading ---------------------------------------------------------------------------------------


class WeightsFile:
    """An open weights file whose header agrees with the manifest's entries."""

    def __init__(self, path: Path, file: Any, manifest: Manifest, verify: bool) -> None:
        self.path, self._file, self._verify = path, file, verify
        self._entries, self._beside = manifest.tensors, manifest.beside
        self._check()

    def decode(self, key: str) -> Decoded:
        """Read a tensor that is not tied. What is allocated is bounded by what the file holds.

        Raises:
            CheckpointError: its blobs do not have its checksum, or its bits and values disagree.
        """
        entry = self._entries[key]
        self.verify(key)
        dense = self.read(f"{key}.dense") if entry.dense else None
        if entry.encoding == "dense":
            return Decoded(self.read(key))
        mask, values = self.read_mask(key), self.read(f"{key}.values")
        self.check_count(key, int(torch.count_nonzero(mask)), values)
        masked = entry.encoding == "masked"
        return Decoded(unpack_values(values, mask), mask if masked else None, dense)

    def verify(self, key: str, *before: Tensor, path: Path | None = None) -> None:
        """Compare a tensor's blobs, after any values that stand elsewhere, with its checksum.

        Args:
            path: where those values stand.

        Raises:
            CheckpointError: they are not what was written.
        """
        entry = self._entries[key]
        if not self._verify or entry.checksum is None:
            return
        blobs = [blob for blob, _ in _expected({key: entry}, self._beside)]
        found = of_tensors([*before, *(self._file.get_tensor(blob) for blob in blobs)])
        if found != entry.checksum:
            where = self.path if path is None else f"{path} (or {self.path.name})"
            raise CheckpointError(
                f"{where}: {key} is damaged: it has the checksum {found}, "
                f"but was written with {entry.checksum} ({SKIP})"
            )

    def read_mask(self, key: str) -> Tensor:
        """A tensor's mask, or which of its values are stored."""
        entry, bits = self._entries[key], self.read(f"{key}.bits")
        if not padding_is_zero(bits, entry.numel):
            raise CheckpointError(f"{self.path}: {key}.bits has bits set past its last weight")
        return unpack_bits(bits, entry.shape)

    def check_count(self, key: str, places: int, values: Tensor) -> None:
        """Raise CheckpointError unless there are as many values as places for them."""
        if places != len(values):
            raise CheckpointError(
                f"{self.path}: {key} has {places} bits set but {len(values)} values"
            )

    def read(self, blob: str) -> Tensor:
        """A blob's own copy."""
        window: Tensor = self._file.get_tensor(blob)
        if window.dtype == torch.bool and bool((window.view(torch.uint8) > 1).any()):
            raise CheckpointError(f"{self.path}: {blob} holds bytes that are no bool")
        return window.clone()  # the library's tensors are windows on one mapped file

    def _check(self) -> None:
        """Names, dtypes and shapes from the header alone."""
        expected = dict(_expected(self._entries, self._beside))
        present = set(self._file.keys())
        for blob in expected.keys() - present:
            raise CheckpointError(f"{self.path}: {blob!r:.200} is missing")
        for blob in present - expected.keys():
            raise CheckpointError(f"{self.path}: {blob!r:.200} is not in the manifest")
        for blob, (code, shape) in expected.items():
            view = self._file.get_slice(blob)
            found = view.get_dtype(), tuple(view.get_shape())
            fits = found[1] == shape if shape is not None else len(found[1]) == 1
            if found[0] != code or not fits:
                raise CheckpointError(
                    f"{self.path}: {blob}: expected {code} {shape or '(any,)'}, "
                    f"got {found[0]} {found[1]}"
                )


Form = tuple[str, tuple[int, ...] | None]
"""A blob's dtype code and shape; None is any one-dimensional shape."""


def _expected(entries: dict[str, Entry], beside: bool) -> Iterator[tuple[str, Form]]:
    """Every blob's name and form; values that a plain checkpoint holds are none."""
    for key, entry in entries.items():
        code = CODES[entry.dtype]
        if entry.encoding in ("masked", "packed"):
            yield f"{key}.bits", (CODES["uint8"], (packed_size(entry.numel),))
            if not beside or entry.hidden:
                yield f"{key}.hidden" if beside else f"{key}.values", (code, None)
        if entry.dense:
            yield f"{key}.dense", (code, entry.shape)
        elif entry.encoding == "dense" and not (beside and entry.kind != "transient"):
            yield key, (code, entry.shape)


def header_of(path: Path) -> bytes:
    """The first bytes of a safetensors file, up to its tensors.

    Raises:
        CheckpointError: the file is too short for the header it claims, or that is too long.
    """
    with path.open("rb") as file:
        first = file.read(8)
        length, size = int.from_bytes(first, "little"), path.stat().st_size
        if len(first) < 8 or length > size - 8:
            raise CheckpointError(f"{path}: truncated, or no safetensors file")
        if length > MAX_JSON:
            raise CheckpointError(f"{path}: its header claims {length} bytes, which no header has")
        return first + file.read(length)


@contextmanager
def open_weights(home: Path, manifest: Manifest, *, verify: bool) -> Iterator[WeightsFile]:
    """Open a directory's weights file and compare its header with the manifest's entries.

    Args:
        verify: compare checksums.

    Raises:
        CheckpointError: the file is damaged, or holds other tensors than the manifest says.
    """
    path = plain_file(home, manifest.weights)
    found = checksum([header_of(path)])
    if verify and manifest.header is not None and found != manifest.header:
        raise CheckpointError(
            f"{path}: its header is damaged: it has the checksum {found}, but was written with "
            f"{manifest.header} ({SKIP})"
        )
    try:
        with safe_open(str(path), framework="pt", device="cpu") as opened:
            yield WeightsFile(path, opened, manifest, verify)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error!s:.200})") from None
