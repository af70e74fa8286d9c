"""OpenVINO: the ONNX graph as its intermediate representation, an .xml and a .bin file."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.errors import ExportError, MissingExtraError
from torchprune.export.call import (
    Call,
    Sample,
    check,
    file_bytes,
    folder_of,
    holding,
    prepare,
)
from torchprune.export.onnx_model import allowed_of, require_onnx, write_onnx
from torchprune.export.written import ExportReport

_ALLOWED = 1e-3
"""Largest difference from torch, relative to the largest output, beyond which a graph is wrong."""

_BRINGS = (
    "OpenVINO stores and multiplies zeros like all numbers: neither smaller nor faster. (What it "
    "does with sparse weights it does on Intel processors with AMX alone.)"
)


def to_openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    with_cache: bool = False,
    dynamic_shapes: Any = None,
) -> ExportReport:
    """Write a model for OpenVINO with its masks folded, run it there, and compare with torch.

    Args:
        model: masked, folded, lowered or dense; float32 or float16. It is not changed.
        path: of the .xml file; the weights go beside it, in a .bin file. Both replace earlier ones,
            the .bin file first.
        example_inputs, with_cache, dynamic_shapes: as for `to_onnx`, which makes the graph.

    Returns:
        sizes, names and differences; print it. The comparison computes in float32.

    Raises:
        MissingExtraError: the extra "openvino" is absent.
        ExportError: as of `to_onnx`. No file is left then.
    """
    try:
        import openvino  # noqa: F401
    except ImportError:
        raise MissingExtraError("openvino", "openvino", "torchprune.export.to_openvino") from None
    target = Path(path)
    if target.suffix != ".xml":
        raise ExportError(f"OpenVINO's graphs are .xml files, got {target.name}")
    require_onnx("torchprune.export.to_openvino")
    call = prepare(
        model,
        example_inputs,
        with_cache=with_cache,
        dynamic_shapes=dynamic_shapes,
        vary=True,
        accept=allowed_of,
    )
    return holding(call, lambda call: _write(call, target))


def _write(call: Call, target: Path) -> ExportReport:
    import openvino

    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home:
        partial = Path(home) / target.name
        written = write_onnx(call, Path(home) / "model.onnx", packing=False)
        graph = openvino.convert_model(written.path)
        openvino.save_model(graph, partial, compress_to_fp16=False)
        seconds, compiled = _compiled(partial)
        difference, relative = check(call, "OpenVINO", lambda s: _run(compiled, s), _ALLOWED)
        data = partial.with_suffix(".bin")
        total = file_bytes(partial, data)
        for file in (data, partial):
            file.replace(target.parent / file.name)
    return replace(
        written,
        path=target,
        data=target.with_suffix(".bin"),
        runtime="OpenVINO",
        bytes=total,
        dense_bytes=total,
        difference=difference,
        relative=relative,
        load_seconds=seconds,
        brings=_BRINGS,
    )


def _compiled(path: Path) -> tuple[float, Any]:
    import openvino

    start = time.perf_counter()
    # By itself it would compute in bfloat16 where the processor can.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return time.perf_counter() - start, compiled


def _run(compiled: Any, sample: Sample) -> list[Tensor]:
    found = compiled([t.detach().cpu().numpy() for t in sample.tensors])
    return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]
