"""Examples with every row twice: whether an axis of an argument grows with them.

Where an example shows units once on an axis, that may be for want of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.left_as_is import left_as_is
from torchprune.calibration.nested import mapped
from torchprune.graph.capture import Call
from torchprune.graph.handed import Argument, Handed, Place, each_argument


def with_more_rows(
    model: nn.Module, calls: Sequence[Call], entries: Sequence[Handed]
) -> tuple[set[Place], list[Call]]:
    """What becomes of axes when an example has every row twice.

    Returns:
        the axes that stay as long as they are, and the calls in which others grow.
    """
    stay: set[Place] = set()
    growing: list[Call] = []
    left = list(entries)
    for call in calls:
        once, more = _lengths(model, call, left), _twice(call)
        try:
            twice = _lengths(model, more, left)
        except Exception:  # what has as many rows as the example, whatever the reason
            twice = once
        same = {one.at for one in left if once[one.at] and once[one.at] == twice[one.at]}
        stay |= same
        left = [one for one in left if one.at not in same]
        if any(once[one.at] for one in left):
            growing.append(more)
            left = [one for one in left if not once[one.at]]
        if not left:
            break
    return stay, growing


def _twice(call: Call) -> Call:
    def doubled(_: object, x: Tensor) -> Tensor:
        return torch.cat([x, x]) if x.dim() else x

    args, kwargs = mapped((call.batch.args, call.batch.kwargs), doubled)
    return Call(Batch(args, kwargs), call.training)


def _lengths(model: nn.Module, call: Call, entries: Sequence[Handed]) -> dict[Place, list[int]]:
    """The lengths of some axes in a run, each time that a module is called."""
    shapes: dict[Argument, list[torch.Size]] = {entry.argument: [] for entry in entries}

    def noting(path: str) -> Callable[[str, int, Tensor], Tensor]:
        def note(name: str, _: int, x: Tensor) -> Tensor:
            if (path, name) in shapes:
                shapes[path, name].append(x.shape)
            return x

        return note

    handles: list[Any] = []
    try:
        for path in {entry.module for entry in entries}:
            hook = each_argument(noting(path))
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        with (
            left_as_is(model),
            modes.calibration_mode(model, training=call.training),
            modes.random_numbers_kept(model),
            torch.no_grad(),
        ):
            call.batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {
        one.at: [shape[one.axis] for shape in shapes[one.argument] if len(shape) == one.dim]
        for one in entries
    }
