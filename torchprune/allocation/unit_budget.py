"""Which units and blocks go for one budget: by predicted costs, and by trials of what they make.

Costs of single groups are predicted and add while little goes; what blocks cost together, and
beside units, they do not tell. So the model is tried with more and more blocks gone and the rest
of the budget spent on units, then with the kinds of units weighed against each other otherwise,
and what comes nearest to the dense outputs is taken. The same data give the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

from torchprune.allocation.closeness import Closeness
from torchprune.allocation.spending import spent
from torchprune.calibration.batches import Batch
from torchprune.errors import SpecError
from torchprune.structure.blocks import skipped
from torchprune.structure.budget_spec import BudgetSpec
from torchprune.structure.ledger import Ledger
from torchprune.structure.offers import Decision, Offers, Way
from torchprune.structure.prune_budget import tried

JUDGES = 4
"""Windows that trials are judged on, and half of them for blocks one by one."""

FITTED = 8
"""Windows that a trial refits on."""

_SEVERAL = 4
"""Blocks of which the best is looked for when one more goes."""

_WORSE = 2
"""Trials with more blocks that may be worse, one after the other."""


@dataclass(eq=False)
class UnitBudget:
    """One budget to be spent.

    Args:
        ways: of each choice.
        ledger: of what the budget limits.
    """

    spec: BudgetSpec
    offers: Offers
    ways: Sequence[Way]
    ledger: Ledger
    batches: Sequence[Batch]
    hold: torch.dtype | None
    progress: bool
    _costs: dict[tuple[tuple[int, ...], tuple[str, ...]], float] = field(default_factory=dict)
    _order: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        amount, given = self.spec.amount, getattr(self.spec, self.spec.amount)
        self.limit = given if amount == "latency_ms" else given * self.offers.before(amount)
        self._account = self.offers.account(self.ledger, self.ways)
        self.offers.start(self._account)
        self.whole = self._account.total
        few = min(JUDGES, max(1, len(self.batches) // 4))
        self._fitting = list(self.batches[:-few] or self.batches)[:FITTED]
        self._judging = self.batches[-few:]

    def decided(self) -> tuple[Decision, Closeness]:
        """What goes, and what judged it.

        Raises:
            SpecError: the budget cannot be met; the message says how far one can go.
        """
        least = self._least()
        self.closeness = Closeness(self.offers.model, self._judging)
        with tqdm(desc="budget", unit="trial", disable=not self.progress) as self._bar:
            best = self._by_kinds(self._by_blocks(least))
        return replace(best, notes=tuple(self._notes(best))), self.closeness

    def _least(self) -> list[str]:
        """The blocks without which least is left.

        Raises:
            SpecError: with all units gone too that is more than may stay.
        """
        sizes = {n: sum(p.numel() for p in b.parameters()) for n, b in self.offers.blocks.items()}
        blocks = self._leaving_one(sorted(sizes, key=lambda name: -sizes[name]))
        if self._spend(blocks, self._plain()) is not None:
            return blocks
        least, amount = self._account.total, self.spec.amount
        if amount == "latency_ms":
            asked, could = f"{self.limit:.4g} ms", f"{least:.4g} ms, of {self.whole:.4g} ms"
        else:
            before = self.offers.before(amount)
            asked = f"{getattr(self.spec, amount):.4g}"
            could = f"{least / before:.4g} ({least:,.0f} of {before:,.0f} {amount})"
        name = type(self.offers.model).__name__
        raise SpecError(
            f"BudgetSpec: {amount}={asked} cannot be met in this {name}: with "
            f"all gone that may go for {', '.join(type(s).__name__ for s in self.spec.over)}, "
            f"{could} would stay; ask for more than that, or let more kinds go (over=)"
        )

    # -- candidates ------------------------------------------------------------------------------

    def _plain(self) -> dict[str, float]:
        return {spec.method: 1.0 for spec in self.spec.units}

    def _spend(self, blocks: Sequence[str], weights: dict[str, float]) -> Decision | None:
        """What goes beside some blocks, costs of each kind multiplied by its weight; None if that
        is not enough."""
        self.offers.start(self._account, blocks)
        outside = set(self.offers.beyond(blocks))
        costs = [
            way.cost * weights[choice.spec.method] if at in outside else way.cost[:1]
            for at, (way, choice) in enumerate(zip(self.ways, self.offers.choices, strict=True))
        ]
        if not spent(self._account, costs, self.limit):
            return None
        return Decision(tuple(self._account.now[: len(self.ways)]), tuple(blocks))

    def _cost(self, decision: Decision) -> float:
        """What the outputs lose, measured with what is left refitted."""
        key = decision.steps, decision.blocks
        if key not in self._costs:
            own = self.offers, self.ways, decision
            with tried(*own, self._fitting, self.hold):
                self._costs[key] = self.closeness.lost()
            self._bar.update()
        return self._costs[key]

    def _by_blocks(self, least: Sequence[str]) -> Decision:
        """The best of more and more blocks, doubled and then halved in between."""
        found: dict[int, Decision] = {}
        count = worse = 0
        while worse < _WORSE and count <= len(least):
            blocks = self._first(count)
            decision = self._spend(blocks, self._plain())
            if decision is not None:
                before = [self._cost(one) for one in found.values()]
                found[count] = decision
                worse = worse + 1 if before and self._cost(decision) >= min(before) else 0
                if not any(decision.steps):
                    break  # the blocks alone are enough
            if count == len(least):
                break
            count = self._next(count, len(least))
        if not found:
            decision = self._spend(least, self._plain())
            assert decision is not None
            return decision
        best = min(found, key=lambda n: self._cost(found[n]))
        for other in tuple(found):
            between = (best + other) // 2
            near = not any(min(best, other) < n < max(best, other) for n in found)
            if near and between not in found:
                decision = self._spend(self._first(between), self._plain())
                if decision is not None:
                    found = {**found, between: decision}
        return min(found.values(), key=self._cost)

    def _next(self, count: int, most: int) -> int:
        """Twice as many blocks, but no more than are enough by themselves."""
        twice = min(max(1, 2 * count), most)
        for more in range(count + 1, twice):
            self.offers.start(self._account, self._first(more))
            if self._account.total <= self.limit:
                return more
        return twice

    def _by_kinds(self, best: Decision) -> Decision:
        """The best with kinds of units weighed otherwise: twice as dear, or half, and on."""
        kinds = list(dict.fromkeys(choice.spec.method for choice in self.offers.choices))
        weights = self._plain()
        for kind in kinds[1:]:
            for factor in (2.0, 0.5):
                moved = False
                while True:
                    other = {**weights, kind: weights[kind] * factor}
                    decision = self._spend(best.blocks, other)
                    if decision is None or self._cost(decision) >= self._cost(best):
                        break
                    best, weights, moved = decision, other, True
                if moved:
                    break
        return best

    # -- blocks ----------------------------------------------------------------------------------

    def _first(self, count: int) -> list[str]:
        """So many blocks: that which costs least by itself, then the best of the next few."""
        blocks = self.offers.blocks
        if count and not self._order:
            self._alone = {name: self._skipped([name]) for name in blocks}
        while len(self._order) < count:
            order = [*self._order, *sorted(self._alone, key=lambda n: self._alone[n])]
            allowed = self._leaving_one(dict.fromkeys(order))
            rest = [name for name in allowed if name not in self._order][:_SEVERAL]
            if len(self._order) and len(rest) > 1:
                rest.sort(key=lambda name: self._skipped([*self._order, name]))
            self._order.append(rest[0])
        return self._order[:count]

    def _skipped(self, names: Sequence[str]) -> float:
        with skipped([self.offers.blocks[name] for name in names]):
            return self.closeness.lost(max(1, JUDGES // 2))

    def _leaving_one(self, order: Sequence[str] | dict[str, None]) -> list[str]:
        """Blocks in an order, without the last of each list."""
        left = dict(self.offers.lengths)
        for name in self.offers.plan.blocks:
            if (parent := name.rpartition(".")[0]) in left:
                left[parent] -= 1
        found = []
        for name in order:
            parent = name.rpartition(".")[0]
            if left[parent] > 1:
                found.append(name)
                left[parent] -= 1
        return found

    # -- telling ---------------------------------------------------------------------------------

    def _notes(self, best: Decision) -> list[str]:
        self.offers.start(self._account, best.blocks)
        for at, step in enumerate(best.steps):
            self._account.go(at, step)
        unit = "ms" if self.spec.amount == "latency_ms" else self.spec.amount
        figure = "{:,.4g}" if unit == "ms" else "{:,.0f}"
        stays, may = figure.format(self._account.total), figure.format(self.limit)
        outside, parts = self.offers.beyond(best.blocks), []
        if self.offers.blocks:
            parts.append(f"{len(best.blocks)} of {len(self.offers.blocks)} blocks")
        predicted = 0.0
        for spec in self.spec.units:
            own = [at for at in outside if self.offers.choices[at].spec is spec]
            total = sum(len(self.ways[at].order) for at in own)
            gone = sum(int(self.ways[at].steps[best.steps[at]]) for at in own)
            predicted += sum(float(self.ways[at].cost[best.steps[at]]) for at in own)
            if own:
                parts.append(f"{gone:,} of {total:,} {spec.kind} in {len(own)} groups")
        tries = ", ".join(
            f"{len(blocks)} blocks {cost:.3g}" if self.offers.blocks else f"{cost:.3g}"
            for (_, blocks), cost in self._costs.items()
        )
        what = self.closeness.measure
        return [
            f"budget: {stays} {unit} stay of {figure.format(self.whole)}, {may} may: "
            f"{'; '.join(parts)} go",
            f"budget: the units that go are predicted to cost {predicted:.3g} {what}"
            + (f"; tried: {tries}" if tries else ""),
        ]
