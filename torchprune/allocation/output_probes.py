"""What pruning layers will do to a model's outputs, by a few backward passes through the dense one.

To second order, KL(dense || pruned) of a model's outputs is 1/2 d^T J^T F J d, d being the change
of the weights, J the Jacobian of the logits and F = diag(p) - p p^T. For random z of covariance F
the square of (J^T z)^T d is, on average, d^T J^T F J d: one backward pass gives it for the weights
of all layers at once (a Hutchinson estimate with the Fisher matrix). Each row of a weight is taken
by itself, since what two output channels do is about uncorrelated: on SmolLM2 sums over rows rank
layers better than whole products from as few passes. Outputs that are no logits have F = 1, and
what is predicted is ||y - y'||^2 / ||y||^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.block_calls import floats_of
from torchprune.calibration.counted_rows import logits_of, rows_of
from torchprune.errors import CalibrationError
from torchprune.masking.packing import unpack_bits
from torchprune.masking.targets import Target

Masks = Sequence[Tensor]
"""Packed bits, True = kept, of a layer's weight at several levels."""


def predicted_damage(
    model: nn.Module,
    layers: Sequence[tuple[Target, Masks]],
    batches: Sequence[Batch],
    *,
    probes: int,
    seed: int,
    progress: bool,
) -> list[list[float] | None]:
    """For each layer and each of its masks, what the model's outputs are predicted to lose; None
    for a layer that no probed batch reaches.

    Args:
        probes: backward passes, one a batch, beginning anew where there are fewer batches.
        seed: of the random directions. The same seed gives the same bits.

    Returns:
        KL in nats a row of the logits, or ||y - y'||^2 / ||y||^2.

    Raises:
        CalibrationError: the outputs depend on none of the weights by gradients.
    """
    totals: list[list[float] | None] = [None] * len(layers)
    targets = [target for target, _ in layers]

    def take(at: int, gradient: Tensor, scale: float) -> None:
        target, masks = layers[at]
        total = totals[at] or [0.0] * len(masks)
        squares = _squares(target, masks, gradient)
        totals[at] = [t + scale * square for t, square in zip(total, squares, strict=True)]

    _probe_all(model, targets, batches, take, probes, seed, progress)
    if all(total is None for total in totals):
        raise CalibrationError(
            f"the outputs of this {type(model).__name__} do not depend on its layers by gradients; "
            'go by the layers\' errors: probes=0, or Sensitivity(cost="error")'
        )
    return totals


def row_energies(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Batch],
    *,
    probes: int,
    seed: int,
    progress: bool,
) -> list[Tensor | None]:
    """For each layer (groups, rows) float64: by how much the square of a change of a row's weights
    is multiplied in what the outputs lose, on average over directions; None where none is reached.

    Raises:
        CalibrationError: the outputs depend on none of the weights by gradients.
    """
    found: list[Tensor | None] = [None] * len(targets)

    def take(at: int, gradient: Tensor, scale: float) -> None:
        square = targets[at].view.to_matrix(gradient.double().square()).sum(2) * scale
        seen = found[at]
        found[at] = square if seen is None else seen + square

    _probe_all(model, targets, batches, take, probes, seed, progress)
    if all(one is None for one in found):
        raise CalibrationError(
            f"the outputs of this {type(model).__name__} do not depend by gradients on the layers "
            "that read what may go"
        )
    return found


def _probe_all(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Batch],
    take: Callable[[int, Tensor, float], None],
    probes: int,
    seed: int,
    progress: bool,
) -> None:
    """Hand on, from each probe, for each layer that it reaches: its place, the weight's gradient,
    and what makes squares of it the mean over probes."""
    _check_differentiable(targets)
    weights = [target.weight for target in targets]
    with (
        tqdm(total=probes, desc="probes", unit="pass", disable=not progress) as bar,
        _needing_gradients(weights),
    ):
        for number in range(probes):
            batch = batches[number % len(batches)]
            gradients, scale = _probe(model, batch, weights, seed + number)
            with modes.exact():
                for at, gradient in enumerate(gradients):
                    if gradient is not None:  # else this batch does not reach it
                        take(at, gradient, scale / probes)
            bar.update()


def _check_differentiable(targets: Iterable[Target]) -> None:
    for target in targets:
        if not target.weight.is_floating_point() or target.weight.element_size() < 2:
            raise CalibrationError(
                f"{target.name}: its weight is {target.weight.dtype}, which has no gradients; go "
                'by the layers\' errors: probes=0, or Sensitivity(cost="error")'
            )


@contextmanager
def _needing_gradients(weights: Sequence[Tensor]) -> Iterator[None]:
    needed = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, need in zip(weights, needed, strict=True):
            weight.requires_grad_(need)


def _probe(
    model: nn.Module, batch: Batch, weights: Sequence[Tensor], seed: int
) -> tuple[Sequence[Tensor | None], float]:
    """Gradients of the outputs in a random direction, and what makes their squares the measure."""
    with (
        modes.calibration_mode(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        modes.random_numbers_kept(model),
    ):
        torch.manual_seed(seed)
        out = batch.out_of_inference().run(model)
        logits = logits_of(out)
        if logits is not None:
            rows = rows_of(logits, batch)
            value, scale = (rows * _fisher_direction(rows)).sum(), 0.5 / len(rows)
        else:
            outputs = [y for y in floats_of(out) if y.requires_grad]
            value = sum(((y * _normal(y)).float().sum() for y in outputs), torch.zeros(()))
            total = sum(float(y.detach().float().square().sum()) for y in outputs)
            scale = 1.0 / total if total > 0 else 0.0
        if not value.requires_grad:
            return [None] * len(weights), 0.0
        found = torch.autograd.grad(value, list(weights), allow_unused=True)
    return found, scale


def _fisher_direction(logits: Tensor) -> Tensor:
    """(rows, classes) random, of covariance diag(p) - p p^T in each row."""
    p = logits.detach().softmax(-1)
    drawn = p.sqrt() * _normal(p)
    return drawn - p * drawn.sum(-1, keepdim=True)


def _normal(like: Tensor) -> Tensor:
    """Drawn on the CPU, so that every device has the same."""
    return torch.randn(like.shape).to(like.device, like.dtype)


def _squares(target: Target, masks: Masks, gradient: Tensor) -> Iterator[float]:
    """For each mask the sum over rows of the square of gradient times change."""
    along = gradient.float() * target.weight.detach().float()
    for packed in masks:
        keep = unpack_bits(packed, along.shape)
        rows = target.view.to_matrix(along.masked_fill(keep, 0)).sum(2)
        yield float(rows.double().square().sum())
