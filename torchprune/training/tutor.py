"""How far a model is from what it should be, on one lesson: the sum of the objectives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.calibration.block_calls import floats_of
from torchprune.errors import CalibrationError, SpecError
from torchprune.masking.selection import repeated_blocks
from torchprune.modes import eval_mode
from torchprune.training.divergence import divergence
from torchprune.training.lessons import Answer, Lesson, Loss, ask
from torchprune.training.objectives import KL, Objective, OwnLoss, SquareHead

ROOM = 1 << 30
"""Bytes of a teacher's answers that are remembered, for the next pass."""


def square_error(own: Tensor, wanted: Tensor, counts: Tensor | None = None) -> Tensor:
    """|own - wanted|^2 / |wanted|^2 of each token, the mean over those that count: a scalar.

    Args:
        own, wanted: (..., width), of any float dtype; computed in float32.
        counts: bool, of the leading shape; None, or of another shape: all count.

    Source: SquareHead (Kurtic et al., arXiv 2310.06927).
    """
    wanted = wanted.detach().float()
    lost = (own.float() - wanted).square().sum(-1)
    share = lost / wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    if counts is None or counts.shape != share.shape:
        return share.mean()
    return share[counts].sum() / counts.sum().clamp_min(1)


@dataclass(eq=False)
class Tutor:
    """A model that learns, and what it is compared with.

    Attributes:
        mixed: whether it learns in bfloat16 by `torch.autocast`; judged it is without.
        again: whether lessons come more than once, so that the teacher's answers are remembered.
    """

    model: nn.Module
    objectives: Sequence[Objective]
    teacher: nn.Module | None
    loss: Loss | None
    mixed: bool = False
    again: bool = True
    _known: dict[int, list[Tensor]] = field(default_factory=dict)
    _held: int = 0
    _head: nn.Linear | None = None

    def __post_init__(self) -> None:
        self._labelled = any(isinstance(one, OwnLoss) for one in self.objectives)
        self._compares = any(isinstance(one, SquareHead) for one in self.objectives)
        self._own_blocks = self._blocks(self.model) if self._compares else []
        self._their_blocks: list[nn.Module] = []
        if self.teacher is not None:
            self._head = _output_head(self.teacher)
            if self._compares:
                self._their_blocks = self._blocks(self.teacher)
                if len(self._own_blocks) != len(self._their_blocks):
                    raise SpecError(
                        f"recover: SquareHead() compares block by block; the model has "
                        f"{len(self._own_blocks)} repeated blocks, the teacher "
                        f"{len(self._their_blocks)}: use KL()"
                    )

    @staticmethod
    def _blocks(model: nn.Module) -> list[nn.Module]:
        blocks = list(repeated_blocks(model).values())
        if not blocks:
            raise SpecError(
                f"recover: SquareHead() compares repeated blocks, and a {type(model).__name__} has "
                "none: use KL()"
            )
        return blocks

    def error(self, lesson: Lesson) -> Tensor:
        """The objectives' weighted sum on a lesson, a scalar with a gradient.

        Raises:
            CalibrationError: there is no loss, or the teacher's answer has another shape.
        """
        kind = next(self.model.parameters()).device.type
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(kind, torch.bfloat16, enabled=self.mixed))
            own = stack.enter_context(_outputs_of(self._own_blocks))
            answer = ask(self.model, lesson, self.loss, labelled=self._labelled)
        logits, features = self._taught(lesson)
        total = torch.zeros((), device=answer.logits[0].device if answer.logits else None)
        for one in self.objectives:
            if isinstance(one, OwnLoss):
                total = total + one.weight * self._own_loss(answer).float()
            elif isinstance(one, KL):
                total = total + one.weight * self._divergence(one, answer, logits, lesson)
            else:
                total = total + one.weight * _apart(own, features, lesson.counts)
        return total

    def judge(self, lessons: Sequence[Lesson]) -> float:
        """The mean error over lessons, in eval mode and full precision."""
        mixed, self.mixed = self.mixed, False
        try:
            with eval_mode(self.model), torch.no_grad():
                return float(sum(float(self.error(lesson)) for lesson in lessons)) / len(lessons)
        finally:
            self.mixed = mixed

    def _own_loss(self, answer: Answer) -> Tensor:
        if answer.loss is None:
            raise CalibrationError(
                f"recover: the {type(self.model).__name__} gave no loss for a batch: put labels in "
                "the batches, or give recover(loss=...), a function of (model, batch)"
            )
        return answer.loss

    def _divergence(
        self, one: KL, answer: Answer, wanted: Sequence[Tensor], lesson: Lesson
    ) -> Tensor:
        shapes = [tuple(t.shape) for t in answer.logits], [tuple(t.shape) for t in wanted]
        if shapes[0] != shapes[1] or not answer.logits or any(t.dim() < 2 for t in wanted):
            raise CalibrationError(
                f"recover: KL() compares logits (..., classes): the model gave {shapes[0]}, the "
                f"teacher {shapes[1]}"
            )
        found = []
        for own, theirs in zip(answer.logits, wanted, strict=True):
            counts = lesson.counts
            if counts is not None and counts.shape != own.shape[:-1]:
                counts = None
            found.append(divergence(own, theirs, counts, temperature=one.temperature))
        return torch.stack(found).mean()

    # -- the teacher ---------------------------------------------------------------------------

    def _taught(self, lesson: Lesson) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's logits and its blocks' outputs, as far as they are needed."""
        if self.teacher is None or not self._compares_at_all():
            return [], []
        if (known := self._known.get(id(lesson))) is not None:
            head = self._head
            with torch.no_grad():
                return ([head(known[0])] if head is not None else known), []
        rows: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.teacher))
            stack.enter_context(torch.no_grad())
            features = stack.enter_context(_outputs_of(self._their_blocks))
            if self._head is not None:
                note = self._head.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
                stack.callback(note.remove)
            answer = ask(self.teacher, lesson, self.loss, labelled=False)
        if self.again and not self._compares:
            self._remember(lesson, answer.logits, rows)
        return answer.logits, features

    def _compares_at_all(self) -> bool:
        return any(not isinstance(one, OwnLoss) for one in self.objectives)

    def _remember(self, lesson: Lesson, logits: list[Tensor], rows: list[Tensor]) -> None:
        """Keep logits, or the much smaller rows that its last layer makes them of."""
        if self._head is not None:
            with torch.no_grad():
                same = len(rows) == len(logits) == 1 and torch.equal(self._head(rows[0]), logits[0])
            if not same and not self._known:
                self._head = None  # it does more with them: keep what comes out
            elif not same:
                return
        kept = rows if self._head is not None else logits
        size = sum(t.numel() * t.element_size() for t in kept)
        if self._held + size <= ROOM:
            self._known[id(lesson)] = [t.detach().clone() for t in kept]
            self._held += size


def _output_head(model: nn.Module) -> nn.Linear | None:
    """The linear layer that makes a transformers model's logits, if it has one."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):
        head = None
    return head if type(head) is nn.Linear else None


@contextmanager
def _outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What modules give while the block runs, in the order of their calls."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: Any, out: Any) -> None:
        found.extend(floats_of(out)[:1])

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _apart(own: Sequence[Tensor], wanted: Sequence[Tensor], counts: Tensor | None) -> Tensor:
    """SquareHead: the sum over blocks."""
    shapes = [tuple(t.shape) for t in own], [tuple(t.shape) for t in wanted]
    if shapes[0] != shapes[1] or not own:
        raise CalibrationError(
            f"recover: SquareHead() compares outputs of blocks: the model gave {shapes[0]}, the "
            f"teacher {shapes[1]}"
        )
    pairs = zip(own, wanted, strict=True)
    return torch.stack([square_error(a, b, counts) for a, b in pairs]).sum()
