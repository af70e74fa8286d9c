"""`recover`: train what pruning left, so that it makes up for what is gone. Zeros stay zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchprune import modes
from torchprune.calibration.data import Data
from torchprune.calibration.synthesis import can_synthesise, continuations, synthesise
from torchprune.errors import CalibrationError, SpecError
from torchprune.masking.mask import Mask, masked_layers
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.reports.report import RunRecord, remember_run
from torchprune.specs.options import check_above_zero, check_share, check_whole
from torchprune.specs.recovery import RecoverySpec
from torchprune.training.lessons import Lesson, Loss, lesson_of, parted, read_lessons, tokens_in
from torchprune.training.objectives import Objective, as_objectives
from torchprune.training.pace import PASSES, Pace, share_of_rate
from torchprune.training.precision import pays_in_bfloat16
from torchprune.training.trainable import Learning, check_trainable, only_these_learn, to_train
from torchprune.training.tutor import Tutor

Model = TypeVar("Model", bound=nn.Module)
MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@on_ordinary_tensors
def recover(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    teacher: nn.Module | None = None,
    effort: Literal["fast", "balanced", "max"] = "balanced",
    minutes: float | None = None,
    train: str = "weights",
    objective: Objective | Sequence[Objective] | None = None,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
    rate: float = 0.01,
    batches: int = 1,
    written: int = 0,
    held_out: float = 0.125,
    max_batches: int = 4096,
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Model:
    """Train a pruned model, in place, so that it comes near what it was; its zeros stay zeros.

    Some of the batches only judge, and the weights that were best on them stay: the model never
    ends worse by them than it came. That also holds if the run ends by an error or is interrupted:
    the best weights so far stay. A call that is refused changes nothing.

    Args:
        model: with masks, or smaller by `shrink`. It trains in the modes (`train`, `eval`) it is
            in: in train mode with its dropout and batch statistics. It is judged in eval mode.
        data: batches as for `sparsify`, or texts with a `tokenizer`; with `loss`, whatever that
            takes. None, with a teacher that writes: text that it samples.
        teacher: the dense model, which stays as it is. With one, the objective is `KL()`.
        effort: passes over the data: "fast" one, "balanced" three, "max" ten.
        minutes: instead of an effort, how long it may take, judging included; the steps shrink
            toward its end. Such a run is not repeatable to the bit.
        train: "weights": all that is not frozen (`requires_grad`) but embeddings; "norms": biases
            and the scales of norms alone (PERP, Zimmer et al., arXiv 2312.15230).
        objective: `OwnLoss()`, `KL(...)`, `SquareHead(...)`, or several, which are summed.
        loss: (model, batch) -> scalar, in place of a loss that the model gives itself.
        optimizer: makes a `torch.optim.Optimizer` of a list of tensors, float32 or wider; its rates
            are scaled by a warm-up and a straight decay to 0. The default is Adam, each tensor's
            step in proportion to its own size.
        rate: of that Adam: a step, as a share of a tensor's root mean square.
        batches: batches a step.
        written: so many windows of text more that the teacher (or without one the model) writes on
            after pieces of the data; they judge nothing.
        held_out: share of the batches that only judges; at most 16 of them.
        max_batches: so many are read at most.
        seed: of the order of the batches, of dropout, and of sampled text.
        progress: show a progress bar.

    Returns:
        the same model. `torchprune.report` tells of the run.

    Raises:
        SpecError: options that contradict each other, or the model.
        MaskError: adapters, or zeros without a mask, which training would lose.
        CalibrationError: no usable data, no loss, or one that is not finite.
    """
    asked = _Asked(effort, minutes, train, rate, batches, written, held_out, max_batches)
    asked.check(model, teacher, loss)
    objectives = as_objectives(objective, taught=teacher is not None)
    check_trainable(model)
    writer = model if teacher is None else teacher
    if data is None:
        if not can_synthesise(writer) or loss is not None:
            raise CalibrationError(
                "recover: give data: recover(model, data); only a decoder-only transformers "
                "language model can write its own"
            )
        data = synthesise(writer, sequences=written or 128, seed=seed, progress=progress)
        written = 0
    calibration = Data(data, tokenizer, max_batches, seed, progress)
    lessons, notes = read_lessons(calibration, model, loss)
    own: list[Lesson] = []
    if written:
        given = [lesson.item for lesson in lessons]
        if not can_synthesise(writer) or loss is not None:
            raise SpecError("recover: written= takes a decoder-only transformers language model")
        texts = continuations(writer, given, written, seed=seed, progress=progress)
        own = [lesson_of(text, model) for text in texts]
        notes.append(f"{len(own)} batches more were written by the {type(writer).__name__}")
    learning, judging = parted([*own, *lessons], held_out, len(own))
    run = _Run(model, asked, learning, judging, seed, progress)
    mixed = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    device = next(model.parameters()).device
    passes = PASSES[effort] if minutes is None else 2
    tutor = Tutor(
        model, objectives, teacher, loss, mixed and pays_in_bfloat16(device), again=passes > 1
    )
    text = run.under(tutor, optimizer)
    record = RecoverySpec(
        train=str(train),
        objective=" + ".join(map(str, objectives)),
        effort=effort if minutes is None else None,
        minutes=minutes,
        seed=seed,
    )
    remember_run(model, RunRecord(spec=record, batches=len(learning), notes=[*notes, text]))
    return model


@dataclass(frozen=True)
class _Asked:
    """The options of a call."""

    effort: str
    minutes: float | None
    train: str
    rate: float
    batches: int
    written: int
    held_out: float
    max_batches: int

    def check(self, model: object, teacher: object, loss: object) -> None:
        if not isinstance(model, nn.Module):
            raise SpecError(f"recover: model must be a Module, got {type(model).__name__}")
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise SpecError(f"recover: teacher must be a Module, got {type(teacher).__name__}")
        if teacher is not None:
            own = {id(p) for p in model.parameters()}
            if teacher is model or any(id(p) in own for p in teacher.parameters()):
                raise SpecError(
                    "recover: the teacher shares parameters with the model, which are about to "
                    "change: give a copy of the dense model"
                )
        if self.effort not in PASSES:
            raise SpecError(
                f"recover: effort {self.effort!r} is not understood; accepted: "
                + ", ".join(f'"{name}"' for name in PASSES)
            )
        if self.train not in ("weights", "norms"):
            raise SpecError(
                f'recover: train must be "weights", "norms" or a MaskLoRA(...), got {self.train!r}'
            )
        if loss is not None and not callable(loss):
            raise SpecError(f"recover: loss must be a function of (model, batch), got {loss!r}")
        if self.minutes is not None:
            check_above_zero("recover", "minutes", self.minutes)
        check_above_zero("recover", "rate", self.rate)
        check_whole("recover", "batches", self.batches)
        check_whole("recover", "max_batches", self.max_batches)
        check_share("recover", "held_out", self.held_out)
        if self.written != 0:
            check_whole("recover", "written", self.written)


@dataclass(eq=False)
class _Run:
    """One run: what is learnt from, what judges, and the best weights so far."""

    model: nn.Module
    asked: _Asked
    learning: Sequence[Lesson]
    judging: Sequence[Lesson]
    seed: int
    progress: bool
    tokens: int = 0
    best: float = float("inf")
    kept: list[Tensor] = field(default_factory=list)

    def under(self, tutor: Tutor, optimizer: MakeOptimizer | None) -> str:
        """Train.

        Returns:
            what there is to say of it.
        """
        chosen = to_train(self.model, self.asked.train)
        self.state = [*chosen.values(), *_buffers(self.model)]
        with ExitStack() as stack:
            stack.enter_context(modes.without_caches(self.model))
            if tutor.teacher is not None:
                stack.enter_context(modes.without_caches(tutor.teacher))
            stack.enter_context(torch.random.fork_rng(devices=_devices(self.model)))
            stack.enter_context(torch.enable_grad())
            torch.manual_seed(self.seed)
            pace = self._pace()
            before = self.best = self._judged(tutor)
            pace.leave(pace.elapsed())
            self._keep()
            stack.callback(self._put_back)
            stack.enter_context(only_these_learn(self.model, list(chosen.values())))
            self._train(tutor, list(chosen.values()), optimizer, pace)
        count = sum(p.numel() for p in chosen.values())
        return (
            f"recovered: trained {count:,} values ({self.asked.train}) on {self.tokens:,} tokens "
            f"in {pace.elapsed() / 60:.3g} minutes; on {len(self.judging)} held-out batches the "
            f"objective went from {before:.4g} to {self.best:.4g}"
        )

    def _pace(self) -> Pace:
        if self.asked.minutes is not None:
            return Pace(None, self.asked.minutes * 60)
        a_pass = -(-len(self.learning) // self.asked.batches)
        return Pace(PASSES[self.asked.effort] * a_pass, None)

    def _train(
        self,
        tutor: Tutor,
        chosen: list[nn.Parameter],
        optimizer: MakeOptimizer | None,
        pace: Pace,
    ) -> None:
        learn = Learning.of(chosen)
        mover = self._optimizer(learn, optimizer)
        rates = [group["lr"] for group in mover.param_groups]
        order = _Order(len(self.learning), self.seed)
        judged_at = 0.5
        total = pace.steps if pace.steps is not None else 100
        with tqdm(total=total, desc="recover", disable=not self.progress) as bar:
            while (gone := pace.progress()) < 1:
                if gone >= judged_at:
                    judged_at = 1.0 if judged_at >= 0.75 else 0.75
                    self._judge(tutor)
                for group, rate in zip(mover.param_groups, rates, strict=True):
                    group["lr"] = rate * share_of_rate(gone)
                error = self._gradients(tutor, learn, order)
                if not error < float("inf"):
                    break  # the judge decides what stays
                learn.before_step()
                mover.step()
                learn.after_step()
                learn.forget_gradients()
                pace.step += 1
                bar.set_postfix(objective=f"{error:.4g}", refresh=False)
                bar.update(1 if pace.steps is not None else int(100 * pace.progress()) - bar.n)
        self._judge(tutor)

    def _gradients(self, tutor: Tutor, learn: Learning, order: _Order) -> float:
        """Leave the mean error's gradient of the next batches; give the error."""
        total = 0.0
        count = min(self.asked.batches, len(self.learning))
        for _ in range(count):
            lesson = self.learning[order.next()]
            error = tutor.error(lesson) / count
            error.backward()
            total += float(error.detach())
            self.tokens += tokens_in(lesson)
        return total

    def _optimizer(self, learn: Learning, make: MakeOptimizer | None) -> torch.optim.Optimizer:
        if make is None:
            return scaled_adam(learn.values, self.asked.rate)
        found = make(list(learn.values))
        if not isinstance(found, torch.optim.Optimizer):
            raise SpecError(
                "recover: optimizer must be a function of a list of tensors that gives a "
                f"torch.optim.Optimizer, got a {type(found).__name__}"
            )
        return found

    # -- judging -------------------------------------------------------------------------------

    def _judged(self, tutor: Tutor) -> float:
        found = tutor.judge(self.judging)
        if not found < float("inf"):
            raise CalibrationError(
                "recover: the model's error on the held-out batches is not finite before training"
            )
        return found

    def _judge(self, tutor: Tutor) -> None:
        now = tutor.judge(self.judging)
        if now < self.best:
            self.best = now
            self._keep()

    def _keep(self) -> None:
        if self.kept:
            for kept, value in zip(self.kept, self.state, strict=True):
                kept.copy_(value.detach())
        else:
            self.kept = [value.detach().clone() for value in self.state]

    def _put_back(self) -> None:
        with torch.no_grad():
            for kept, value in zip(self.kept, self.state, strict=True):
                value.copy_(kept)
        for layer, _ in masked_layers(self.model):
            getattr(layer.module, layer.tensor)  # cleans what is not clean


class _Order:
    """Batches in shuffled passes, from a seed."""

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
