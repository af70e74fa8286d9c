"""Tensors that other libraries wrote of pruned models, as plain weights and masks.

| written by | a weight W of module X as |
|---|---|
| compressed-tensors, `sparse-bitmask` (also SparseML) | `X.compressed` (values, row-major), `X.bitmask` (uint8, a row of bits a row, least significant first), `X.shape`, `X.row_offsets` |
| compressed-tensors, `sparse-24-bitmask` | the same without offsets; `X.compressed` is (rows, columns / 2) |
| torch.nn.utils.prune | `X.W_orig`, `X.W_mask` |
| NVIDIA ModelOpt | `X.weight`, `X._weight_mask` |
| torch.ao.pruning and torchao | `X.parametrizations.W.original`, `X.parametrizations.W.0.mask` |

SparseML's early files name the first of them after the weight: `X.weight.compressed`.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from torchprune.errors import CheckpointError

_PARTS = ("compressed", "bitmask", "shape", "row_offsets")

_PAIRS = (
    (re.compile(r"(?P<weight>.*)_mask"), "{weight}_orig", "{weight}"),
    (re.compile(r"(?P<at>.*\.|)_(?P<name>\w+)_mask"), "{at}{name}", "{at}{name}"),
    (
        re.compile(r"(?P<at>.*\.|)parametrizations\.(?P<name>\w+)\.0\.mask"),
        "{at}parametrizations.{name}.original",
        "{at}{name}",
    ),
)
"""A mask's name, the name of what it masks, and the name of the weight."""


def mask_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Those names that are masks in a form of the table, with what they mask, and the weight."""
    known = set(names)
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(known):
        stem = _stem(name)
        if stem is not None and f"{stem}compressed" in known:
            whole = stem.removesuffix(".")
            weight = whole if whole.endswith(".weight") else f"{stem}weight"
            found[name] = f"{stem}compressed", weight
            continue
        for pattern, masked, weight in _PAIRS:
            match = pattern.fullmatch(name)
            if match and masked.format(**match.groupdict()) in known:
                found[name] = masked.format(**match.groupdict()), weight.format(**match.groupdict())
                break
    return found


def plain_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors under their plain names, pruned weights with +0.0 where they are masked, and the
    masks of those weights (True = kept).

    Raises:
        CheckpointError: the parts of a weight are missing or contradict each other.
    """
    plain, masks, used = dict[str, Tensor](), dict[str, Tensor](), set[str]()
    for name, (masked, weight) in mask_names(tensors).items():
        stem = _stem(name)
        if stem is not None:
            used |= {f"{stem}{part}" for part in _PARTS}
            parts = {part: tensors.get(f"{stem}{part}") for part in _PARTS}
            value, mask = _unpacked(weight, parts)
        else:
            used |= {name, masked}
            value, mask = _masked(weight, tensors[masked], tensors[name])
        if weight in masks:
            raise CheckpointError(f"{weight} is there in two forms")
        plain[weight], masks[weight] = value, mask
    for name, tensor in tensors.items():
        if name not in used:
            if name in plain:
                raise CheckpointError(f"{name} is there masked, and once more without a mask")
            plain[name] = tensor
    return plain, masks


def _stem(name: str) -> str | None:
    """What stands before `bitmask`, or None for names of other kinds."""
    end = "bitmask"
    return name.removesuffix(end) if name == end or name.endswith(f".{end}") else None


def _unpacked(weight: str, parts: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    values, bits, shape = parts["compressed"], parts["bitmask"], parts["shape"]
    if values is None or bits is None or shape is None:
        missing = [part for part in _PARTS[:3] if parts[part] is None]
        raise CheckpointError(f"{weight}: its {' and '.join(missing)} is missing")
    sizes = [int(size) for size in shape.reshape(-1)]
    if shape.is_floating_point() or len(sizes) != 2 or min(sizes) < 0:
        raise CheckpointError(f"{weight}: a shape of two sizes is needed, got {sizes}")
    rows, columns = sizes
    wanted = rows, -(-columns // 8)
    if bits.dtype != torch.uint8 or tuple(bits.shape) != wanted:
        raise CheckpointError(
            f"{weight}: a mask of {rows} x {columns} weights is uint8 {wanted}, got {bits.dtype} "
            f"{tuple(bits.shape)}"
        )
    spread = (bits.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    spread = spread.reshape(rows, -1).bool()
    mask = spread[:, :columns].contiguous()
    if spread[:, columns:].any():
        raise CheckpointError(f"{weight}: its mask has bits beyond its {columns} columns")
    if int(mask.sum()) != values.numel():
        raise CheckpointError(
            f"{weight}: {values.numel()} values for {int(mask.sum())} bits of its mask"
        )
    counts, offsets = mask.sum(1), parts["row_offsets"]
    if offsets is not None and not torch.equal(
        offsets.reshape(-1).long(), counts.cumsum(0) - counts
    ):
        raise CheckpointError(f"{weight}: its row_offsets are not those of its mask")
    dense = torch.zeros(rows, columns, dtype=values.dtype)
    dense[mask] = values.reshape(-1)
    return dense, mask


def _masked(weight: str, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if mask.shape != value.shape:
        raise CheckpointError(
            f"{weight}: its mask is {tuple(mask.shape)}, and what it masks {tuple(value.shape)}"
        )
    kept = mask != 0
    if not torch.equal(kept.to(mask.dtype), mask):
        raise CheckpointError(f"{weight}: its mask holds more than zeros and ones")
    return torch.where(kept, value, torch.zeros((), dtype=value.dtype)), kept
