"""`recover`: train what pruning left, so that it makes up for what is gone. Zeros stay zeros."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from torchprune.calibration.data import Data
from torchprune.calibration.synthesis import can_synthesise, continuations, synthesise
from torchprune.checkpoint.checksums import of_content, of_tensors
from torchprune.errors import CalibrationError, CheckpointError, SpecError
from torchprune.masking.mask import masked_layers
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.methods.precision import pays_in_bfloat16
from torchprune.reports.report import RunRecord, remember_run
from torchprune.specs.options import check_above_zero, check_share, check_whole
from torchprune.specs.recovery import RecoverySpec
from torchprune.training.course import RATES, RECOVERY, Course, Earlier, MakeOptimizer
from torchprune.training.lessons import (
    Lesson,
    Loss,
    has_labels,
    lesson_of,
    parted,
    read_lessons,
    tensors_of,
)
from torchprune.training.mask_lora import MaskLoRA
from torchprune.training.objectives import Objective, as_objectives
from torchprune.training.pace import PASSES, Pace
from torchprune.training.trainable import check_trainable, to_train
from torchprune.training.tutor import Tutor

Model = TypeVar("Model", bound=nn.Module)


@on_ordinary_tensors
def recover(
    model: Model,
    data: Iterable[Any] | None = None,
    *,
    teacher: nn.Module | None = None,
    effort: Literal["fast", "balanced", "max"] = "balanced",
    minutes: float | None = None,
    train: Literal["weights", "norms"] | MaskLoRA = "weights",
    objective: Objective | Sequence[Objective] | None = None,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
    rate: float | None = None,
    batches: int = 1,
    written: int = 0,
    held_out: float = 0.125,
    max_batches: int = 4096,
    tokenizer: Any = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
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
        teacher: the dense model, which stays as it is.
        effort: passes over the data: "fast" one, "balanced" three, "max" ten.
        minutes: instead of an effort, how long it may take, judging included; the steps shrink
            toward its end. Such a run is not repeatable to the bit.
        train: "weights": all that is not frozen (`requires_grad`) but embeddings; "norms": biases
            and the scales of norms alone (PERP, Zimmer et al., arXiv 2312.15230). `MaskLoRA(...)`:
            these, and low-rank factors of the masked weights, merged exactly at the end.
        objective: `OwnLoss()`, `KL(...)`, `SquareHead(...)`, or several, which are summed. The
            default is `(KL(), OwnLoss())`, or the one that there is a teacher or a loss for.
        loss: (model, batch) -> scalar, in place of a loss that the model gives itself.
        optimizer: makes a `torch.optim.Optimizer` of a list of tensors, float32 or wider; its rates
            are scaled by a warm-up and a straight decay to 0. The default is Adam, each tensor's
            step in proportion to its own size.
        rate: of that Adam: a step, as a share of a tensor's root mean square. The default is 0.001
            for weights and 0.01 for norms and factors.
        batches: batches a step.
        written: so many windows of text more that the teacher (or without one the model) writes on
            after pieces of the data; they judge nothing.
        held_out: share of the batches that only judges; at most 8 of them. With 0 all judge, and
            all are learnt from.
        max_batches: so many are read at most.
        seed: of the order of the batches, of dropout, and of sampled text.
        path: a directory to keep the run in, every few minutes, until it ends: the same call goes
            on from there, with the same result to the bit, but for `minutes`. Refused for another
            model (with a `MaskLoRA`, for other weights), other data or other options. Not kept are
            CUDA's random numbers.
        progress: show a progress bar.

    Returns:
        the same model. `torchprune.report` tells of the run.

    Raises:
        SpecError: options that contradict each other, or the model.
        MaskError: adapters, or zeros without a mask, which training would lose.
        CalibrationError: no usable data, no loss, or one that is not finite.
        CheckpointError: `path` holds something else, another run, or is damaged.
    """
    asked = Asked(effort, minutes, train, rate, batches, written, held_out, max_batches)
    recover_as_asked(
        model,
        data,
        asked,
        teacher=teacher,
        objective=objective,
        loss=loss,
        optimizer=optimizer,
        tokenizer=tokenizer,
        seed=seed,
        path=path,
        progress=progress,
    )
    if path is not None:
        RECOVERY.forget(path)
    return model


@on_ordinary_tensors
def recover_as_asked(
    model: nn.Module,
    data: Iterable[Any] | None,
    asked: Asked,
    *,
    teacher: nn.Module | None = None,
    objective: Objective | Sequence[Objective] | None = None,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> None:
    """As `recover`, but what `path` keeps stays there: for who saves the result and then deletes
    it, so that a kill between the two loses nothing. The same call goes on to the same result."""
    effort, minutes, train, rate = asked.effort, asked.minutes, asked.train, asked.rate
    asked.check(model, teacher, loss)
    as_objectives(objective, taught=teacher is not None)
    check_trainable(model)
    text = _Text(model, teacher, loss, seed, progress)
    learning, judging, notes = text.read(data, tokenizer, asked)
    told = loss is not None or all(has_labels(lesson) for lesson in learning)
    objectives = as_objectives(objective, taught=teacher is not None, told=told)
    passes = PASSES[effort] if minutes is None else 2
    mixed = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    mixed = mixed and pays_in_bfloat16(next(model.parameters()).device)
    tutor = Tutor(model, objectives, teacher, loss, mixed, again=passes > 1)
    options: list[object] = [asked, *objectives, optimizer is None, len(judging), seed]
    if path is not None and isinstance(train, MaskLoRA):  # factors are nothing without these
        options.append(of_tensors(p.detach().cpu().contiguous() for p in model.parameters()))
    course = Course(
        tutor,
        learning,
        judging,
        train=train,
        rate=rate,
        optimizer=optimizer,
        batches=asked.batches,
        seed=seed,
        path=path,
        name="" if path is None else _name_of(model, [*learning, *judging], options),
        progress=progress,
    )
    earlier = None if path is None else _earlier(path, course.name)
    a_pass = -(-len(learning) // asked.batches)
    pace = Pace(None, minutes * 60) if minutes is not None else Pace(passes * a_pass, None)
    notes.append(course.run(pace, earlier))
    record = RecoverySpec(
        train=str(train),
        objective=" + ".join(map(str, objectives)),
        effort=effort if minutes is None else None,
        minutes=minutes,
        seed=seed,
    )
    remember_run(model, RunRecord(spec=record, batches=len(learning), notes=notes))


@dataclass(frozen=True)
class Asked:
    """The options of a call, as `recover` has them."""

    effort: str = "balanced"
    minutes: float | None = None
    train: str | MaskLoRA = "weights"
    rate: float | None = None
    batches: int = 1
    written: int = 0
    held_out: float = 0.125
    max_batches: int = 4096

    def check(self, model: object, teacher: object, loss: object) -> None:
        if not isinstance(model, nn.Module):
            raise SpecError(f"recover: model must be a Module, got {type(model).__name__}")
        if teacher is not None:
            _check_teacher(teacher, model)
        if self.effort not in PASSES:
            raise SpecError(
                f"recover: effort {self.effort!r} is not understood; accepted: "
                + ", ".join(f'"{name}"' for name in PASSES)
            )
        if not isinstance(self.train, MaskLoRA) and self.train not in RATES:
            raise SpecError(
                f'recover: train must be "weights", "norms" or a MaskLoRA(...), got {self.train!r}'
            )
        if loss is not None and not callable(loss):
            raise SpecError(f"recover: loss must be a function of (model, batch), got {loss!r}")
        for name in ("minutes", "rate"):
            if getattr(self, name) is not None:
                check_above_zero("recover", name, getattr(self, name))
        for name in ("batches", "max_batches", *(["written"] if self.written != 0 else [])):
            check_whole("recover", name, getattr(self, name))
        check_share("recover", "held_out", self.held_out)
        if not isinstance(self.train, MaskLoRA):
            to_train(model, self.train)


def _check_teacher(teacher: object, model: nn.Module) -> None:
    if not isinstance(teacher, nn.Module):
        raise SpecError(f"recover: teacher must be a Module, got {type(teacher).__name__}")
    own = {id(p) for p in model.parameters()}
    if teacher is model or any(id(p) in own for p in teacher.parameters()):
        raise SpecError(
            "recover: the teacher shares parameters with the model, which are about to change: "
            "give a copy of the dense model"
        )


@dataclass(frozen=True, eq=False)
class _Text:
    """Where lessons come from: what is given, and who writes more."""

    model: nn.Module
    teacher: nn.Module | None
    loss: Loss | None
    seed: int
    progress: bool

    def read(
        self, data: Iterable[Any] | None, tokenizer: Any, asked: Asked
    ) -> tuple[list[Lesson], list[Lesson], list[str]]:
        """Those to learn from, those to judge by, and what the report should say."""
        writer = self.model if self.teacher is None else self.teacher
        writes = can_synthesise(writer) and self.loss is None
        how: dict[str, Any] = {"seed": self.seed, "progress": self.progress}
        written = asked.written
        if (data is None or written) and not writes:
            raise CalibrationError(
                "recover: give data: recover(model, data), and no written=; only a decoder-only "
                "transformers language model can write its own"
            )
        if data is None:
            data, written = synthesise(writer, sequences=written or 128, **how), 0
        given = Data(data, tokenizer, asked.max_batches, self.seed, self.progress)
        lessons, notes = read_lessons(given, self.model, self.loss)
        own: list[Lesson] = []
        if written:
            batches = [lesson.item for lesson in lessons]
            texts = continuations(writer, batches, written, **how)
            own = [lesson_of(text, self.model) for text in texts]
            notes.append(f"{len(own)} batches more were written by the {type(writer).__name__}")
        return *parted([*own, *lessons], asked.held_out, len(own)), notes


# -- going on --------------------------------------------------------------------------------------


def _name_of(model: nn.Module, lessons: Sequence[Lesson], options: Sequence[object]) -> str:
    """A checksum of the model's shapes and masks, the options and the data."""
    shapes = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters()]
    bits = [mask.bits.cpu().contiguous() for _, mask in masked_layers(model)]
    texts = [t.detach().cpu().contiguous() for lesson in lessons for t in tensors_of(lesson)]
    return of_content(
        {
            "options": [str(option) for option in options],
            "shapes": shapes,
            "masks": of_tensors(bits),
            "data": [of_tensors(texts), str([tuple(t.shape) for t in texts])],
        }
    )


def _earlier(path: str | os.PathLike[str], name: str) -> Earlier | None:
    """What an interrupted run has left.

    Raises:
        CheckpointError: it was another run.
    """
    found = RECOVERY.read(path)
    if found is not None and found[1].get("run") != name:
        raise CheckpointError(
            f"recover: {path} holds the progress of another run: of another model, other data or "
            "other options; choose another directory, or delete it"
        )
    return found
