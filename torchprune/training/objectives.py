"""What recovery makes small: the model's own loss, or how far it is from a dense teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchprune.errors import SpecError
from torchprune.specs.options import Checked, check_above_zero


@dataclass(frozen=True)
class OwnLoss(Checked):
    """The model's own loss, or the one given to `recover(loss=)`.

    Args:
        weight: of it, in a sum of objectives.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_above_zero("OwnLoss", "weight", self.weight)


@dataclass(frozen=True)
class KL(Checked):
    """Divergence of the model's predictions from the teacher's, KL(teacher || model), in nats.

    The mean over all predictions that count: every token's but those of padding, or every row's of
    a classifier. Multiplied by the temperature's square, so that gradients keep their size (Hinton
    et al., arXiv 1503.02531).

    Args:
        temperature: what logits are divided by, of both.
        weight: of it, in a sum of objectives.
    """

    temperature: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_above_zero("KL", "temperature", self.temperature)
        check_above_zero("KL", "weight", self.weight)


@dataclass(frozen=True)
class SquareHead(Checked):
    """How far the outputs of the model's repeated blocks are from those of the teacher's.

    The sum over blocks of |f_s - f_t|^2 / |f_t|^2 (Kurtic et al., arXiv 2310.06927). Here each
    token's error is a share of its own square, and the mean is over tokens: some models give a
    first token a thousand times the size of others, which then would be all that counts.

    Args:
        weight: of it, in a sum of objectives.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_above_zero("SquareHead", "weight", self.weight)


Objective = OwnLoss | KL | SquareHead


def as_objectives(
    given: Objective | Sequence[Objective] | None, *, taught: bool, told: bool = True
) -> tuple[Objective, ...]:
    """What to make small, one after another.

    Args:
        given: None for both where there is a teacher and a loss, else for the one that there is.
        taught: whether there is a teacher.
        told: whether there is a loss.

    Raises:
        SpecError: none of these, two of one kind, or a teacher is needed.
    """
    if given is None:
        return (KL(), OwnLoss()) if taught and told else (KL(),) if taught else (OwnLoss(),)
    found = tuple(given) if isinstance(given, tuple | list) else (given,)
    for one in found:
        if not isinstance(one, OwnLoss | KL | SquareHead):
            raise SpecError(
                f"recover: objective must be OwnLoss(), KL(), SquareHead() or several of them, "
                f"got {one!r}"
            )
        if not taught and not isinstance(one, OwnLoss):
            raise SpecError(
                f"recover: {type(one).__name__}() compares with a teacher: recover(model, data, "
                "teacher=dense)"
            )
    if not found or len({type(one) for one in found}) < len(found):
        raise SpecError(f"recover: objective must name each objective once, got {given!r}")
    return found
