"""Calls against what a format allows and what its runtime computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from torchprune.errors import ExportError
from torchprune.export import written
from torchprune.export.call import Call, Sample
from torchprune.export.promises import SizesError, reason_of
from torchprune.export.written import few
from torchprune.lowering.modules import BitmaskLinear

T = TypeVar("T")


def holding(call: Call, write: Callable[[Call], T]) -> T:
    """Write a call, or, where it does not hold at other sizes than the example's, at those alone.

    Sizes that a user asked for are not given up: then it is an error.
    """
    try:
        return write(call)
    except SizesError as error:
        if call.retreat is None:
            raise
        return write(replace(call.retreat, note=str(error), widened=call.widened))


def admit(program: ExportedProgram, call: Call) -> None:
    """Let a program take the sizes that it will be checked at.

    torch bounds a sum of sizes by the sum of their bounds, and takes each for two or more.
    """
    values = written.input_values(program)
    for at, value in enumerate(values):
        shape: tuple[Any, ...] = tuple(value.shape)
        for axis, size in enumerate(shape):
            known = None if isinstance(size, int) else program.range_constraints.get(size.node.expr)
            least = min(sample.tensors[at].shape[axis] for sample in call.samples)
            if known is not None and least < known.lower:
                program.range_constraints[size.node.expr] = type(known)(least, known.upper)


def told(program: ExportedProgram, call: Call) -> dict[str, Any]:
    """What a report says of sizes; see `written.sizes_of`.

    Raises:
        SizesError: one is fixed, and not at the example's.
    """
    found = written.sizes_of(program, call.inputs, call.wanted)
    for tensor, (name, sizes) in zip(call.samples[0].tensors, found["sizes"].items(), strict=True):
        for axis, size in enumerate(sizes):
            if isinstance(size, int) and size != tensor.shape[axis]:
                raise SizesError(f"torch could not let axis {axis} of {name} vary in this model")
    return found


def check(
    call: Call,
    runtime: str,
    compute: Callable[[Sample], list[Tensor]],
    allowed: float,
    more: Callable[[Sample, list[Tensor]], float] = lambda *_: 0.0,
) -> tuple[float, float]:
    """Compare a runtime with the model at every sample; see `written.compare`.

    Args:
        more: what is allowed of a sample and these outputs instead, where that is more; asked only
            if it matters.

    Returns:
        largest absolute difference, and the largest of those relative to a sample's outputs.

    Raises:
        ExportError: it computes otherwise or not at all for the example.
        SizesError: the same at other sizes.
    """
    worst = [0.0, 0.0]
    for sample in call.samples:
        kind = ExportError if sample is call.samples[0] else SizesError
        where = "" if kind is ExportError else f" for {_shapes(call, sample)}"
        try:
            outputs = compute(sample)
            try:
                found = written.compare(sample.outputs, outputs, allowed)
            except ExportError:
                found = written.compare(
                    sample.outputs, outputs, max(allowed, more(sample, outputs))
                )
        except ExportError as error:
            raise kind(f"{error}{where}") from error
        except Exception as error:
            raise kind(
                f"{runtime} fails{where}: {reason_of(error)}; nothing was written"
            ) from error
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
    return worst[0], worst[1]


def dtype_of(
    model: nn.Module, accepted: Sequence[torch.dtype], where: str, wide: bool = False
) -> torch.dtype:
    """The dtype of all floating parameters, and of layers that are lowered.

    Args:
        wide: bfloat16 counts as float32, in which it will be computed.

    Raises:
        ExportError: there are several, or one that is not accepted.
    """
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    found |= {y.layer_dtype for y in model.modules() if isinstance(y, BitmaskLinear)}
    counted = {torch.float32 if wide and d is torch.bfloat16 else d for d in found}
    if len(counted) != 1 or not counted <= set(accepted):
        known = [str(dtype).removeprefix("torch.") for dtype in accepted]
        or_narrow = " or bfloat16" if wide else ""
        named = [f"{name}{or_narrow if name == 'float32' else ''}" for name in known]
        raise ExportError(
            f"{where} writes models whose floating parameters are all {' or all '.join(named)}, "
            f"got {', '.join(sorted(str(d) for d in found)) or 'none'}: model.to(torch.{known[0]}) "
            f"before, or --dtype {known[0]} on the command line"
        )
    return counted.pop()


def _shapes(call: Call, sample: Sample) -> str:
    shapes = [
        f"{name} {tuple(t.shape)}" for name, t in zip(call.inputs, sample.tensors, strict=True)
    ]
    return few(shapes)
