"""What a model gives before it is changed, and how it differs afterwards."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchprune import modes
from torchprune.calibration.left_as_is import left_as_is
from torchprune.graph.capture import Call, place_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of outputs before and after, of the largest output: sums are reordered."""


@dataclass(frozen=True, eq=False)
class Seen:
    """The tensors that a call gave; `drawn` if they depend on random numbers, as with dropout."""

    call: Call
    tensors: list[Tensor]
    drawn: bool


def seen_of(model: nn.Module, calls: Sequence[Call]) -> list[Seen]:
    """What a model gives for some calls. It is left as it was, statistics of batches included."""
    found = []
    for call in calls:
        tensors = _outputs(model, call, 0)
        drawn = call.training and not _equal(tensors, _outputs(model, call, 1))
        found.append(Seen(call, tensors, drawn))
    return found


@dataclass(frozen=True)
class Fault:
    """What is wrong with a smaller model.

    Attributes:
        problem: as the end of a sentence about the model.
        module: the path of the module that failed; empty if none did.
        place: the line of the model's own code that failed, as `file:line`; empty if none did.
    """

    problem: str
    module: str = ""
    place: str = ""

    def __str__(self) -> str:
        where = (f" in {self.module}" if self.module else "") + (
            f" at {self.place}" if self.place else ""
        )
        return self.problem + where


def difference(model: nn.Module, seen: Sequence[Seen]) -> Fault | None:
    """How outputs differ from what was seen; None if they do not. Of drawn ones only shapes."""
    for one in seen:
        if fault := _difference(model, one):
            several = f" for example {seen.index(one) + 1}" if len(seen) > 1 else ""
            training = " in training" if one.call.training else ""
            return replace(fault, problem=fault.problem + training + several)
    return None


def fault_of(model: nn.Module, error: Exception) -> Fault:
    """What an error of a model's own code tells."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    problem = f"fails with {type(error).__name__}: {lines[0]}"
    return Fault(problem, _module_in(model, error), place_of(error).removeprefix(" at "))


def _module_in(model: nn.Module, error: Exception) -> str:
    """The innermost module of the model whose code was running."""
    names = {id(module): path for path, module in model.named_modules()}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [names.get(id(frame.f_locals.get("self"))) for frame in frames]
    return next((path for path in reversed(found) if path), "")


def _difference(model: nn.Module, seen: Seen) -> Fault | None:
    try:
        found = _outputs(model, seen.call, 0)
    except Exception as error:
        return fault_of(model, error)
    if len(found) != len(seen.tensors):
        return Fault(f"gives {len(found)} tensors, not {len(seen.tensors)}")
    for got, want in zip(found, seen.tensors, strict=True):
        if got.shape != want.shape:
            return Fault(f"gives {tuple(got.shape)}, not {tuple(want.shape)}")
        if seen.drawn or not want.is_floating_point():
            continue
        largest = float(want.abs().max()) if want.numel() else 0.0
        apart = float((got - want).abs().max()) if want.numel() else 0.0
        if not apart <= TOLERANCE.get(want.dtype, 1e-1) * largest + 1e-6:
            return Fault(
                f"gives outputs that differ by {apart:.3g} where the largest is {largest:.3g}"
            )
    return None


def _outputs(model: nn.Module, call: Call, seed: int) -> list[Tensor]:
    mode = modes.calibration_mode(model, training=call.training)
    with left_as_is(model), mode, torch.no_grad():
        if not call.training:
            return _tensors(call.batch.run(model))
        with modes.random_numbers_kept(model), _same_buffers(model):
            torch.manual_seed(seed)
            return [tensor.clone() for tensor in _tensors(call.batch.run(model))]


def _tensors(made: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """What training writes into buffers, as running means, is undone."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, values in before:
            buffer.copy_(values)
