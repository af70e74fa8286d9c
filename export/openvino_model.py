"""OpenVINO: the ONNX graph as its intermediate representation, an .xml and a .bin file."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.errors import ExportError, MissingExtraError
from torchprune.export.call import file_bytes, folder_of, prepare
from torchprune.export.onnx_model import to_onnx
from torchprune.export.written import ExportReport, compare, tensors_of

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
        import openvino
    except ImportError:
        raise MissingExtraError("openvino", "openvino", "torchprune.export.to_openvino") from None
    target = Path(path)
    if target.suffix != ".xml":
        raise ExportError(f"OpenVINO's graphs are .xml files, got {target.name}")
    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home:
        partial = Path(home) / target.name
        written = to_onnx(
            model,
            Path(home) / "model.onnx",
            example_inputs,
            weights="dense",
            with_cache=with_cache,
            dynamic_shapes=dynamic_shapes,
        )
        graph = openvino.convert_model(written.path)
        openvino.save_model(graph, partial, compress_to_fp16=False)
        call = prepare(
            model, example_inputs, with_cache=with_cache, dynamic_shapes=None, vary=False
        )
        with torch.no_grad():
            expected = tensors_of(call.module(*call.args, **call.kwargs))
        seconds, found = _run(partial, tensors_of((call.args, call.kwargs)))
        difference, relative = compare(expected, found, _ALLOWED)
        data = partial.with_suffix(".bin")
        total = file_bytes(partial, data)
        for file in (data, partial):
            file.replace(target.parent / file.name)
    return ExportReport(
        path=target,
        data=target.with_suffix(".bin"),
        runtime="OpenVINO",
        bytes=total,
        dense_bytes=total,
        packed=[],
        difference=difference,
        relative=relative,
        load_seconds=seconds,
        brings=_BRINGS,
        inputs=written.inputs,
        outputs=written.outputs,
    )


def _run(path: Path, given: list[Tensor]) -> tuple[float, list[Tensor]]:
    import openvino

    start = time.perf_counter()
    # By itself it would compute in bfloat16 where the processor can.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    seconds = time.perf_counter() - start
    found = compiled([t.detach().cpu().numpy() for t in given])
    return seconds, [torch.from_numpy(found[output].copy()) for output in compiled.outputs]
