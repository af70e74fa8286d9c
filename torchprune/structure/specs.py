"""What the user asks for where whole structures go: frozen values, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from torchprune.errors import SpecError
from torchprune.specs.allocation import Loss
from torchprune.specs.options import Checked, Reconstruct, as_reconstruct
from torchprune.specs.spec import Selectors

if TYPE_CHECKING:
    from torchprune.graph.groups import Group, Kind

Named = Literal["flap", "activation", "l2", "random", "taylor"]
Score = Named | Callable[[nn.Module, "Group"], Tensor]
SCORES = ("flap", "activation", "l2", "random", "taylor")


@dataclass(frozen=True)
class StructuredSpec(Checked):
    """The fields of all specs that mask whole units. Use `HeadSpec`, `NeuronSpec`, `ChannelSpec`.

    Args:
        sparsity: share of each group's units to prune, 0 <= sparsity < 1, rounded to the nearest
            number that leaves a multiple of `round_to`; at least `round_to` stay.
        score: what a unit is worth. Of the layers that read it, on calibration inputs x: "flap",
            var(x) * ||W||^2 (An et al., arXiv 2312.11983); "activation", E[x^2] * ||W||^2. From all
            its weights: "l2", their square sum; "taylor", |sum of weight * gradient| of a loss.
            "random". Or a callable (model, group) -> (units,) tensor, higher is kept.
        refit: fit the layers that read what goes to what stays, by ridge least squares on the same
            inputs (with the bias where the layer has one), in sequence, so that later layers see
            the refitted ones.
        reconstruct: True or `torchprune.Reconstruct(...)`: train what stays of each block to the
            outputs the block had, once its units are chosen.
        damping: of the refit, as a share of the second moment's mean diagonal.
        allocation: "uniform", the same share in every group; "global", the lowest scores of all
            groups together, each group's standardised first.
        round_to: the width that stays is a multiple of it, in neurons or channels, of which a unit
            may be several, as where the same places go from all groups of a convolution. Default 8,
            or 64 for groups of 4096 and more, or 1 where the group's own width is no multiple;
            heads are always whole.
        targets: which groups: selectors as for the other specs, that match a layer of the group.
        ignore: groups left alone, selected likewise.
        loss: (model, batch) -> scalar, for "taylor". Default: a transformers language model's own
            loss of predicting the batch.
        seed: for "random".

    Raises:
        SpecError: for contradictions, values out of range and misspelt options.
    """

    sparsity: float = 0.5
    score: Score = "flap"
    refit: bool = True
    damping: float = 0.01
    allocation: Literal["uniform", "global"] = "uniform"
    round_to: int | None = None
    targets: Selectors | None = None
    ignore: Selectors = ()
    loss: Loss | None = None
    seed: int = 0
    reconstruct: bool | Reconstruct = False

    method: ClassVar[str]
    kind: ClassVar[Kind]
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, int | float):
            raise SpecError(f"{name}: sparsity must be a number, got {self.sparsity!r}")
        if not 0 <= self.sparsity < 1:
            raise SpecError(
                f"{name}: sparsity is the share of {self.kind} to prune, 0 <= sparsity < 1, got "
                f"{self.sparsity!r}"
            )
        if not callable(self.score) and self.score not in SCORES:
            raise SpecError(
                f"{name}: score {self.score!r} is not understood; accepted: "
                f"{', '.join(map(repr, SCORES))}, or a callable (model, group) -> tensor"
            )
        if self.allocation not in ("uniform", "global"):
            raise SpecError(
                f'{name}: allocation must be "uniform" or "global", got {self.allocation!r}'
            )
        if not (isinstance(self.damping, int | float) and 0 < self.damping < float("inf")):
            raise SpecError(f"{name}: damping must be above 0, got {self.damping!r}")
        if self.round_to is not None and not (type(self.round_to) is int and self.round_to > 0):
            raise SpecError(f"{name}: round_to must be a whole number above 0, got {self.round_to}")
        if self.loss is not None and not callable(self.loss):
            raise SpecError(f"{name}: loss must be a callable (model, batch) -> scalar")
        object.__setattr__(self, "reconstruct", as_reconstruct(name, self.reconstruct))

    @property
    def score_name(self) -> str:
        """The score, as a record names it."""
        return self.score if isinstance(self.score, str) else "given score"

    def multiple(self, count: int, width: int = 1) -> int:
        """What the number of units that stay is a multiple of, in a group of so many.

        Args:
            width: how wide one unit is: so many channels go with it.
        """
        wide = self.round_to or (64 if count * width >= 4096 else 8)
        step = wide // math.gcd(wide, width)
        return step if self.round_to or count % step == 0 else 1

    def kept(self, count: int, width: int = 1) -> int:
        """How many of a group's units stay under uniform allocation."""
        step = min(self.multiple(count, width), count)
        return min(count, max(step, step * round(count * (1 - self.sparsity) / step)))


@dataclass(frozen=True)
class HeadSpec(StructuredSpec):
    """Mask whole attention heads; with grouped queries, key-value heads with all their queries.

    Query, key, value and output projections together; at least one head stays.
    """

    sparsity: float = 0.25

    method: ClassVar[str] = "heads"
    kind: ClassVar[Kind] = "heads"

    def multiple(self, count: int, width: int = 1) -> int:
        return self.round_to or 1


@dataclass(frozen=True)
class NeuronSpec(StructuredSpec):
    """Mask whole neurons of MLPs: gate, up and down together, or the two layers of a plain one."""

    method: ClassVar[str] = "neurons"
    kind: ClassVar[Kind] = "neurons"


@dataclass(frozen=True)
class ChannelSpec(StructuredSpec):
    """Mask whole channels of convolutions, with all that they meet in norms, sums and concats."""

    sparsity: float = 0.3

    method: ClassVar[str] = "channels"
    kind: ClassVar[Kind] = "channels"


@dataclass(frozen=True)
class LayerSpec(Checked):
    """Mask whole repeated blocks: all their weights and biases, so that each hands on its input.

    Args:
        drop: how many.
        score: "cosine": the blocks that turn their input least, 1 - cos(input, output) averaged
            over tokens (ShortGPT, Men et al., arXiv 2403.03853); "loss": one by one, the block
            whose absence costs least loss on the data.
        targets: which blocks may go, by selectors that match a layer inside.
        ignore: blocks that stay, likewise.
        loss: (model, batch) -> scalar, for "loss". Default: a transformers language model's own.

    Raises:
        SpecError: for values out of range and misspelt options.
    """

    drop: int = 1
    score: Literal["cosine", "loss"] = "cosine"
    targets: Selectors | None = None
    ignore: Selectors = ()
    loss: Loss | None = None

    method: ClassVar[str] = "layers"
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.drop) is not int or self.drop < 1:
            raise SpecError(f"LayerSpec: drop must be a whole number above 0, got {self.drop!r}")
        if self.score not in ("cosine", "loss"):
            raise SpecError(f'LayerSpec: score must be "cosine" or "loss", got {self.score!r}')
        if self.loss is not None and not callable(self.loss):
            raise SpecError("LayerSpec: loss must be a callable (model, batch) -> scalar")


def standardised(score: Tensor) -> Tensor:
    """A group's scores with mean 0 and deviation 1, to compare with other groups'."""
    score = score.double()
    spread = score.std(correction=0)
    return (score - score.mean()) / torch.where(spread > 0, spread, 1.0)
