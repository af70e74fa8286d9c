"""One run of a recovery: what is learnt from, what judges, and the best weights so far."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchprune import modes
from torchprune.checkpoint.progress import Facts, Progress
from torchprune.errors import CalibrationError, SpecError
from torchprune.masking.mask import Mask, masked_layers
from torchprune.training.lessons import Lesson, tokens_in
from torchprune.training.mask_lora import MaskLoRA, add_mask_lora, merge_mask_lora
from torchprune.training.optimizer_files import into_optimizer, of_optimizer
from torchprune.training.pace import Pace, share_of_rate
from torchprune.training.trainable import Learning, only_these_learn, to_train
from torchprune.training.tutor import Tutor

RECOVERY = Progress("torchprune.recovery", "progress of a recovery")

SAVE_SECONDS = 180.0
"""How often a run is kept in its directory."""

RATES = {"weights": 0.001, "norms": 0.01}
"""The default step size, as a share of a tensor's root mean square, by what is trained."""

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
Earlier = tuple[dict[str, Tensor], Facts]
"""What an interrupted run has left: tensors, and plain facts."""


@dataclass(eq=False)
class Course:
    """One run.

    Attributes:
        train: "weights", "norms" or factors.
        rate: of the default optimizer; None for the default.
        optimizer: makes another.
        batches: lessons a step.
        path: where the run is kept, or None.
        name: what another run in that place is told by.
        tokens: learnt from so far.
        before, best: the judge's error at first, and the least so far.
    """

    tutor: Tutor
    learning: Sequence[Lesson]
    judging: Sequence[Lesson]
    train: str | MaskLoRA
    rate: float | None
    optimizer: MakeOptimizer | None
    batches: int
    seed: int
    path: str | os.PathLike[str] | None
    name: str
    progress: bool
    tokens: int = 0
    before: float = float("inf")
    best: float = float("inf")
    judged_at: float = 0.5
    saved_at: float = 0.0
    state: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        return self.tutor.model

    def run(self, pace: Pace, earlier: Earlier | None) -> str:
        """Train, or go on. However it ends, the best weights that were judged stay.

        Returns:
            what there is to say of it.
        """
        teacher = self.tutor.teacher
        with ExitStack() as stack:
            stack.enter_context(modes.without_caches(self.model))
            if teacher is not None:
                stack.enter_context(modes.without_caches(teacher))
            stack.enter_context(torch.random.fork_rng(devices=_devices(self.model)))
            stack.enter_context(torch.enable_grad())
            torch.manual_seed(self.seed)
            if isinstance(self.train, MaskLoRA):
                factors = {id(f) for f in add_mask_lora(self.model, self.train)}
                stack.callback(merge_mask_lora, self.model)
                named = {n: p for n, p in self.model.named_parameters() if id(p) in factors}
                chosen = named | to_train(self.model, "norms", least=0)
            else:
                chosen = to_train(self.model, self.train)
            self.state = [*chosen.values(), *_buffers(self.model)]
            if earlier is None:
                self.before = self.best = self._error()
                if not self.best < float("inf"):
                    raise CalibrationError(
                        "recover: the model's error on the held-out batches is not finite before "
                        "training"
                    )
                pace.leave(pace.elapsed())
            self.kept = [value.detach().clone() for value in self.state]
            stack.callback(self._put_back)
            stack.enter_context(only_these_learn(self.model, list(chosen.values())))
            self._learn(list(chosen.values()), pace, earlier)
        count, judges = sum(p.numel() for p in chosen.values()), len(self.judging)
        return (
            f"recovered: trained {count:,} values ({self.train}) on {self.tokens:,} tokens "
            f"in {pace.elapsed() / 60:.3g} minutes; on {judges} held-out "
            f"{'batch' if judges == 1 else 'batches'} the objective went from {self.before:.4g} "
            f"to {self.best:.4g}"
        )

    def _learn(self, chosen: list[nn.Parameter], pace: Pace, earlier: Earlier | None) -> None:
        learn = Learning.of(chosen)
        mover = self._mover(learn)
        rates = [group["lr"] for group in mover.param_groups]
        order = Order(len(self.learning), self.seed)
        if earlier is not None:
            self._go_on(earlier, learn, mover, order, pace)
            rates = earlier[1]["rates"]  # those of the weights that the run began with
        self.saved_at = pace.elapsed()
        quiet = not self.progress
        with tqdm(total=pace.total, initial=pace.done(), desc="recover", disable=quiet) as bar:
            while (gone := pace.progress()) < 1:
                if gone >= self.judged_at:
                    self.judged_at = 1.0 if self.judged_at >= 0.75 else 0.75
                    self._judge()
                for group, rate in zip(mover.param_groups, rates, strict=True):
                    group["lr"] = rate * share_of_rate(gone)
                error = self._gradients(learn, order)
                if not error < float("inf"):
                    break  # the judge decides what stays
                learn.before_step()
                mover.step()
                learn.after_step()
                learn.forget_gradients()
                pace.step += 1
                if self.path is not None and pace.elapsed() - self.saved_at >= SAVE_SECONDS:
                    self._save(learn, mover, order, pace, rates)
                bar.set_postfix(objective=f"{error:.4g}", refresh=False)
                bar.update(pace.done() - bar.n)
        self._judge()

    def _gradients(self, learn: Learning, order: Order) -> float:
        """Leave the mean error's gradient of the next lessons; give the error."""
        total = 0.0
        count = min(self.batches, len(self.learning))
        for _ in range(count):
            lesson = self.learning[order.next()]
            error = self.tutor.error(lesson) / count
            error.backward()
            total += float(error.detach())
            self.tokens += tokens_in(lesson)
        return total

    def _mover(self, learn: Learning) -> torch.optim.Optimizer:
        if self.optimizer is None:
            return scaled_adam(learn.values, self.rate or RATES.get(str(self.train), 0.01))
        found = self.optimizer(list(learn.values))
        if not isinstance(found, torch.optim.Optimizer):
            raise SpecError(
                "recover: optimizer must be a function of a list of tensors that gives a "
                f"torch.optim.Optimizer, got a {type(found).__name__}"
            )
        return found

    # -- judging -------------------------------------------------------------------------------

    def _error(self) -> float:
        return self.tutor.judge(self.judging)

    def _judge(self) -> None:
        now = self._error()
        if now < self.best:
            self.best = now
            for kept, value in zip(self.kept, self.state, strict=True):
                kept.copy_(value.detach())

    def _put_back(self) -> None:
        with torch.no_grad():
            for kept, value in zip(self.kept, self.state, strict=True):
                value.copy_(kept)
        for layer, _ in masked_layers(self.model):
            getattr(layer.module, layer.tensor)  # cleans what is not clean

    # -- going on ------------------------------------------------------------------------------

    def _save(
        self,
        learn: Learning,
        mover: torch.optim.Optimizer,
        order: Order,
        pace: Pace,
        rates: list[float],
    ) -> None:
        assert self.path is not None
        moved, plain = of_optimizer(mover)
        tensors = dict(self._tensors(learn))
        tensors |= {"random": torch.get_rng_state(), "order": order.generator.get_state()}
        facts = {
            "run": self.name,
            "optimizer": plain,
            "rates": rates,
            "waiting": order.waiting,
            "pace": [pace.step, pace.elapsed(), pace.seconds],
            "course": [self.tokens, self.before, self.best, self.judged_at],
        }
        RECOVERY.write(self.path, {**tensors, **moved}, facts)
        self.saved_at = pace.elapsed()

    def _tensors(self, learn: Learning) -> Iterator[tuple[str, Tensor]]:
        """What a run has come to, by name."""
        parts = {"best": self.kept, "now": self.state, "value": learn.beside()}
        for name, own in parts.items():
            for i, tensor in enumerate(own):
                yield f"{name}.{i}", tensor

    def _go_on(
        self,
        earlier: Earlier,
        learn: Learning,
        mover: torch.optim.Optimizer,
        order: Order,
        pace: Pace,
    ) -> None:
        """Be where a run was."""
        tensors, facts = earlier
        with torch.no_grad():
            for name, tensor in self._tensors(learn):
                tensor.copy_(tensors[name])
        moved = {k: t for k, t in tensors.items() if k.startswith("optimizer.")}
        into_optimizer(mover, moved, facts["optimizer"])
        torch.set_rng_state(tensors["random"])
        order.generator.set_state(tensors["order"])
        order.waiting = list(facts["waiting"])
        pace.step, pace.used, pace.seconds = facts["pace"]
        self.tokens, self.before, self.best, self.judged_at = facts["course"]


class Order:
    """Lessons in shuffled passes, from a seed."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.generator = count, torch.Generator().manual_seed(seed)
        self.waiting: list[int] = []

    def next(self) -> int:
        if not self.waiting:
            self.waiting = torch.randperm(self.count, generator=self.generator).tolist()
        return self.waiting.pop()


def scaled_adam(values: Sequence[Tensor], rate: float) -> torch.optim.Optimizer:
    """Adam, each tensor's step in proportion to the root mean square of what is not zero in it.

    A tensor of zeros (a bias that was never trained) moves as if that were 0.01.
    """
    groups = []
    for value in values:
        count = int(torch.count_nonzero(value))
        size = float(torch.linalg.vector_norm(value.detach())) / max(1, count) ** 0.5
        groups.append({"params": [value], "lr": rate * (size or 0.01)})
    fused = all(value.device.type in ("cpu", "cuda") for value in values)
    return torch.optim.Adam(groups, betas=(0.9, 0.95), fused=fused)


def _buffers(model: nn.Module) -> list[Tensor]:
    """What a model changes when it runs in train mode, perhaps: all buffers but those of masks."""
    of_masks = {id(b) for m in model.modules() if isinstance(m, Mask) for b in m.buffers()}
    return [b for b in model.buffers() if id(b) not in of_masks]


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
