"""What pruning one layer alone does to its own outputs, from one pass of the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from torchprune.calibration.batches import Batch
from torchprune.calibration.lockstep import Calibration, Stop
from torchprune.calibration.moments import Moments
from torchprune.errors import CalibrationError
from torchprune.masking.targets import Target
from torchprune.methods.decide import groups_of, sampled_squares
from torchprune.specs.patterns import Block
from torchprune.specs.spec import Spec


@dataclass(frozen=True)
class OutputError:
    """Squares of a layer's outputs, summed over all tokens of the calibration data.

    Attributes:
        lost: of their change, ||X (W - W')^T||^2.
        total: of the dense ones, ||X W^T||^2.
    """

    lost: float
    total: float

    @property
    def relative(self) -> float:
        """lost / total, 0 where the layer gives nothing whatever is pruned."""
        return self.lost / self.total if self.total > 0 else 0.0


def dense_statistics(
    model: nn.Module, targets: Sequence[Target], batches: Sequence[Batch], spec: Spec, *, gram: bool
) -> Stop:
    """The layers that some batch reaches, with the statistics of what they read in the dense model.

    Raises:
        CalibrationError: they are not finite.
    """
    calibration = Calibration(
        model,
        list(targets),
        batches,
        gram=gram,
        total=spec.needs_mean,
        blocks={},
        cap=spec.token_cap,
    )
    with calibration:
        stop = calibration.collect()
    return [(target, moments) for target, moments in stop if any(moments.rows)]


def output_error(target: Target, moments: Moments, values: Tensor) -> OutputError:
    """What other weights do to a layer's outputs.

    Args:
        values: (groups, rows, cols), in place of its weights.

    Raises:
        CalibrationError: naming the layer, if the error is not finite.
    """
    lost = total = 0.0
    for group, (weight, other) in enumerate(zip(groups_of(target), values, strict=True)):
        found = sampled_squares(weight, moments, group, weight.float() - other.float())
        if found is None:
            continue
        scale = 1.0
        if moments.gram is None:  # sampled rows stand for all
            scale = moments.rows[group] / sum(map(len, moments.sample[group]))
        lost, total = lost + scale * found[0], total + scale * found[1]
    if not lost < float("inf"):
        raise CalibrationError(f"{target.name}: its error is {lost}")
    return OutputError(lost, total)


def steps_of(target: Target, spec: Spec) -> tuple[int, int]:
    """How many weights one more count of the spec's scope and the layer's pattern prunes, and how
    many counts would prune all."""
    view, pattern = target.view, target.goal.pattern
    tall, wide = (pattern.rows, pattern.cols) if isinstance(pattern, Block) else (1, 1)
    rows, cols = view.rows // tall, view.cols // wide
    if spec.scope == "row":
        return view.groups * tall * wide * rows, cols
    return view.groups * tall * wide, rows * cols
