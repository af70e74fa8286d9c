"""The law of quantized weights: values of the grid that a run recorded, zeros at code 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from torchprune.methods.grid import plain_scale, rounded
from torchprune.reports.report import RunRecord
from torchprune.specs.quantize import Int4, Int8
from torchprune.study.proofs.proof import Breaches, Check, unchecked
from torchprune.study.proofs.stored_demands import demand_of
from torchprune.study.proofs.stored_layers import StoredLayer


@dataclass
class GridLaw:
    """Fed layer by layer."""

    runs: Sequence[RunRecord]
    found: Breaches = field(default_factory=Breaches)
    layers: int = 0
    weights: int = 0
    left: int = 0

    def see(self, layer: StoredLayer) -> None:
        """Look at one layer."""
        demand = demand_of(layer.key, layer.record, self.runs)
        if isinstance(demand, str) or demand.run is None or layer.view is None:
            return
        grid = getattr(self.runs[demand.run].spec, "quantize", None)
        if not isinstance(grid, Int4 | Int8) or f"quantized to {grid}" not in layer.record.note:
            return
        if isinstance(grid, Int8) and layer.value.dtype == torch.bfloat16:
            self.left += 1  # eight bits cannot tell all codes in a dtype of eight
            return
        self.layers += 1
        self.weights += layer.value.numel()
        wrong = 0
        for matrix in layer.view.to_matrix(layer.value):
            scale = plain_scale(matrix.float().contiguous(), grid, matrix.dtype)
            again = rounded(matrix, scale, grid).to(matrix.dtype)
            wrong += int((again != matrix).sum())
        if wrong:
            self.found.add(layer.key, f"values of the grid of {grid}", f"{wrong:,} that are none")

    def result(self) -> Check:
        """What came of it."""
        if not self.layers:
            why = "no run rounded weights to a grid"
            if self.left:
                why = f"{self.left} layers are Int8 in bfloat16, which cannot tell all codes"
            return unchecked("quantized", why)
        said = "whole codes times one scale a group, as recorded; pruned weights have code 0"
        return self.found.judge("quantized", said, layers=self.layers, weights=self.weights)
