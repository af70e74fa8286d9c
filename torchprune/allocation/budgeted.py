"""Pruning to one budget: find what may go and what that costs, decide, mask."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from torchprune.allocation.layer_times import time_of, times_of
from torchprune.allocation.stopwatches import stopwatches_of
from torchprune.allocation.unit_budget import UnitBudget
from torchprune.allocation.unit_costs import unit_costs
from torchprune.calibration.batches import Batch
from torchprune.errors import ShrinkError
from torchprune.structure.budget_spec import BudgetSpec
from torchprune.structure.offers import Offers
from torchprune.structure.prune_budget import carry_out, shrunk_copy


def prune_to_budget(
    offers: Offers,
    spec: BudgetSpec,
    batches: Sequence[Batch],
    *,
    progress: bool,
    keep_dense: bool,
    reversible: bool,
    hold: torch.dtype | None,
) -> list[str]:
    """Mask what goes of a model, in place.

    Returns:
        what the report should say of it.

    Raises:
        SpecError: the budget cannot be met.
        CalibrationError: statistics are not finite, or the outputs tell nothing. After any error
            the model is as it was.
    """
    ways = offers.reached(unit_costs(offers, batches, hold, progress=progress))
    layers, around = stopwatches_of(spec)
    if spec.latency_ms is None:
        ledger = offers.ledger(spec.amount)
    else:
        ledger = times_of(offers, batches[0], layers, around)
    budget = UnitBudget(spec, offers, ways, ledger, batches, hold, progress)
    decision, closeness = budget.decided()
    lost = carry_out(
        offers,
        ways,
        decision,
        batches,
        closeness.lost,
        progress=progress,
        keep_dense=keep_dense,
        reversible=reversible,
        hold=hold,
    )
    notes = [
        *decision.notes,
        f"budget: {lost:.3g} {closeness.measure} in the end, refitted on all data",
    ]
    if spec.latency_ms is not None:
        with suppress(ShrinkError):  # which `shrink` will raise again
            taken = time_of(shrunk_copy(offers.model, batches[0]), batches[0], around)
            notes.append(f"budget: the smaller model was measured to take {taken:.4g} ms")
    return notes
