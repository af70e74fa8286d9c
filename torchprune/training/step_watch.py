"""Acting at a step of a training loop that knows nothing of it, by the steps of its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class StepCount:
    """How many steps a model took: as many as the parameter that took the most."""

    def __init__(self) -> None:
        self.steps = 0


@contextmanager
def watching_steps(
    model: nn.Module, step: int | None, act: Callable[[], object]
) -> Iterator[StepCount]:
    """In the block, call `act` once, right after the step of that number (from 1) on the model.

    Any `torch.optim` optimizer counts that holds one of the model's parameters, also inside
    `Trainer` and Accelerate. Steps that gradient scaling leaves out are none.

    Args:
        step: None never calls it.
    """
    count, steps = StepCount(), {id(parameter): 0 for parameter in model.parameters()}

    def stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
        # By parameter, so that optimizers that share a model count once, and later ones go on.
        own = [p for group in optimizer.param_groups for p in group["params"] if id(p) in steps]
        for parameter in own:
            steps[id(parameter)] += 1
        if any(steps[id(parameter)] > count.steps for parameter in own):
            count.steps += 1
            if count.steps == step:
                act()

    handle = register_optimizer_step_post_hook(stepped)
    try:
        yield count
    finally:
        handle.remove()
