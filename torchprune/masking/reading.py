"""How a model reads one of its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torchprune.masking.matrices import View


@dataclass(frozen=True, eq=False)
class Reading:
    """How products read one parameter in a forward of the model.

    Attributes:
        view: the matrices they read.
        reads: how many there are in each forward, or None where that may vary.
        scope: the module in one call of which all of them happen, if there are several.
        hooked: products read something made from it, so it is taken to read what its module does.
        feeds_back: what it gives comes back to it a step later.
    """

    view: View
    reads: int | None = 1
    scope: nn.Module | None = None
    hooked: bool = False
    feeds_back: bool = False
