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
from torchprune.export.call import (
    Call,
    Sample,
    check,
    file_bytes,
    folder_of,
    holding,
    prepare,
    promised,
)
from torchprune.export.onnx_model import (
    allowed_of,
    check_inputs,
    graph_of,
    require_onnx,
    save_graph,
)
from torchprune.export.written import ExportReport

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
        sizes, names and differences; print it. The differences are those of OpenVINO's own choice
        of a dtype to compute in, which on some processors is bfloat16; it is judged in float32.

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
        accept=lambda plain: allowed_of(plain, where="to_openvino"),
    )
    return holding(call, lambda call: _write(call, target))


def _write(call: Call, target: Path) -> ExportReport:
    import openvino

    graph, sizes = graph_of(call)
    outputs = [str(value.name) for value in graph.graph.outputs]
    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home:
        partial = Path(home) / target.name
        save_graph(graph, Path(home) / "model.onnx")
        with promised("OpenVINO cannot read this graph"):
            openvino.save_model(
                openvino.convert_model(Path(home) / "model.onnx"), partial, compress_to_fp16=False
            )
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        with promised("OpenVINO cannot compile this graph"):
            seconds, usual = _compiled(partial, {})
            precise = usual if _precision(usual) == "f32" else _compiled(partial, exact)[1]
        inputs = _inputs(precise, call)
        found = check(call, "OpenVINO", lambda s: _run(precise, s), allowed_of(call.module))
        brings = _BRINGS
        if usual is not precise:
            there = found
            found = check(call, "OpenVINO", lambda s: _run(usual, s), float("inf"))
            brings += (
                f" By itself it computes in {_precision(usual)} on this processor, which is what "
                f"was compared; compiled with INFERENCE_PRECISION_HINT=f32 it differs by at most "
                f"{there[0]:.3g} ({there[1]:.2g} of the largest output)."
            )
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
        difference=found[0],
        relative=found[1],
        load_seconds=seconds,
        brings=brings,
        inputs=inputs,
        outputs=outputs,
        **sizes,
        note=call.note,
    )


def _compiled(path: Path, options: dict[str, str]) -> tuple[float, Any]:
    import openvino

    start = time.perf_counter()
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return time.perf_counter() - start, compiled


def _precision(compiled: Any) -> str:
    """In which dtype it computes: "f32", "bf16", "f16"."""
    return str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())


def _inputs(compiled: Any, call: Call) -> list[str]:
    names = [str(value.get_any_name()) for value in compiled.inputs]
    check_inputs(names, call)
    return names


def _run(compiled: Any, sample: Sample) -> list[Tensor]:
    found = compiled([t.detach().cpu().numpy() for t in sample.tensors])
    return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]
