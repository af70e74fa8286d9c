"""How units lie on an axis of an argument: once, or again for every row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.left_as_is import left_as_is
from torchprune.calibration.nested import mapped
from torchprune.graph.capture import Call
from torchprune.graph.handed import Argument, Handed, Place, each_argument

Layout = Literal["apart", "inner", "unknown"]
"""Alone on the axis; all of them again and again; or nobody knows."""


def layouts(
    model: nn.Module, calls: Sequence[Call], entries: Sequence[Handed]
) -> dict[Place, Layout]:
    """How units lie on axes where examples show them once: that may be for want of rows.

    Each example is run as it is, and with every row twice.
    """
    found: dict[Place, Layout] = {one.at: "unknown" for one in entries}
    left = list(entries)
    for call in calls:
        if not left:
            break
        once = _seen(model, call, left)
        batch = call.batch
        args, kwargs = mapped(
            (batch.args, batch.kwargs), lambda _, x: torch.cat([x, x]) if x.dim() else x
        )
        try:
            twice = _seen(model, Call(Batch(args, kwargs), call.training), left)
        except Exception:  # what has as many rows as the example, whatever the reason
            twice = once
        for one in left:
            if once[one.argument]:
                pairs = list(zip(once[one.argument], twice[one.argument], strict=False))
                found[one.at] = _layout(one.axis, pairs)
        left = [one for one in left if not once[one.argument]]
    return found


def _layout(axis: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> Layout:
    """What an argument is like, by what it is for some rows and for each of them twice."""
    if all(one.shape[axis] == two.shape[axis] for one, two in pairs):
        return "apart"
    if all(2 * one.shape[axis] == two.shape[axis] for one, two in pairs):
        inner = all(torch.equal(two, torch.cat([one, one], axis)) for one, two in pairs)
        outer = all(torch.equal(two, one.repeat_interleave(2, axis)) for one, two in pairs)
        return "inner" if inner and not outer else "unknown"
    return "unknown"


def _seen(model: nn.Module, call: Call, entries: Sequence[Handed]) -> dict[Argument, list[Tensor]]:
    """What some arguments are in a run, each time."""
    found: dict[Argument, list[Tensor]] = {entry.argument: [] for entry in entries}

    def noting(path: str) -> Callable[[str, int, Tensor], Tensor]:
        def note(name: str, _: int, x: Tensor) -> Tensor:
            if (path, name) in found:
                found[path, name].append(x.detach().clone())
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
    return found
