"""ExecuTorch: a `.pte` program for phones and small devices, lowered to XNNPACK on their CPUs."""

from __future__ import annotations

import os
import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchprune.errors import ExportError, MissingExtraError
from torchprune.export.call import Sample, file_bytes, folder_of, prepare
from torchprune.export.judged import check, dtype_of, told
from torchprune.export.promises import promised, reason_of
from torchprune.export.pt2 import exported
from torchprune.export.rounding import rounding_of
from torchprune.export.written import ExportReport

_ALLOWED = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}
"""Difference from torch, relative to the largest output, beyond which a program is wrong."""

_BRINGS = (
    "ExecuTorch stores and multiplies zeros like all numbers: neither smaller nor faster. Removing "
    "whole channels, heads or layers is what pays there, and quantization."
)


_FIXED = (
    " A call takes inputs of exactly these sizes; dynamic_shapes, with a max for each, lets them "
    "vary."
)


def to_executorch(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    with_cache: bool = False,
    dynamic_shapes: Any = None,
) -> ExportReport:
    """Write a model for ExecuTorch with its masks folded, run it there, and compare with torch.

    Args:
        model: masked, folded, lowered or dense; float32, float16 or bfloat16. It is not
            changed.
        path: of the file, replaced if it exists, whole or not at all.
        example_inputs: as for `to_onnx`. The program takes their tensors in order, flat.
        with_cache: as for `to_onnx`; the past is then as long as in the example, unless
            `dynamic_shapes` bounds it.
        dynamic_shapes: as for `torch.export.export`, every size that varies with a `max`, because
            the program's memory is planned beforehand; by default all sizes are the example's.

    Returns:
        sizes and differences; print it.

    Raises:
        MissingExtraError: the extra "executorch" is absent.
        ExportError: a dtype it does not take, a model that torch or ExecuTorch cannot lower (with
            the reason), a size that varies without a `max`, or a program that computes otherwise.
            No file is left then.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError:
        raise MissingExtraError(
            "executorch", "executorch", "torchprune.export.to_executorch"
        ) from None
    target = Path(path)
    call = prepare(
        model,
        example_inputs,
        with_cache=with_cache,
        dynamic_shapes=dynamic_shapes,
        vary=False,
        accept=_allowed_of,
    )
    allowed = _allowed_of(call.module)
    program = exported(call)
    sizes = told(program, call)
    _check_bounded(sizes)
    # What torch decomposes attention to lays its output out otherwise than its fused kernels do,
    # and fake tensors remember layouts of earlier exports without asking which it was.
    FakeTensorMode.cache_clear()
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")  # of ExecuTorch's own making
        try:
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            made = lowered.to_executorch()
        except Exception as error:
            raise ExportError(
                f"ExecuTorch could not lower this model: {reason_of(error)}"
            ) from error
        finally:
            FakeTensorMode.cache_clear()
    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home:
        partial = Path(home) / target.name
        with partial.open("wb") as file:
            made.write_to_file(file)
        with promised("ExecuTorch cannot load this program"):
            seconds, method = _loaded(partial)
        difference, relative = check(
            call, "ExecuTorch", lambda s: _run(method, s), allowed, rounding_of(call)
        )
        total = file_bytes(partial)
        partial.replace(target)
    return ExportReport(
        path=target,
        data=None,
        runtime="ExecuTorch",
        bytes=total,
        dense_bytes=total,
        packed=[],
        difference=difference,
        relative=relative,
        load_seconds=seconds,
        brings=_BRINGS + (_FIXED if _all_fixed(sizes) else ""),
        **sizes,
    )


def _all_fixed(sizes: dict[str, Any]) -> bool:
    return all(isinstance(size, int) for shape in sizes["sizes"].values() for size in shape)


def _check_bounded(sizes: dict[str, Any]) -> None:
    """
    Raises:
        ExportError: a size varies without a greatest one.
    """
    for name, shape in sizes["sizes"].items():
        for axis, size in enumerate(shape):
            letters = re.findall("[a-z]+", size) if isinstance(size, str) else []
            if any(sizes["bounds"].get(letter, (0, None))[1] is None for letter in letters):
                raise ExportError(
                    f"ExecuTorch plans memory beforehand, and axis {axis} of {name} may be of any "
                    'size: give it a greatest, as Dim("tokens", max=128) of torch.export'
                )


def _allowed_of(model: nn.Module) -> float:
    return _ALLOWED[dtype_of(model, tuple(_ALLOWED), "to_executorch")]


def _loaded(path: Path) -> tuple[float, Any]:
    from executorch.runtime import Runtime, Verification

    start = time.perf_counter()
    program = Runtime.get().load_program(path, verification=Verification.Minimal)
    method = program.load_method("forward")
    return time.perf_counter() - start, method


def _run(method: Any, sample: Sample) -> list[Tensor]:
    found = method.execute([t.contiguous() for t in sample.tensors])
    return [y.clone() for y in found if isinstance(y, Tensor)]
