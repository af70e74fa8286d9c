"""What an export wrote, and how it compares with the model."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from torchprune.errors import ExportError

WEIGHTS = ("packed", "dense")
"""How a file may hold sparse weights: without their zeros, or with them."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how its runtime compares with torch. Print it.

    Attributes:
        path: the file; `data` beside it holds the weights where the format keeps them apart.
        runtime: what ran it.
        bytes, dense_bytes: of all files, and what they would add up to with dense weights.
        packed: names of the weights that were packed.
        difference: largest absolute difference of any output from torch, on the example and, where
            sizes vary, at two more sizes of each.
        relative: the same over the largest absolute output.
        load_seconds: until the runtime could run it.
        brings: what sparsity brings in this form, in a sentence.
        inputs, outputs: the graph's names, where the format has any.
        sizes: for every input its sizes: a number is fixed, a letter varies, and equal letters are
            equal sizes.
        bounds: least and greatest value of a letter, where the graph bounds it; no greatest is
            None.
        unmoved: axes that were to vary and are fixed, in words.
        note: why they are, where the graph did not hold at other sizes.
        parts: the graphs by name, where there are several: `path` is their folder.
        library: the kernels beside the file, which whoever runs it loads first, if it needs any;
            `loading` says how.
    """

    path: Path
    data: Path | None
    runtime: str
    bytes: int
    dense_bytes: int
    packed: list[str]
    difference: float
    relative: float
    load_seconds: float
    brings: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    sizes: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    bounds: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    unmoved: list[str] = field(default_factory=list)
    note: str = ""
    parts: dict[str, ExportReport] = field(default_factory=dict)
    library: Path | None = None
    loading: str = ""

    def __str__(self) -> str:
        share = self.bytes / self.dense_bytes if self.dense_bytes else 1.0
        lines = [
            f"{self.path}: {self.bytes:,} bytes ({share:.3f} of dense), {len(self.packed)} weights "
            f"packed; loads in {self.load_seconds:.2f} s; {self.runtime} differs from torch by at "
            f"most {self.difference:.3g} ({self.relative:.2g} of the largest output)"
        ]
        if self.library is not None:
            lines.append(f"load {self.library} before it: {self.loading}")
        for what, names in (("inputs", self.inputs), ("outputs", self.outputs)):
            if names:
                lines.append(f"{what}: {few(names)}")
        if self.sizes:
            lines.append(f"sizes (numbers are fixed, letters vary): {few(self._shown())}")
        for letter, (low, high) in self.bounds.items():
            said = [f"at least {low}"] if low else []
            said += [] if high is None else [f"at most {high}"]
            lines.append(f"{letter} is {' and '.join(said)}")
        if self.unmoved:
            why = f": {self.note}" if self.note else ", the model or the graph allows no other"
            lines.append(f"fixed, though it was to vary{why}: {few(self.unmoved)}")
        for name, part in self.parts.items():
            told = f"{part.bytes:,} bytes; {few(part.inputs)} -> {few(part.outputs)}"
            lines.append(f"{name}: {told}")
        return "\n".join([*lines, self.brings])

    def _shown(self) -> list[str]:
        return [f"{name} ({', '.join(map(str, sizes))})" for name, sizes in self.sizes.items()]


def together(folder: Path, parts: Mapping[str, ExportReport]) -> ExportReport:
    """The report of several graphs in a folder: sums, and the largest differences."""
    some = list(parts.values())
    return ExportReport(
        path=folder,
        data=None,
        runtime=some[0].runtime,
        bytes=sum(y.bytes for y in some),
        dense_bytes=sum(y.dense_bytes for y in some),
        packed=[f"{name}: {weight}" for name, y in parts.items() for weight in y.packed],
        difference=max(y.difference for y in some),
        relative=max(y.relative for y in some),
        load_seconds=sum(y.load_seconds for y in some),
        brings=some[0].brings,
        unmoved=[f"{name}: {axis}" for name, y in parts.items() for axis in y.unmoved],
        parts=dict(parts),
    )


def few(names: list[str]) -> str:
    """Names in a line, the first six if there are more."""
    shown = ", ".join(names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown


def sizes_of(
    program: ExportedProgram, inputs: Sequence[str], wanted: Sequence[set[int]]
) -> dict[str, Any]:
    """What a program says of its inputs' sizes: `sizes`, `bounds` and `unmoved` of a report.

    Args:
        program: as torch exported it; its tensor inputs have the names `inputs`.
        wanted: for each of them the axes that were to vary.
    """
    values = input_values(program)
    letters: dict[str, str] = {}
    bounds: dict[str, tuple[int, int | None]] = {}
    for symbol in (symbol for value in values for size in value.shape for symbol in _symbols(size)):
        if str(symbol) not in letters:
            letter = letters[str(symbol)] = letter_of(len(letters))
            known = program.range_constraints.get(symbol)
            low, high = (0, None) if known is None else (known.lower, known.upper)
            high = int(high) if high is not None and high < sys.maxsize else None
            low = int(low) if low > 2 else 0  # torch says 2 of all that was exported at more
            if low or high is not None:
                bounds[letter] = low, high

    def said(size: Any) -> int | str:
        if not _symbols(size):  # torch keeps some constants as symbolic sizes
            return int(size)
        return re.sub(r"\bs\d+\b", lambda found: letters.get(found[0], found[0]), str(size))

    sizes = {n: tuple(map(said, v.shape)) for n, v in zip(inputs, values, strict=True)}
    unmoved = [
        f"{name} axis {axis} at {sizes[name][axis]}"
        for name, axes in zip(inputs, wanted, strict=True)
        for axis in sorted(axes)
        if isinstance(sizes[name][axis], int)
    ]
    return {"sizes": sizes, "bounds": bounds, "unmoved": unmoved}


def input_values(program: ExportedProgram) -> list[Tensor]:
    """Fake tensors of the inputs that are tensors."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    given = [nodes[n] for n in program.graph_signature.user_inputs if n in nodes]
    return [node.meta["val"] for node in given if isinstance(node.meta["val"], Tensor)]


def _symbols(size: Any) -> list[Any]:
    return [] if isinstance(size, int) else sorted(size.node.expr.free_symbols, key=str)


def letter_of(number: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[number % 26] * (1 + number // 26)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors among the leaves of nested inputs or outputs, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def compare(
    expected: Sequence[Tensor], found: Sequence[Tensor], allowed: float
) -> tuple[float, float]:
    """Largest absolute difference, and that relative to the largest output.

    Raises:
        ExportError: it is more than `allowed` of the largest output, or shapes differ.
    """
    worst = largest = 0.0
    shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in found]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"the exported graph gives outputs of shapes {shapes[1]}, torch {shapes[0]}; "
            "nothing was written"
        )
    for want, got in zip(expected, found, strict=True):
        if want.numel():
            want, got = want.double(), got.double()
            same = (want == got) | (want.isnan() & got.isnan())
            worst = max(worst, float(torch.where(same, 0.0, (want - got).abs()).max()))
            largest = max(largest, float(want.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    relative = worst / largest if largest else worst
    if not relative <= allowed:
        raise ExportError(
            f"the exported graph computes otherwise than torch: largest difference {worst:.3g}, "
            f"{relative:.2g} of the largest output; nothing was written"
        )
    return worst, relative
