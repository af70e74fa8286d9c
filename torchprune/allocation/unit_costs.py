"""What it costs a model's outputs when more and more units of a group go, in nats of KL.

Of a layer that reads units, the change of its outputs is known from the second moment of its
inputs, with what the refit makes up for: in the order in which units stay, one Cholesky factor
L L^T of it gives the least error at every number of them at once, since what the first k inputs
cannot explain of the outputs W x is what W L has in its other columns. What a change of an output
does to the model's comes from gradients: each row's own, by the square sum of its weights'
gradients in random directions (see `output_probes`), spread over inputs as the second moment is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from torchprune import modes
from torchprune.allocation.output_probes import row_energies
from torchprune.calibration.batches import Batch
from torchprune.errors import CalibrationError
from torchprune.methods.decide import groups_of
from torchprune.structure.offers import Offers, Read, Way, way_of
from torchprune.structure.prune_units import by_inputs
from torchprune.structure.specs import StructuredSpec

PROBES = 8
"""Backward passes, which is what `Sensitivity` takes by default."""

_WIDEST_DOUBLE = 6144


def unit_costs(
    offers: Offers, batches: Sequence[Batch], hold: torch.dtype | None, *, progress: bool
) -> list[Way | None]:
    """For each choice the order in which its units go and what that costs; None where no batch
    reaches what reads them. From one pass of the dense model and a few backward passes.

    Raises:
        CalibrationError: the outputs depend on none of the layers by gradients, a loss is missing,
            or statistics are not finite.
    """
    choices = offers.choices
    if not choices:
        return []
    targets = {t.layer.key: t for choice in choices for t in choice.readers}
    found = row_energies(
        offers.model, list(targets.values()), batches, probes=PROBES, seed=0, progress=progress
    )
    energies = dict(zip(targets, found, strict=True))
    scores = _given(offers, batches, hold)
    ways: dict[int, Way] = {}
    with closing(offers.reads(batches, hold)) as reached:  # after an error too
        for choice, reads in reached:
            with modes.exact():
                score = scores.get(id(choice))
                if score is None:
                    score = torch.stack([r.score for r in reads if r.score is not None]).sum(0)
                order, steps = way_of(
                    score, choice.spec, offers.already(choice.group), choice.group.width
                )
                cost = torch.zeros(len(steps), dtype=torch.float64)
                for read in reads:
                    energy = energies[read.target.layer.key]
                    if energy is not None:
                        cost += curve_of(choice.spec, read, energy, order, steps)
            if not bool(cost.isfinite().all()):
                raise CalibrationError(
                    f"{choice.group.name}: what its {choice.group.kind} cost is not finite"
                )
            ways[id(choice)] = Way(order, steps, cost - cost[0])
    return [ways.get(id(choice)) for choice in choices]


def _given(offers: Offers, batches: Sequence[Batch], hold: torch.dtype | None) -> dict[int, Tensor]:
    """The scores for which inputs do not matter, by the id of the choice."""
    found: dict[int, Tensor] = {}
    given = [choice for choice in offers.choices if not by_inputs(choice.spec)]
    for spec in dict.fromkeys(id(choice.spec) for choice in given):
        own = [choice for choice in given if id(choice.spec) == spec]
        scores = offers.runner(batches, hold, own).given_scores()
        found |= {id(choice): score for choice, score in zip(own, scores, strict=True)}
    return found


def curve_of(
    spec: StructuredSpec, read: Read, energy: Tensor, order: Tensor, steps: Tensor
) -> Tensor:
    """(s,) float64: what the outputs of the model lose, by one layer that reads the units.

    Args:
        energy: (groups, rows), of `row_energies`.
        order, steps: as `Way` has them.
    """
    target, moments = read.target, read.moments
    assert moments.gram is not None
    rank = torch.full((len(order) + 1,), len(order))  # of what belongs to no unit: it never goes
    rank[order] = torch.arange(len(order))
    columns = rank[read.columns]
    leaving = columns.argsort(stable=True)
    counts = torch.searchsorted(columns[leaving], steps)
    total = torch.zeros(len(steps), dtype=torch.float64)
    biased = isinstance(getattr(target.layer.module, "bias", None), nn.Parameter)
    biased &= not isinstance(target.layer.module, _ConvTransposeNd)
    for group, weight in enumerate(groups_of(target)):
        rows = moments.rows[group]
        trace = float(moments.square[group].double().sum()) / max(1, rows)
        if not trace > 0:
            continue
        wide = torch.float64 if len(columns) <= _WIDEST_DOUBLE else torch.float32
        gram = moments.gram[group].to(wide) / rows
        if biased and spec.refit:
            assert moments.total is not None
            mean = moments.total[group].to(wide) / rows
            gram = gram - mean.outer(mean)
        own = (weight.to(wide), gram, energy[group].to(weight.device, wide), leaving)
        lost = _refitted(*own, spec.damping) if spec.refit else _masked(*own)
        total += lost[counts].cpu().double() / trace
    return total


def _refitted(
    weight: Tensor, gram: Tensor, energy: Tensor, leaving: Tensor, damping: float
) -> Tensor:
    """(cols + 1,) the weighed squared error when so many columns are gone and the others fitted."""
    staying = leaving.flip(0).to(gram.device)
    gram = gram[staying][:, staying]
    mean = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    while True:
        ridged = gram.clone()
        ridged.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(ridged)
        if not failed or damping > 1e3:
            break
        damping *= 10
    explained = (weight[:, staying] @ lower).square()
    return _from_none((energy @ explained).flip(0))


def _masked(weight: Tensor, gram: Tensor, energy: Tensor, leaving: Tensor) -> Tensor:
    """(cols + 1,) likewise, where the others stay as they are."""
    going = leaving.to(gram.device)
    weight = weight[:, going]
    joint = (weight.T * energy) @ weight * gram[going][:, going]
    every = joint.cumsum(0).cumsum(1).diagonal().clamp_min(0)
    return torch.cat([every.new_zeros(1), every]).cummax(0).values


def _from_none(each: Tensor) -> Tensor:
    return torch.cat([each.new_zeros(1), each.cumsum(0)])
