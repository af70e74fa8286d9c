"""A masked layer in a report, and how a page shows all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from torchprune.reports.pieces import Bar, Bars, Grid, Heat, Piece, Prose, Section
from torchprune.reports.tables import Column
from torchprune.reports.wording import number, percent, size

MOST_KINDS = 24
"""Columns of a heat map of blocks by kinds; where there are more, none is drawn."""

_NAMED = 40
"""Layers named in a row of those left dense; the data have all."""

ERROR = "relative squared error"


@dataclass(frozen=True)
class LayerReport:
    """One masked layer.

    Attributes:
        zeros, size: exact zeros among the effective weights, and how many weights there are.
        error: relative squared error of the layer's output on calibration inputs, or None.
        tokens: calibration rows that reached it, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    pattern: str
    zeros: int
    size: int
    error: float | None
    tokens: int | None
    note: str

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size

    @property
    def dense_bytes(self) -> int:
        """What its weights take, every one of them stored."""
        return self.size * _itemsize(self.dtype)

    @property
    def kept_bytes(self) -> int:
        """What the nonzero ones take, and one bit a weight that says where they are."""
        return (self.size - self.zeros) * _itemsize(self.dtype) + math.ceil(self.size / 8)


def _itemsize(dtype: str) -> int:
    known = getattr(torch, dtype, None)
    return known.itemsize if isinstance(known, torch.dtype) else 4


def kind_of(name: str) -> str:
    """What a layer is called in its block: the last word of its name.

    >>> kind_of("model.layers.3.mlp.up_proj"), kind_of("features.0")
    ('up_proj', 'features')
    """
    words = [word for word in name.split(".") if not word.isdigit()]
    return words[-1] if words else name


def layer_sections(layers: Sequence[LayerReport]) -> list[Section]:
    """Error, sparsity and all figures of the layers."""
    found = []
    if any(layer.error is not None for layer in layers):
        found.append(
            Section(
                "Error by layer",
                _by_layer(layers, ERROR, lambda y: y.error, logarithmic=True),
                "How far each layer's output on the calibration inputs is from what it was: the "
                "squared difference, as a share of the squared output. Less is better.",
            )
        )
    found.append(
        Section(
            "Sparsity by layer",
            _by_layer(layers, "% of the layer's weights", lambda y: 100 * y.sparsity),
            "Zeros as counted in each layer's weights now.",
        )
    )
    return [*found, Section("All layers", [_table(layers)])]


def _by_layer(
    layers: Sequence[LayerReport],
    unit: str,
    value: Callable[[LayerReport], float | None],
    *,
    logarithmic: bool = False,
) -> list[Piece]:
    known = [(y, found) for y in layers if (found := value(y)) is not None]
    bars = [Bar(y.name, found, kind=kind_of(y.name)) for y, found in known]
    pieces: list[Piece] = [Bars("Every layer", unit, bars)]
    told = {number(found) for _, found in known}
    if len(told) == 1:
        pieces.insert(0, Prose(f"The same in every layer: {told.pop()} {unit}."))
    elif (table := by_block({y.name: found for y, found in known})) is not None:
        rows, columns, cells = table
        pieces.append(Heat("By block and kind", unit, columns, rows, cells, logarithmic))
    return pieces


def by_block(
    values: Mapping[str, float],
) -> tuple[list[str], list[str], list[list[float | None]]] | None:
    """Values of layers as rows of blocks and columns of what is in a block; None without blocks.

    >>> by_block({"h.0.up": 1.0, "h.0.down": 2.0, "h.1.up": 3.0, "head": 4.0})
    (['h.0', 'h.1'], ['up', 'down'], [[1.0, 2.0], [3.0, None]])
    """
    found: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        if parts := re.fullmatch(r"((?:.*?\.)?\d+)\.(.+)", name):
            found.setdefault(parts[1], {})[parts[2]] = value
    columns = list(dict.fromkeys(kind for kinds in found.values() for kind in kinds))
    if len(found) < 2 or not 2 <= len(columns) <= MOST_KINDS:
        return None
    return list(found), columns, [[kinds.get(c) for c in columns] for kinds in found.values()]


def _table(layers: Sequence[LayerReport]) -> Grid:
    heads = ["zeros", "weights", "sparsity", "error", "dense", "kept + bits", "tokens"]
    columns = [
        Column("layer", fold=True),
        *(Column(head) for head in ("shape", "dtype", "method", "pattern")),
        *(Column(head, right=True) for head in heads),
        Column("note", fold=True),
    ]
    raw = [
        (
            y.name,
            "x".join(map(str, y.shape)),
            y.dtype,
            y.method,
            y.pattern,
            y.zeros,
            y.size,
            y.sparsity,
            y.error,
            y.dense_bytes,
            y.kept_bytes,
            y.tokens,
            y.note,
        )
        for y in layers
    ]
    rows = [
        (
            *row[:5],
            f"{y.zeros:,}",
            f"{y.size:,}",
            percent(y.sparsity),
            number(y.error),
            size(y.dense_bytes),
            size(y.kept_bytes),
            "" if y.tokens is None else f"{y.tokens:,}",
            y.note,
        )
        for row, y in zip(raw, layers, strict=True)
    ]
    return Grid("Masked layers", columns, rows, raw)


def dense_section(skipped: Mapping[str, str], bare: Mapping[str, int]) -> Section:
    """What carries no mask, and why.

    Args:
        skipped: layer -> why it was left dense.
        bare: tensors without a mask, of those that coverage counts, and their weights.
    """
    bare = {name.removesuffix(".weight"): count for name, count in bare.items()}
    by_reason: dict[str, list[str]] = {}
    for name in [*skipped, *(name for name in bare if name not in skipped)]:
        by_reason.setdefault(skipped.get(name, "not among what was to be pruned"), []).append(name)
    rows, raw = [], []
    for reason, names in by_reason.items():
        weights = sum(bare.get(name, 0) for name in names)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        told = ", ".join(names[:_NAMED]) + more
        rows.append((reason, str(len(names)), f"{weights:,}" if weights else "", told))
        raw.append((reason, len(names), weights or None, told))
    columns = [
        Column("why", fold=True),
        Column("layers", right=True),
        Column("weights", right=True),
        Column("which", fold=True),
    ]
    summary = "Weights are told of what counts as a block's own; tables and the output head do not."
    pieces: list[Piece] = [Grid("Without a mask", columns, rows, raw)] if rows else []
    if not rows:
        pieces, summary = [Prose("Nothing that could carry a mask is without one.")], ""
    return Section("Left dense, and why", pieces, summary)
