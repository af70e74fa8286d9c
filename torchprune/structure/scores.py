"""What a unit is worth: pure functions on weights, statistics and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.moments import Moments
from torchprune.errors import CalibrationError
from torchprune.graph.groups import Group


def read_scores(name: str, weight: Tensor, moments: Moments, group: int = 0) -> Tensor:
    """(cols,) what each input of a layer adds to its output, from one group's (rows, cols) weight.

    "flap": var(x_j) * ||W_:j||^2, the part of an input that no bias can stand in for (An et al.,
    arXiv 2312.11983). "activation": E[x_j^2] * ||W_:j||^2.
    """
    energy = moments.square[group] / max(1, sum(moments.rows))
    if name == "flap":
        assert moments.total is not None
        rows = max(1, moments.rows[group])
        share = rows / max(1, sum(moments.rows))  # of all tokens, those that this group reads
        energy = (energy - share * (moments.total[group] / rows).square()).clamp_min(0)
    return energy * weight.float().square().sum(0)


def by_unit(values: Tensor, units: Tensor, count: int) -> Tensor:
    """(count,) sums of values over the indices of each unit; those of none (-1) are left out."""
    inside = units >= 0
    return torch.zeros(count).index_add_(0, units[inside], values.cpu().float()[inside])


def weight_scores(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """(count,) the square sum of all weights of each unit."""
    return _summed(group, {k: w.detach().float().square() for k, w in weights.items()})


def random_scores(group: Group, seed: int) -> Tensor:
    """(count,) by chance, the same for the same seed, group name and count."""
    own = sum(ord(c) * 31**i for i, c in enumerate(group.name)) % (1 << 31)
    return torch.rand(group.count, generator=torch.Generator().manual_seed(seed + own))


def taylor_scores(
    model: nn.Module,
    groups: Sequence[Group],
    parameters: Mapping[str, Tensor],
    batches: Sequence[Batch],
    loss: Callable[[nn.Module, Any], Tensor],
) -> list[Tensor]:
    """(count,) a group: |sum of weight * gradient| over all weights of a unit, summed over batches.

    The first-order change of the loss if the unit were zero (Molchanov et al., arXiv 1906.10771).

    Raises:
        CalibrationError: the loss is not a scalar, or does not depend on some of the weights.
    """
    scores = [torch.zeros(group.count) for group in groups]
    keys = list(parameters)
    needed = [parameters[key].requires_grad for key in keys]
    try:
        for key in keys:
            parameters[key].requires_grad_(True)
        for batch in batches:
            with modes.calibration_mode(model), torch.inference_mode(False), torch.enable_grad():
                value = loss_on(model, batch, loss)
                grads = torch.autograd.grad(
                    value, [parameters[key] for key in keys], allow_unused=True
                )
            products = {
                key: parameters[key].detach().float() * (0.0 if grad is None else grad.float())
                for key, grad in zip(keys, grads, strict=True)
            }
            for score, group in zip(scores, groups, strict=True):
                score += _summed(group, products).abs()
    finally:
        for key, need in zip(keys, needed, strict=True):
            parameters[key].requires_grad_(need)
    return scores


def loss_on(model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Any], Tensor]) -> Tensor:
    """A model's loss on one batch.

    Raises:
        CalibrationError: it is not a scalar.
    """
    own = batch.private()
    value = loss(model, own.kwargs or own.args)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise CalibrationError(f"loss must give a scalar tensor, got {value!r:.80}")
    return value


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a transformers language model that predicts its own input, padding left out.

    Raises:
        CalibrationError: the model gives no loss.
    """
    inputs = dict(batch) if isinstance(batch, dict) else {"input_ids": batch[0]}
    side = "decoder_" if "decoder_input_ids" in inputs else ""
    ids, mask = inputs.get(f"{side}input_ids"), inputs.get(f"{side}attention_mask")
    if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.shape == ids.shape:
        ids = ids.masked_fill(mask == 0, -100)  # what transformers' losses pass over
    inputs.setdefault("labels", ids)
    try:
        loss = model(**inputs).loss
    except (AttributeError, TypeError):
        loss = None
    if not isinstance(loss, Tensor):
        raise CalibrationError(
            f"a {type(model).__name__} gives no loss by itself; pass loss=, a callable "
            "(model, batch) -> scalar"
        )
    return loss


def _summed(group: Group, values: Mapping[str, Tensor]) -> Tensor:
    """(count,) sums over all of a unit's weights, of values shaped like them."""
    total = torch.zeros(group.count)
    for member in group.members:
        if member.key in values:
            here = values[member.key]
            others = [a for a in range(here.dim()) if a != member.axis]
            total += by_unit(here.sum(others) if others else here, member.units, group.count)
    return total
