"""What specs are made of: checked options, and the values that some of them take."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal, Self

from torchprune.errors import SpecError, did_you_mean


class Checked:
    """A spec whose misspelt options are named."""

    def __new__(cls, *args: object, **options: object) -> Self:
        known: list[str] = [f.name for f in fields(cls)] if is_dataclass(cls) else []
        for option in options:
            if option not in known:
                raise SpecError(
                    f"{cls.__name__} has no option {option!r}{did_you_mean(option, known)}; "
                    f"it accepts {', '.join(known)}"
                )
        return super().__new__(cls)


@dataclass(frozen=True)
class PCG(Checked):
    """Refit the kept weights of each layer by conjugate gradients (`refine=`).

    Args:
        steps: products with the second moment; ten come close to the exact least squares.
        ridge: pull toward the dense weights, as a share of each input's second moment.
    """

    steps: int = 10
    ridge: float = 0.1

    def __post_init__(self) -> None:
        check_whole("PCG", "steps", self.steps)
        check_above_zero("PCG", "ridge", self.ridge)


@dataclass(frozen=True)
class Swaps(Checked):
    """Better each mask by exchanges of pruned for kept weights (`refine=`), weights unchanged.

    Always two weights of one row (for n:m, of one group), so counts stay as they were. Pruned
    weights on inputs that are always zero stay pruned: to restore one gains nothing by itself.

    Args:
        rounds: at most so many, of up to 16 exchanges a row each. Rows end early when nothing
            helps any more; some 25 rounds come close to that.
    """

    rounds: int = 50

    def __post_init__(self) -> None:
        check_whole("Swaps", "rounds", self.rounds)


@dataclass(frozen=True)
class Reconstruct(Checked):
    """Train the kept weights of each pruned block to the outputs it had (`reconstruct=`).

    Adam on the mean squared error of the block's outputs, kept weights only; the last batches are
    held out, and the weights that were best on them stay (Guo et al., EBFT, arXiv 2402.12419).

    Args:
        epochs: passes over the batches.
        rate: step size, as a share of each weight matrix's root mean square.
        batches: calibration batches a step.
        held_out: share of the batches that only judges.
        alpha: how far the outputs to reach are the dense model's (1) and not the dense block's on
            the inputs it now gets (0).
        seed: of the order of the batches.
        mixed: take gradients of float32 weights in mixed precision (bfloat16 by `torch.autocast`)
            where the device is built for it; weights and the judging of them stay as they are.
    """

    epochs: int = 4
    rate: float = 0.01
    batches: int = 1
    held_out: float = 0.125
    alpha: float = 1.0
    seed: int = 0
    mixed: bool = True

    def __post_init__(self) -> None:
        for name in ("epochs", "batches"):
            check_whole("Reconstruct", name, getattr(self, name))
        check_above_zero("Reconstruct", "rate", self.rate)
        check_share("Reconstruct", "held_out", self.held_out)
        check_share("Reconstruct", "alpha", self.alpha)
        if not isinstance(self.mixed, bool):
            raise SpecError(f"Reconstruct: mixed must be True or False, got {self.mixed!r}")


def as_reconstruct(where: str, value: object) -> Reconstruct | Literal[False]:
    """What `reconstruct=` asks for.

    Raises:
        SpecError: it is none of True, False and a `Reconstruct`.
    """
    if isinstance(value, bool):
        return Reconstruct() if value else False
    if isinstance(value, Reconstruct):
        return value
    raise SpecError(
        f"{where}: reconstruct must be True, False or a Reconstruct(...), got {value!r}"
    )


def check_whole(where: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpecError(f"{where}: {name} must be a whole number above 0, got {value!r}")


def check_above_zero(where: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise SpecError(f"{where}: {name} must be above 0, got {value!r}")


def check_share(where: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise SpecError(f"{where}: {name} must be from 0 to 1, got {value!r}")
