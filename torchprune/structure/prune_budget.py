"""What was decided for one budget, put on a model: tried and taken back, or for good."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.graph.capture import Call
from torchprune.graph.groups import read_groups
from torchprune.graph.trace import trace
from torchprune.masking.mask import Record
from torchprune.reports.report import RunRecord
from torchprune.structure.blocks import mask_whole, skipped
from torchprune.structure.offers import Decision, Offers, Way
from torchprune.structure.parameter_edits import Edits
from torchprune.structure.plan import planned
from torchprune.structure.prune_units import UnitRunner, attach_units
from torchprune.structure.shrink import shrink
from torchprune.structure.unit_choices import Choice


@contextmanager
def tried(
    offers: Offers,
    ways: Sequence[Way],
    decision: Decision,
    batches: Sequence[Batch],
    hold: torch.dtype | None,
) -> Iterator[None]:
    """The model as it would compute without what goes, refitted on these batches; not trained."""
    run = RunRecord(spec=offers.run.spec)  # what refitting notes of this is not kept
    choices = _decided(offers, ways, decision)
    runner = UnitRunner(offers.model, batches, choices, run, hold, decision.blocks)
    with Edits(keep_dense=False) as edits, _without(offers, decision):
        try:
            runner.sweep(edits, progress=False, training=False)
            runner.silence(edits)
            yield
        finally:
            edits.undo()


def carry_out(
    offers: Offers,
    ways: Sequence[Way],
    decision: Decision,
    batches: Sequence[Batch],
    judge: Callable[[], float],
    *,
    progress: bool,
    hold: torch.dtype | None,
    keep_dense: bool,
    reversible: bool,
) -> float:
    """Mask what goes, in place, and refit and train what reads it as the specs say.

    Returns:
        what the judge says of the model as it then is.

    Raises:
        CalibrationError: statistics or a fit are not finite. The model is as it was.
    """
    choices = _decided(offers, ways, decision)
    runner = UnitRunner(offers.model, batches, choices, offers.run, hold, decision.blocks)
    with Edits(keep_dense=keep_dense) as edits:
        with _without(offers, decision):
            runner.sweep(edits, progress=progress)
            runner.silence(edits)
            runner.finish()
            found = judge()
        with modes.exact():
            edits.settle()
            record = Record("layers", "block dropped by budget")
            for name in decision.blocks:
                mask_whole(offers.idle[name], record, reversible=reversible)
            attach_units(choices, runner.done, edits, reversible=reversible)
    return found


def shrunk_copy(model: nn.Module, example: Batch) -> nn.Module:
    """What `shrink` makes of a model, which stays as it is.

    Raises:
        ShrinkError: as `shrink` does.
    """
    small = copy.deepcopy(model)
    calls = [Call(example)]
    return shrink(
        small, planned(small, calls, read_groups(small, trace(small, calls, closed=True)))
    )


def _decided(offers: Offers, ways: Sequence[Way], decision: Decision) -> list[Choice]:
    """The choices of which some units go and that are not in a block that goes."""
    found = []
    for at in offers.beyond(decision.blocks):
        choice, way, step = offers.choices[at], ways[at], decision.steps[at]
        if step:
            gone = way.gone(step)
            found.append(Choice(choice.spec, choice.group, choice.layers, choice.readers, gone))
    return found


@contextmanager
def _without(offers: Offers, decision: Decision) -> Iterator[None]:
    with skipped([offers.blocks[name] for name in decision.blocks]):
        yield
