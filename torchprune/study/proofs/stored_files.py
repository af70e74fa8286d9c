"""The laws that files keep by themselves: whole, sealed, complete, and with zeros that are zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchprune.checkpoint.beside import Convert, PlainFiles, opened, plain_files
from torchprune.checkpoint.checked_files import plain_file, read_json
from torchprune.checkpoint.checksums import checksum, of_content
from torchprune.checkpoint.encoding import Decoded, WeightsFile, header_of
from torchprune.checkpoint.manifest import MANIFEST, MANIFEST_BESIDE, Entry, Manifest
from torchprune.errors import CheckpointError
from torchprune.masking.packing import as_words
from torchprune.study.proofs.proof import Breaches, Check, unchecked
from torchprune.study.proofs.stored_layers import bits_of

Step = Callable[[str], None]
"""Told the name of what is looked at next."""


# -- files -----------------------------------------------------------------------------------------


def check_files(home: Path, named: list[tuple[str, bool]]) -> Check:
    """Every file that is named is a regular one inside the directory, whole and readable.

    Args:
        named: names, and whether each is of tensors; others are JSON.
    """
    found, size = Breaches(), 0
    for name, tensors in named:
        try:
            path = plain_file(home, name)
            size += path.stat().st_size
            if tensors:
                header_of(path)
                with safe_open(str(path), framework="pt", device="cpu") as file:
                    for key in sorted(file.keys()):
                        file.get_slice(key)
            else:
                read_json(path)
        except (CheckpointError, SafetensorError, OSError) as error:
            found.add(f"{name:.100}", "a whole regular file in the directory", error)
    said = "every file named is a regular one in the directory, whole and readable"
    return found.judge("files", said, files=len(named), bytes=size)


def files_of(home: Path, manifest: Manifest) -> list[tuple[str, bool]]:
    """The files that a manifest names, those of the plain checkpoint beside it too."""
    named = [(MANIFEST_BESIDE if manifest.beside else MANIFEST, False), (manifest.weights, True)]
    named += [(name, False) for name in (manifest.config, manifest.generation) if name is not None]
    if manifest.beside:
        named += [(path.name, True) for path in plain_files(home, manifest.variant)]
    return named


# -- checksums -------------------------------------------------------------------------------------


@dataclass
class Seals:
    """Checksums as they are compared."""

    manifest: Manifest
    found: Breaches = field(default_factory=Breaches)
    sums: int = 0

    def compare(self, where: str, written: object, got: str) -> None:
        """One checksum."""
        self.sums += 1
        if written != got:
            self.found.add(where, f"the checksum {written!s:.40} that was written", got)

    def files(self, home: Path) -> None:
        """The manifest's own, the header's, and those of settings files."""
        manifest = self.manifest
        name = MANIFEST_BESIDE if manifest.beside else MANIFEST
        data = read_json(plain_file(home, name))
        if manifest.header is None:
            return
        self.compare(name, data.pop("checksum", None), of_content(data))
        self.compare(
            f"the header of {manifest.weights}",
            manifest.header,
            checksum([header_of(plain_file(home, manifest.weights))]),
        )
        if manifest.beside:
            return  # settings beside a checkpoint are transformers' own, and may be edited
        for settings in (manifest.config, manifest.generation):
            if settings is not None:
                content = plain_file(home, settings).read_bytes()
                self.compare(settings, manifest.settings.get(settings), checksum([content]))

    def result(self) -> Check:
        """What came of it."""
        if self.manifest.header is None:
            return unchecked(
                "checksums", "written by an earlier torchprune, which wrote no checksums"
            )
        said = "CRC-32 of the manifest, the settings, the header and every tensor"
        return self.found.judge("checksums", said, checksums=self.sums)


# -- tensors ---------------------------------------------------------------------------------------


@contextmanager
def both_ways(
    home: Path, manifest: Manifest, convert: Convert
) -> Iterator[tuple[WeightsFile | PlainFiles, WeightsFile | PlainFiles]]:
    """The tensors of an artifact, read with their checksums and without.

    Raises:
        CheckpointError: the files hold other tensors than the manifest says.
    """
    loose = replace(manifest, header=None)  # whose checksum is compared by itself
    with opened(home, loose, True, convert) as sealed, opened(home, loose, False, convert) as file:
        yield sealed, file


@dataclass
class TensorLaws:
    """Seals, completeness and support, tensor by tensor."""

    seals: Seals
    manifest: Breaches = field(default_factory=Breaches)
    support: Breaches = field(default_factory=Breaches)
    weights: int = 0
    pruned: int = 0
    tensors: int = 0
    negative: int = 0

    def read(
        self,
        key: str,
        entry: Entry,
        sealed: WeightsFile | PlainFiles,
        file: WeightsFile | PlainFiles,
    ) -> Decoded | None:
        """Read one tensor that is not tied, and note what is wrong with it."""
        self.tensors += 1
        plain = None
        if isinstance(file, PlainFiles) and entry.kind != "transient":
            try:
                plain = file.plain_value(key)
            except CheckpointError as error:
                self.manifest.add(key, f"{entry.dtype} {entry.shape}", error)
                return None
        try:
            read = file.decode(key)
        except CheckpointError as error:
            self.support.add(key, "bits and values that agree", error)
            return None
        if entry.checksum is not None:
            self.seals.sums += 1
            try:
                if isinstance(sealed, WeightsFile):
                    sealed.verify(key)
                else:
                    sealed.decode(key)
            except CheckpointError as error:
                self.seals.found.add(key, "the checksum that was written", error)
        self._judge(key, entry, read, plain)
        return read

    def _judge(self, key: str, entry: Entry, read: Decoded, plain: Tensor | None) -> None:
        if not entry.torch_dtype.is_floating_point or entry.kind == "transient":
            return
        mask = read.mask
        if mask is None:
            finite_or_nan(key, read.value, self.support, infinite=entry.kind == "parameter")
            return
        self.weights += entry.numel
        self.pruned += entry.numel - int(torch.count_nonzero(mask))
        value = read.value if plain is None else plain
        check_support(key, value, mask, self.support)

    def results(self) -> list[Check]:
        """What came of support; of seals and the manifest others tell."""
        said = (
            "pruned weights +0.0 to the bit, kept ones finite, no NaN in any parameter, as many "
            "values as bits"
        )
        if not self.tensors:
            return [unchecked("support", "there are no tensors")]
        numbers = {"tensors": self.tensors, "weights": self.weights, "pruned": self.pruned}
        return [self.support.judge("support", said, **numbers)]


def check_support(key: str, value: Tensor, keep: Tensor, found: Breaches) -> None:
    """Note what is not zero to the bit off a mask, or not finite on it."""
    words, off = as_words(value), ~keep.reshape(-1)
    wrong = (words != 0) & off
    if bool(wrong.any()):
        minus = int((wrong & (value.reshape(-1) == 0)).sum())
        got = f"{int(wrong.sum()):,} that are not"
        got += f", {minus:,} of them -0.0" if minus else ""
        found.add(
            key, f"+0.0 at {int(off.sum()):,} pruned weights", f"{got} {_first(wrong, value)}"
        )
    wide = value.float() if value.itemsize == 1 else value
    bad = ~wide.reshape(-1).isfinite() & ~off
    if bool(bad.any()):
        found.add(key, "finite kept weights", f"{int(bad.sum()):,} NaN or inf {_first(bad, value)}")


def finite_or_nan(key: str, value: Tensor, found: Breaches, *, infinite: bool) -> None:
    """Note NaN in a tensor that no mask is on; inf only where it is a parameter of weights."""
    wide = value.float() if value.itemsize == 1 else value
    bad = wide.isnan() | (wide.isinf() if infinite else False)
    if bool(bad.any()):
        flat = bad.reshape(-1)
        found.add(key, "finite values", f"{int(flat.sum()):,} NaN or inf {_first(flat, value)}")


def _first(wrong: Tensor, value: Tensor) -> str:
    at = int(wrong.nonzero()[0])
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), value.shape))
    return f"(the first is {float(value.reshape(-1)[at]):g} at {place})"


def check_reversal(layers: Iterator[tuple[str, Decoded, bool]], found: Breaches) -> tuple[int, int]:
    """Stored dense values are finite, and where only masks came they are what is kept.

    Args:
        layers: name, what was read, and whether any run changed kept weights.

    Returns:
        how many layers and weights have dense values stored.
    """
    count = weights = 0
    for key, read, updates in layers:
        if read.dense is None or read.mask is None:
            continue
        count += 1
        weights += read.dense.numel()
        finite_or_nan(f"{key} before pruning", read.dense, found, infinite=True)
        if not updates and differing(read.value, read.dense, read.mask):
            wrong = differing(read.value, read.dense, read.mask)
            found.add(key, "kept weights bit-equal to the stored dense ones", f"{wrong:,} differ")
    return count, weights


def differing(one: Tensor, two: Tensor, keep: Tensor | None = None) -> int:
    """How many elements differ in any bit, of those kept; all if shapes or dtypes do."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return max(one.numel(), two.numel(), 1)
    if one.numel() == 0 or one.itemsize not in (1, 2, 4, 8):
        return int(not torch.equal(bits_of(one), bits_of(two)))
    wrong = as_words(one) != as_words(two).to(one.device)
    return int((wrong if keep is None else wrong & keep.reshape(-1)).sum())
