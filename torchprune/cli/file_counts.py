"""Zeros in saved weights, counted tensor by tensor from the files: no model is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchprune.checkpoint.beside import opened
from torchprune.checkpoint.checked_files import plain_file, read_json
from torchprune.checkpoint.manifest import read_manifest
from torchprune.errors import CheckpointError, InputError
from torchprune.masking.packing import masked, zeros_in
from torchprune.reports.tables import Column, by_rich, plain

_COLUMNS = [
    Column("tensor", fold=True),
    *(Column(head) for head in ("shape", "dtype", "pattern")),
    *(Column(head, right=True) for head in ("zeros", "sparsity")),
]
_GROUPS = ((1, 4), (2, 4), (2, 8), (4, 8))
"""The n:m patterns that are looked for, the sparsest first."""


@dataclass(frozen=True)
class Counted:
    """One tensor of a file.

    Attributes:
        pattern: the sparsest of a few n:m patterns that its zeros obey along the last axis;
            "unstructured" for others with zeros, "" without any.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pattern: str
    zeros: int
    size: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size if self.size else 0.0


@dataclass(frozen=True)
class FileCounts:
    """The weights of a directory: floating point tensors of two and more axes."""

    directory: str
    tensors: tuple[Counted, ...]

    @property
    def zeros(self) -> int:
        return sum(tensor.zeros for tensor in self.tensors)

    @property
    def size(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """As `Report.to_dict` has it, as far as files tell."""
        share = self.zeros / self.size if self.size else 0.0
        return {
            "layers": [
                {**asdict(t), "shape": list(t.shape), "sparsity": t.sparsity} for t in self.tensors
            ],
            "total": {"zeros": self.zeros, "size": self.size, "sparsity": share},
        }

    def __str__(self) -> str:
        sparse = [t for t in self.tensors if t.pattern]
        rows = [
            (
                t.name,
                "x".join(map(str, t.shape)),
                t.dtype,
                t.pattern,
                f"{t.zeros:,}",
                f"{t.sparsity:.2%}",
            )
            for t in sparse
        ]
        zeros, size = sum(t.zeros for t in sparse), sum(t.size for t in sparse)
        share = f"{zeros / size:.2%}" if size else ""
        table = by_rich(_COLUMNS, rows, ("total", "", "", "", f"{zeros:,}", share))
        lines = [table if table is not None else plain(_COLUMNS, rows)] if sparse else []
        lines.append(
            f"{self.zeros:,} of {self.size:,} weights in {len(self.tensors)} tensors are zero, "
            "counted in the files"
        )
        if dense := len(self.tensors) - len(sparse):
            lines.append(f"dense: {dense} tensors with fewer than a thousandth of zeros")
        return "\n".join(lines)


def counted_files(directory: Path) -> FileCounts:
    """Count a directory of safetensors files, of transformers or any other program.

    Raises:
        InputError: it holds no such file.
        CheckpointError: a file is damaged.
    """
    names = _weight_files(directory)
    found: list[Counted] = []
    for name in names:
        path = plain_file(directory, name)
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                found += [
                    _counted(key, file.get_tensor(key))
                    for key in file.keys()  # noqa: SIM118  (it is no mapping)
                    if _is_weight(file.get_slice(key))
                ]
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or truncated ({error!s:.200})") from None
    return FileCounts(str(directory), tuple(found))


def counted_save(directory: Path) -> FileCounts:
    """Count what `torchprune.save` wrote of any model, checksums compared.

    Raises:
        CheckpointError: it is damaged.
    """
    manifest = read_manifest(directory)
    found = []
    with opened(directory, manifest, True, lambda tensors, _: tensors) as file:
        for key, entry in manifest.tensors.items():
            if entry.kind != "parameter" or entry.to is not None or len(entry.shape) < 2:
                continue
            if not entry.torch_dtype.is_floating_point:
                continue
            read = file.decode(key)
            value = read.value if read.mask is None else masked(read.value, read.mask)
            told = None if entry.record is None else entry.record.pattern
            found.append(_counted(key, value, told))
    return FileCounts(str(directory), tuple(found))


def _weight_files(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(plain_file(directory, index.name)).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise CheckpointError(f"{index}: weight_map must be an object of file names")
        return sorted(set(names.values()))
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        there = ", ".join(sorted(p.name for p in directory.iterdir())[:6]) or "nothing"
        raise InputError(
            f"{directory} holds no weights that can be read: no manifest of torchprune and no "
            f".safetensors file; it has {there}"
        )
    return names


def _is_weight(window: Any) -> bool:
    return len(window.get_shape()) >= 2 and window.get_dtype() in ("F64", "F32", "F16", "BF16")


def _counted(name: str, value: Tensor, pattern: str | None = None) -> Counted:
    zeros, size = zeros_in(value), value.numel()
    if pattern is None:
        pattern = _pattern(value) if zeros * 1000 >= size > 0 else ""
    dtype = str(value.dtype).removeprefix("torch.")
    return Counted(name, tuple(value.shape), dtype, pattern, zeros, size)


def _pattern(value: Tensor) -> str:
    kept = value != 0
    return next(_obeyed(kept), "unstructured")


def _obeyed(kept: Tensor) -> Iterator[str]:
    for n, m in _GROUPS:
        if kept.shape[-1] % m == 0 and int(kept.reshape(-1, m).sum(1, dtype=torch.int8).max()) <= n:
            yield f"{n}:{m}"
