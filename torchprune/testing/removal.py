"""The law of shrinking, for a model of your own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.graph.capture import as_batch
from torchprune.structure.plan import plan_shrink
from torchprune.structure.shrink import shrink


def assert_shrinks(
    model: nn.Module, example_inputs: Any, *, tolerance: float = 1e-3, removes: bool = True
) -> nn.Module:
    """Assert that what masks (or zeros) let go can go: the outputs stay, the sizes are as planned.

    The law: a copy, shrunk, gives the masked model's outputs within rounding; its parameters are as
    many as the plan says; and there is nothing left to remove from it.

    Args:
        model: masked by a structured spec, or any other; it is left as it is.
        example_inputs: one call: a tensor, a tuple (positional) or a mapping (keywords).
        tolerance: largest difference of an output, of the largest value of that output.
        removes: also assert that there is something to remove.

    Returns:
        the smaller copy.

    Raises:
        AssertionError: saying which part of the law fails.
        ShrinkError: as `plan_shrink` and `shrink` raise it.
    """
    batch = as_batch(model, example_inputs)
    plan = plan_shrink(model, example_inputs)
    assert plan or not removes, f"nothing to remove\n{plan}"
    want = _outputs(model, batch)
    small = shrink(copy.deepcopy(model), plan)
    got = _outputs(small, batch)
    assert len(got) == len(want), f"{len(got)} outputs, expected {len(want)}"
    for at, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape, f"output {at}: {tuple(g.shape)}, expected {tuple(w.shape)}"
        apart, largest = float((g - w).abs().max()), float(w.abs().max())
        assert apart <= tolerance * largest + 1e-6, f"output {at}: apart by {apart} of {largest}"
    count = sum(p.numel() for p in small.parameters())
    assert count == plan.parameters[1], f"{count} parameters, planned {plan.parameters[1]}"
    again = plan_shrink(small, example_inputs)
    assert not again, f"there is more to remove\n{again}"
    return small


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    with modes.calibration_mode(model), torch.no_grad():
        leaves = pytree.tree_leaves(model(*batch.args, **batch.kwargs))
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
