"""The recommended combination: ADMM toward the dense model, and blocks trained to its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torchprune.errors import SpecError
from torchprune.methods.admm import ADMMSpec
from torchprune.specs.options import Reconstruct
from torchprune.specs.spec import set_values


@dataclass(frozen=True)
class BestSpec(ADMMSpec):
    """The recommended combination, for those who do not want to choose.

    ADMM toward what the dense model gives: each layer a little, or each block, whose kept weights
    are trained for it, or both. What a level reaches and costs is measured in docs/results. For
    other combinations use `ADMMSpec`.

    Args:
        effort: "fast": `ADMMSpec(alpha=0.25)`, about three times as long as SparseGPT on a CPU.
            "balanced": `ADMMSpec(reconstruct=Reconstruct())`, about eight times. "max": both, on
            more text, for 32 windows some forty times. A decoder-only transformers language model
            brings the calibration windows up to 128 by continuations of them that it samples; what
            trained weights are judged by stays the given ones. Other models, and 128 windows and
            more, make do with what is given.
    """

    effort: Literal["fast", "balanced", "max"] = "balanced"

    method: ClassVar[str] = "best"

    def __post_init__(self) -> None:
        if self.effort not in ("fast", "balanced", "max"):
            raise SpecError(
                f"BestSpec: effort {self.effort!r} is not understood; "
                'accepted: "fast", "balanced", "max"'
            )
        if not self.alpha and self.effort != "balanced":
            set_values(self, alpha=0.25)
        if self.effort != "fast" and isinstance(self.reconstruct, bool):
            set_values(self, reconstruct=Reconstruct())
        super().__post_init__()

    @property
    def windows(self) -> int:
        return 128 if self.effort == "max" else 0
