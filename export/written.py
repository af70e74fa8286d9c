"""What an export wrote, and how it compares with the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
        difference: largest absolute difference of any output from torch, on the example.
        relative: the same over the largest absolute output.
        load_seconds: until the runtime could run it.
        brings: what sparsity brings in this form, in a sentence.
        inputs, outputs: the graph's names, where the format has any.
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

    def __str__(self) -> str:
        share = self.bytes / self.dense_bytes if self.dense_bytes else 1.0
        lines = [
            f"{self.path}: {self.bytes:,} bytes ({share:.3f} of dense), {len(self.packed)} weights "
            f"packed; loads in {self.load_seconds:.2f} s; {self.runtime} differs from torch by at "
            f"most {self.difference:.3g} ({self.relative:.2g} of the largest output)"
        ]
        for what, names in (("inputs", self.inputs), ("outputs", self.outputs)):
            if names:
                lines.append(f"{what}: {_few(names)}")
        return "\n".join([*lines, self.brings])


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown


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
