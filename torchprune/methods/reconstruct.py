"""Train the kept weights of a pruned unit to the outputs it had, on calibration batches.

After EBFT (Guo et al., arXiv 2402.12419): a block is small, its inputs and the outputs wanted are
at hand, and what single layers could not make up for, layers together can.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from torchprune import modes
from torchprune.calibration.block_calls import Call, Unit, floats_of
from torchprune.errors import CalibrationError
from torchprune.methods.precision import pays_in_bfloat16
from torchprune.specs.options import Reconstruct

_PATIENCE = 2
"""Epochs without a better result on held-out batches after which training ends."""


@dataclass(frozen=True)
class Gain:
    """What training did to a unit: its outputs' squared error, each token's as a share of its own
    square.

    Attributes:
        before, after: mean over held-out batches (over all where none could be held out).
        epochs: passes until the weights that stay; 0 where none were better than before.
    """

    before: float
    after: float
    epochs: int


@dataclass(frozen=True, eq=False)
class Trained:
    """A parameter to train: its name in the unit, and a mask in float32, 0 where it stays zero."""

    name: str
    weight: Tensor
    keep: Tensor


def reconstruct(
    unit: Unit,
    weights: Sequence[tuple[Tensor, Tensor]],
    options: Reconstruct,
    *,
    sampled: int = 0,
) -> Gain:
    """Change weights of a unit, in place, so that its outputs come near those wanted.

    The weights that were best on the held-out batches stay; those it came with, if none was better.

    Args:
        unit: a module and its calls.
        weights: parameters of it, each with a bool mask of its shape: zeros where False, which stay
            zeros.
        sampled: so many batches, the first ones, are the model's own text, by which it should not
            be judged: batches are held out as if they were not there.
    """
    names = {id(p): name for name, p in unit.module.named_parameters()}
    trained = [Trained(names[id(w)], w, keep.float()) for w, keep in weights]
    learning, judging = _parted(unit.calls, options.held_out, sampled)
    if not learning or not trained:
        return Gain(0.0, 0.0, 0)
    with _with_gradients():
        values = [t.weight.detach().float().clone().requires_grad_() for t in trained]
        whole = all(t.weight.dtype == torch.float32 for t in trained)
        mixed = options.mixed and whole and pays_in_bfloat16(values[0].device)
        learns = {t.name for t in trained}
        fixed = {n: p.detach() for n, p in unit.module.named_parameters() if n not in learns}
        run = _Run(unit, trained, values, fixed, mixed)
        before = best = run.judge(judging)
        kept, at = run.copies(), 0
        steps = options.epochs * -(-len(learning) // options.batches)
        optimizer = _optimizer(values, options.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.Generator().manual_seed(options.seed)
        for epoch in range(1, options.epochs + 1):
            shuffled = torch.randperm(len(learning), generator=order).tolist()
            for start in range(0, len(shuffled), options.batches):
                run.gradients([learning[i] for i in shuffled[start : start + options.batches]])
                optimizer.step()
                schedule.step()
            now = run.judge(judging)
            if now < best:
                best, at, kept = now, epoch, run.copies()
            elif epoch - at >= _PATIENCE:
                break
        with torch.no_grad():
            for t, value in zip(trained, kept, strict=True):
                t.weight.copy_(value)
    return Gain(before, best, at)


def summary_of(gains: Sequence[Gain]) -> str:
    """One line on all units."""
    before = statistics.mean(g.before for g in gains)
    after = statistics.mean(g.after for g in gains)
    return (
        f"reconstructed {len(gains)} blocks in {sum(g.epochs for g in gains)} epochs: relative "
        f"squared error of their outputs on held-out batches {before:.3g} -> {after:.3g} (mean)"
    )


@dataclass(eq=False)
class _Run:
    """The unit with weights that learn, and no others: `fixed` are those, by name."""

    unit: Unit
    trained: Sequence[Trained]
    values: list[Tensor]
    fixed: Mapping[str, Tensor]
    mixed: bool

    def judge(self, calls: Sequence[Call]) -> float:
        """The mean error over calls.

        Raises:
            CalibrationError: it is not finite.
        """
        with torch.no_grad():
            error = float(sum(self._error(call) for call in calls)) / len(calls)
        if not error < float("inf"):
            raise CalibrationError(
                f"{self.unit.name or 'the model'}: its outputs are not finite on the calibration "
                "data, so it cannot be reconstructed"
            )
        return error

    def gradients(self, calls: Sequence[Call]) -> None:
        """Leave the mean error's gradient in the values that are kept."""
        for value in self.values:
            value.grad = None
        kind = self.values[0].device.type
        for call in calls:
            with torch.autocast(kind, torch.bfloat16) if self.mixed else nullcontext():
                error = self._error(call)
            (error / len(calls)).backward()
        for value, t in zip(self.values, self.trained, strict=True):
            if value.grad is not None:
                value.grad.mul_(t.keep)

    def copies(self) -> list[Tensor]:
        return [value.detach().clone() for value in self.values]

    def _error(self, call: Call) -> Tensor:
        pairs = zip(self.trained, self.values, strict=True)
        learning = {t.name: value.to(t.weight.dtype) for t, value in pairs}
        given = {**self.fixed, **learning}
        if call.start is not None:
            call.start.restore()
        with modes.without_hooks(self.unit.module):
            out = floats_of(functional_call(self.unit.module, given, call.args, call.kwargs))
        error = torch.zeros((), device=self.values[0].device)
        for one, wanted, counts in zip(out, call.wanted, call.counts, strict=True):
            lost = (one.float() - wanted.float()).square().flatten(0, -2).sum(-1)
            size = wanted.float().square().flatten(0, -2).sum(-1)
            share = lost / size.clamp_min(torch.finfo(torch.float32).tiny)
            error = error + (share if counts is None else share[counts.flatten()]).mean()
        return error


@contextmanager
def _with_gradients() -> Iterator[None]:
    """Gradients, whatever the caller's modes; full precision; no casts of weights remembered."""
    before, cached = torch.get_float32_matmul_precision(), torch.is_autocast_cache_enabled()
    torch.set_float32_matmul_precision("highest")
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_autocast_cache_enabled(cached)
        torch.clear_autocast_cache()  # it may remember the weights from before


def _optimizer(values: Sequence[Tensor], rate: float) -> torch.optim.Optimizer:
    """Adam, each tensor's step in proportion to its own size."""
    fused = all(value.device.type in ("cpu", "cuda") for value in values)
    groups = [{"params": [value], "lr": rate * _spread(value.detach())} for value in values]
    return torch.optim.Adam(groups, fused=fused)


def _spread(value: Tensor) -> float:
    """The root mean square of what is not zero."""
    count = int(torch.count_nonzero(value))
    return float(torch.linalg.vector_norm(value)) / count**0.5 if count else 0.0


def _parted(calls: Sequence[Call], held_out: float, sampled: int) -> tuple[list[Call], list[Call]]:
    """Those to learn from, and the last ones to judge by; all for both if there are too few."""
    given = sum(call.batch >= sampled for call in calls)
    count = min(len(calls) - 1, round(held_out * given))
    if count < 1:
        return list(calls), list(calls)
    return list(calls[:-count]), list(calls[-count:])
