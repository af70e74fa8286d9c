"""The laws of count and pattern, over the pruned layers of an artifact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from torchprune.reports.report import RunRecord
from torchprune.specs.patterns import NM, Block, misfit, prune_count
from torchprune.specs.spec import Spec
from torchprune.structure.budget_spec import BudgetSpec
from torchprune.structure.specs import LayerSpec
from torchprune.study.proofs.proof import Breaches, Check, unchecked
from torchprune.study.proofs.stored_demands import Demand, demand_of
from torchprune.study.proofs.stored_layers import StoredLayer
from torchprune.study.proofs.stored_units import UnitLaws, blocks_named


@dataclass
class CountLaws:
    """Both laws, fed layer by layer.

    Attributes:
        runs: of the artifact, in order.
        at_least: where zeros are told by values, not by masks: weights that were zero anyway may
            add to them.
    """

    runs: Sequence[RunRecord]
    at_least: bool = False
    count: Breaches = field(default_factory=Breaches)
    pattern: Breaches = field(default_factory=Breaches)
    seen: int = 0
    weights: int = 0
    _counted: int = 0
    _patterned: int = 0
    _silent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _shared: dict[int, list[tuple[int, int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _units: UnitLaws = field(default_factory=UnitLaws)

    def see(self, layer: StoredLayer) -> None:
        """Look at one layer."""
        self.seen += 1
        self.weights += layer.keep.numel()
        demand = demand_of(layer.key, layer.record, self.runs)
        if isinstance(demand, str):
            self._silent[demand] += 1
            return
        if demand.clash:
            self.count.add(layer.key, *demand.clash.split("|"))
        if demand.units:
            self._counted += 1
            self._patterned += 1
            self._units.see(layer, demand, self.count, self.pattern)
            return
        self._of_weights(layer, demand)

    def _of_weights(self, layer: StoredLayer, demand: Demand) -> None:
        pattern = demand.pattern
        if layer.view is None or pattern is None:
            self._silent["a vector, which no pattern is of"] += 1
            return
        view = layer.view
        if isinstance(pattern, NM) and (why := misfit(pattern, view.rows, view.axis)):
            self.pattern.add(layer.key, f"a shape that can hold {pattern}", why)
            return
        if isinstance(pattern, Block) and (why := misfit(pattern, view.rows, view.cols)):
            self.pattern.add(layer.key, f"a shape that can hold {pattern}", why)
            return
        zero = layer.zero
        if isinstance(pattern, NM):
            self._patterned += 1
            self._groups(layer, zero, demand, pattern)
        unit = "weights"
        if isinstance(pattern, Block):
            self._patterned += 1
            zero, unit = self._tiles(layer, zero, demand, pattern), f"{pattern} tiles"
        if self.at_least or not layer.sure:  # more may be zero, and groups may be unknown
            demand = replace(demand, exact=False)
        self._counted += 1
        self._numbers(layer, zero, demand, unit)

    def _groups(self, layer: StoredLayer, zero: Tensor, demand: Demand, pattern: NM) -> None:
        kept = (~zero).unflatten(2, (-1, pattern.m)).sum(3)
        wrong = kept > pattern.n if demand.share == 1 else kept < pattern.n
        if bool(wrong.any()):
            matrix, row, group = wrong.nonzero()[0].tolist()
            start = group * pattern.m
            most = "at most" if demand.share == 1 else "at least"
            self.pattern.add(
                layer.key,
                f"{most} {pattern.n} of every {pattern.m} weights kept along the input axis",
                f"{int(kept[matrix, row, group])} kept in {_matrix(layer, matrix)}row {row}, "
                f"columns {start} to {start + pattern.m - 1}; {int(wrong.sum()):,} of "
                f"{wrong.numel():,} groups are wrong",
            )

    def _tiles(self, layer: StoredLayer, zero: Tensor, demand: Demand, pattern: Block) -> Tensor:
        tiles = zero.unflatten(2, (-1, pattern.cols)).unflatten(1, (-1, pattern.rows))
        zeros, size = tiles.sum((2, 4)), pattern.rows * pattern.cols
        torn = (zeros != 0) & (zeros != size)
        if bool(torn.any()) and demand.exact and not self.at_least:
            matrix, row, col = torn.nonzero()[0].tolist()
            self.pattern.add(
                layer.key,
                f"whole tiles of {pattern.rows} x {pattern.cols}",
                f"{int(zeros[matrix, row, col])} of {size} weights pruned in the tile at "
                f"{_matrix(layer, matrix)}row {row * pattern.rows}, column {col * pattern.cols}; "
                f"{int(torn.sum()):,} of {torn.numel():,} tiles are torn",
            )
        whole: Tensor = zeros == size
        return whole

    def _numbers(self, layer: StoredLayer, zero: Tensor, demand: Demand, unit: str) -> None:
        groups, rows, cols = zero.shape
        found = int(torch.count_nonzero(zero))
        if isinstance(demand.pattern, NM) and demand.share < 1:
            return
        if demand.run is not None and (demand.scope == "global" or demand.uneven):
            tile = layer.keep.numel() // zero.numel()
            by_row = demand.scope == "row"
            step = tile * groups * (rows if by_row else 1)
            total = zero.numel() if demand.scope == "global" else (cols if by_row else rows * cols)
            self._shared[demand.run].append((found * tile, step, total))
        if demand.scope == "global":
            return
        per_row, per_matrix = zero.sum(2), zero.sum((1, 2))
        by_rows = _wrong(per_row, demand, cols)
        by_matrix = _wrong(per_matrix, demand, rows * cols)
        if isinstance(demand.pattern, NM) or demand.scope == "row":
            wrong, counts, each = by_rows, per_row, cols
        elif demand.scope == "layer":
            wrong, counts, each = by_matrix, per_matrix, rows * cols
        elif not bool(by_rows.any()) or not bool(by_matrix.any()):
            return
        else:
            wrong, counts, each = by_matrix, per_matrix, rows * cols
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            low, high = demand.counts(each)
            wanted = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            where = _matrix(layer, at[0]) + (f"row {at[1]}" if len(at) > 1 else "the layer")
            what = "rows" if len(at) > 1 else "matrices"
            self.count.add(
                layer.key,
                f"{'exactly' if demand.exact else 'at least'} {wanted} of {each:,} {unit} pruned",
                f"{int(counts[tuple(at)]):,} in {where}; {int(wrong.sum()):,} of "
                f"{wrong.numel():,} {what} are wrong",
            )

    def results(self) -> list[Check]:
        """What came of it."""
        self._budgets()
        self._units.finish(self.pattern)
        self._blocks()
        silent = "; ".join(f"{why} ({n:,} layers)" for why, n in self._silent.items())
        more = f"; not counted: {silent}" if silent else ""
        if not self.seen:
            why = "no layer is recorded as pruned"
            return [unchecked("count", why), unchecked("pattern", why)]
        how = "at least" if self.at_least else "exactly"
        count = unchecked("count", silent)
        if self._counted or self.count.count:
            said = f"{how} the zeros that each record and its run's spec demand{more}"
            count = self.count.judge("count", said, layers=self._counted, weights=self.weights)
        pattern = unchecked("pattern", "any weight may be pruned: no groups, tiles or units")
        if self._patterned or self.pattern.count:
            said = "n:m groups along the inputs, whole tiles, whole units"
            pattern = self.pattern.judge("pattern", said, layers=self._patterned)
        return [count, pattern]

    def _budgets(self) -> None:
        for at, shares in self._shared.items():
            spec = self.runs[at].spec
            assert isinstance(spec, Spec)
            assert spec.sparsity is not None
            found = sum(zeros for zeros, _, _ in shares)
            if spec.scope == "global":
                tile = (
                    spec.pattern.rows * spec.pattern.cols if isinstance(spec.pattern, Block) else 1
                )
                wanted = tile * prune_count(sum(total for _, _, total in shares), spec.sparsity)
            else:
                wanted = sum(step * prune_count(n, spec.sparsity) for _, step, n in shares)
            if found != wanted and not (self.at_least and found > wanted):
                self.count.add(
                    f"all {len(shares):,} layers of run {at + 1}",
                    f"{wanted:,} weights pruned (sparsity {float(spec.sparsity):.6g})",
                    f"{found:,}",
                )

    def _blocks(self) -> None:
        if any(isinstance(run.spec, BudgetSpec) for run in self.runs):
            return  # which says how much may stay, and not how many blocks go
        asked = sum(run.spec.drop for run in self.runs if isinstance(run.spec, LayerSpec))
        found = blocks_named(self._units.dropped)
        if found and len(found) != asked:
            names = ", ".join(sorted(found)[:4])
            self.count.add(names, f"{asked} blocks dropped", f"{len(found)}")


def _wrong(counts: Tensor, demand: Demand, total: int) -> Tensor:
    low, high = demand.counts(total)
    return (counts < low) | (counts > high) if demand.exact else counts < low


def _matrix(layer: StoredLayer, number: int) -> str:
    assert layer.view is not None
    return f"matrix {number}, " if layer.view.groups > 1 else ""
