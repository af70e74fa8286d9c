"""What each trial cost, as rows, and what may be asked of them: kinds, overrides, an allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from torchprune.allocation.budget import budget_of, cheapest, share_of, whole
from torchprune.allocation.cost_curves import curve_of
from torchprune.errors import TorchpruneError, did_you_mean
from torchprune.specs.allocation import Sensitivity
from torchprune.study.costs.damage import Estimate

MEASURES = ("kl", "loss", "change", "predicted", "taylor", "error", "squared")
"""What a row may hold, the most telling first."""

MEANINGS: Mapping[str, str] = {
    "kl": "KL, nats",
    "loss": "loss difference",
    "change": "change of outputs",
    "predicted": "predicted KL or change",
    "taylor": "|weight x gradient|",
    "error": "layer error",
    "squared": "squared layer error",
}
"""What each measure is, in a few words."""


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
        predicted: what gradients say the KL, or the change of outputs, will be.
        taylor: of units, |sum of weight * gradient of the loss|, mean over batches.
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
    predicted: float | None = None
    taylor: float | None = None
    loss: Estimate | None = None
    kl: Estimate | None = None
    change: Estimate | None = None

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size

    def measured(self, found: Mapping[str, Any]) -> Cost:
        """With what was found, by name of the measure."""
        return replace(self, **found)

    def value(self, measure: str) -> Estimate | None:
        """One of the measures, without an error bar where it has none."""
        found = getattr(self, measure)
        return Estimate(found) if isinstance(found, float) else found


@dataclass(frozen=True)
class Costs:
    """Rows in the model's order, each layer's levels together, and what may be asked of them.

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

    # -- asking ------------------------------------------------------------------------------------

    @property
    def measures(self) -> list[str]:
        """What the rows hold, the most telling first."""
        return [m for m in MEASURES if any(getattr(row, m) is not None for row in self.rows)]

    @property
    def layers(self) -> list[str]:
        """The names of the layers, or of what the units are in, in order."""
        return list(dict.fromkeys(row.name for row in self.rows))

    def costs(self, metric: str | None = None) -> dict[str, list[tuple[float, float]]]:
        """By layer its (sparsity, cost), one a level.

        Raises:
            SensitivityError: nothing was measured by that name.
        """
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            value = row.value(self._checked(metric))
            if value is not None:
                found.setdefault(row.name, []).append((row.sparsity, value.mean))
        return found

    def kinds(self, metric: str | None = None) -> dict[str, dict[str, float]]:
        """By kind, at each level the sum of its layers' costs; of whole units, under "" the sum."""
        name, found = self._checked(metric), dict[str, dict[str, float]]()
        for row in self.rows:
            level = row.level if self.levels else ""
            if (value := row.value(name)) is not None:
                sums = found.setdefault(row.kind, {})
                sums[level] = sums.get(level, 0.0) + value.mean
        return found

    def overrides(
        self, sparsity: float = 0.5, *, spread: float = 0.1, metric: str | None = None
    ) -> dict[str, float]:
        """A sparsity for each layer, ready for `overrides=` of the same kind of spec: of those with
        as many zeros in all as that sparsity everywhere, the one whose summed costs are least.

        Args:
            spread: each is within so much of `sparsity`.

        Raises:
            SensitivityError: units were measured, or costs at one sparsity alone; or the sparsity
                is no share of zeros below 1.
        """
        if not 0 <= sparsity < 1:
            raise SensitivityError(
                f"overrides: sparsity is the share of zeros, 0 <= sparsity < 1, got {sparsity!r}"
            )
        if self.units != "weights":
            raise SensitivityError(f"overrides are for the weights of layers, not for {self.units}")
        costs, rows = self.costs(metric), {row.name: row for row in self.rows}
        if few := [name for name, points in costs.items() if len(dict(points)) < 2]:
            raise SensitivityError(
                f"{few[0]}: a budget can be shared by costs at two levels or more, and there is "
                "one: sensitivity(..., levels=(0.3, 0.5, 0.7))"
            )
        shares = [
            share_of(rows[n].step, rows[n].size // rows[n].step, sparsity, spread) for n in costs
        ]
        curves = [curve_of(p, s, 21) for p, s in zip(costs.values(), shares, strict=True)]
        counts = whole(cheapest(curves, shares), shares)
        spent = sum(s.step * n for s, n in zip(shares, counts, strict=True))
        assert spent == budget_of(shares)
        return {
            name: _short(count, share.total)
            for name, count, share in zip(costs, counts, shares, strict=True)
        }

    def allocation(self, *, spread: float = 0.1, metric: str | None = None) -> Sensitivity:
        """What `allocation=` takes to spend a spec's budget by these costs."""
        return Sensitivity(result=self.costs(metric), spread=spread)

    def _checked(self, metric: str | None) -> str:
        name = self.metric if metric is None else metric
        if name not in self.measures:
            raise SensitivityError(
                f"nothing was measured as {name!r}{did_you_mean(name, MEASURES)}; there is "
                f"{', '.join(self.measures) or 'nothing'}"
            )
        return name


def _short(count: int, total: int) -> float:
    """The shortest decimal of which `prune_count` makes that count."""
    for digits in range(1, 18):
        scale = 10**digits
        found = -(-count * scale // total)  # the least that is enough
        if Fraction(found, scale) * total < count + 1:
            return float(Fraction(found, scale))
    raise AssertionError("a layer has less than 10^17 weights")
