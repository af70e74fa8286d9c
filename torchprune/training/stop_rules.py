"""When iterative pruning has gone far enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchprune.errors import SpecError
from torchprune.specs.options import Checked, check_above_zero, check_whole


@dataclass(frozen=True)
class Within(Checked):
    """Go on while the metric stays within a tolerance of the dense model's.

    The model is left at the sparsest level within it; at none, dense as it was.

    Args:
        absolute: how much worse the metric may be, in its own units: `Within(0.01)` lets an
            accuracy of 0.97 fall to 0.96. An improvement is always within.
        relative: the same as a share of the dense model's value; give one of the two.
        patience: end after so many levels in a row outside; more than 1 gives a later level the
            chance to be within again.

    Raises:
        SpecError: none or both of the tolerances, values out of range and misspelt options.
    """

    absolute: float | None = None
    relative: float | None = None
    patience: int = 1

    def __post_init__(self) -> None:
        if (self.absolute is None) == (self.relative is None):
            raise SpecError(
                "Within needs one tolerance: Within(0.01) in the metric's own units, or "
                "Within(relative=0.01) as a share of the dense model's"
            )
        for name in ("absolute", "relative"):
            if (value := getattr(self, name)) is not None and value != 0:
                check_above_zero("Within", name, value)
        check_whole("Within", "patience", self.patience)

    def holds(self, value: float, dense: float, *, higher_is_better: bool) -> bool:
        """Whether a value is within the tolerance of the dense model's; NaN is not."""
        worse = dense - value if higher_is_better else value - dense
        allowed = self.absolute
        if allowed is None:
            assert self.relative is not None
            allowed = self.relative * abs(dense)
        return value == dense or worse <= allowed

    def ends(self, within: Sequence[bool]) -> bool:
        """Whether no further level is to be tried, after levels that were within or not."""
        last = within[-self.patience :]
        return len(last) == self.patience and not any(last)
