"""What `sensitivity` found: a row for each layer and level, or for each whole unit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprune.allocation.budget import Share, cheapest, share_of, whole
from torchprune.checkpoint.whole_files import write_whole
from torchprune.errors import TorchpruneError, did_you_mean
from torchprune.reports.tables import Column, by_rich, plain
from torchprune.study.damage import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "torchprune sensitivity 1"

MEASURES = ("kl", "loss", "change", "weighted", "error", "squared")
"""What a row may hold, the most telling first."""

_HEADS = {
    "kl": "KL, nats",
    "loss": "loss difference",
    "change": "change of outputs",
    "weighted": "predicted loss",
    "error": "layer error",
    "squared": "squared error",
}


class SensitivityError(TorchpruneError, ValueError):
    """A sensitivity cannot be measured, resumed or read, or holds not what is asked of it."""


@dataclass(frozen=True)
class Cost:
    """What pruning one layer to one level, or taking away one whole unit, costs.

    Attributes:
        name: the layer's, the block's, or the group's that the unit is one of.
        kind: such as "q_proj"; "block", "head", "neuron" or "channel" of whole units.
        depth: which of the model's blocks it is in, or None.
        level: the level as it was asked for; of a unit its number.
        zeros, size: the weights that are zero then, of how many.
        step: of a layer, the weights of which a count of its scope and pattern is made.
        error: ||X (W - W')^T||^2 / ||X W^T||^2, the layer's own on the calibration data.
        squared: the numerator, a batch of calibration data.
        weighted: the loss difference that gradients predict.
        loss, kl, change: on the windows: the loss beside the dense one, KL(dense || pruned) of the
            outputs in nats, ||y - y'||^2 / ||y||^2 of the outputs of models without logits.
    """

    name: str
    kind: str
    depth: int | None
    level: str
    zeros: int
    size: int
    step: int = 1
    error: float | None = None
    squared: float | None = None
    weighted: float | None = None
    loss: Estimate | None = None
    kl: Estimate | None = None
    change: Estimate | None = None

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size

    def value(self, measure: str) -> Estimate | None:
        """One of the measures, without an error bar where it has none."""
        found = getattr(self, measure)
        return Estimate(found) if isinstance(found, float) else found


@dataclass(frozen=True)
class SensitivityResult:
    """Rows in the model's order, each layer's levels together. `print(result)` shows the costliest.

    Attributes:
        metric: the measure that ranks.
        units: "weights", "blocks", "heads", "neurons" or "channels".
        mode: "cheap" or "exact".
        spec: what was asked for, as text.
        levels: in the order asked for.
        dense_loss: of the windows, None where no loss was measured.
        windows: how many judged (exact), or calibrated (cheap).
        notes: what the user must know.
    """

    rows: Sequence[Cost]
    metric: str
    units: str
    mode: str
    spec: str
    levels: Sequence[str] = ()
    dense_loss: float | None = None
    windows: int = 0
    notes: Sequence[str] = ()
    problem: str = field(default="", repr=False)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> SensitivityResult:
        d = json.loads(text)
        d.pop("format")
        rows = []
        for r in d.pop("rows"):
            for k in ("loss", "kl", "change"):
                if r[k] is not None:
                    r[k] = Estimate(**r[k])
            rows.append(Cost(**r))
        d = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
        return SensitivityResult(rows=tuple(rows), **d)
