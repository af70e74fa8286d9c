"""OpenVINO: the ONNX graph as its intermediate representation, an .xml and a .bin file."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchprune.errors import ExportError, MissingExtraError
from torchprune.export.bfloat16 import inputs_in_float32, said_of
from torchprune.export.cached import CachedModel
from torchprune.export.call import Call, Sample, as_call, file_bytes, folder_of, prepare
from torchprune.export.judged import check, holding
from torchprune.export.onnx_graph import (
    allowed_of,
    check_inputs,
    graph_of,
    require_onnx,
    save_graph,
)
from torchprune.export.openvino_int8 import RATE, SPARSE, Quantized, quantize
from torchprune.export.promises import promised
from torchprune.export.written import ExportReport, few, tensors_of

_BRINGS = (
    "OpenVINO stores and multiplies zeros like all numbers: neither smaller nor faster. (What it "
    "does with sparse weights it does with int8 alone, on Intel processors with AMX.)"
)


def to_openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    with_cache: bool = False,
    dynamic_shapes: Any = None,
    int8: bool = False,
    int8_ignore: Sequence[str] = (),
    data: Iterable[Any] | None = None,
) -> ExportReport:
    """Write a model for OpenVINO with its masks folded, run it there, and compare with torch.

    Args:
        model: masked, folded, lowered or dense; float32, bfloat16 or both, which is a graph of
            float32 with bfloat16 weights as of `to_onnx`, or float16. It is not changed.
        path: of the .xml file; the weights go beside it, in a .bin file. Both replace earlier ones,
            the .bin file first.
        example_inputs, with_cache, dynamic_shapes: as for `to_onnx`, which makes the graph.
        int8: weights in eight bits, a scale for each output, zeros still zero, and what they are
            multiplied by too, within the range seen on `data` (not of float16 models). A quarter of
            the bytes, and products in whole numbers. A product whose input has outliers, so that a
            step of eight bits is more than 0.3 of the root mean square, stays in float32, as
            `down_proj` of many language models. The report says what it costs, which weights
            OpenVINO can leave zeros out of where there is AMX, and whether this processor does.
        int8_ignore: globs over names of weights that stay float32.
        data: batches of the form of `example_inputs` that are like what will come, for int8's
            ranges, run one at a time; the example alone, if None.

    Returns:
        sizes, names and differences; print it. The differences are those of OpenVINO's own choice
        of a dtype to compute in, which on some processors is bfloat16; it is judged in float32.

    Raises:
        MissingExtraError: the extra "openvino" is absent.
        ExportError: as of `to_onnx`. No file is left then.
    """
    if int8_ignore and not int8:
        raise ExportError("int8_ignore is for int8=True")
    if data is not None and not int8:
        raise ExportError("data is for int8=True")
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
        accept=lambda plain: allowed_of(plain, int8, where="to_openvino"),
        wide=True,
    )
    batches = None if data is None else list(data)  # a second try reads them again
    return holding(call, lambda call: _write(call, target, int8, int8_ignore, batches))


def _write(
    call: Call, target: Path, int8: bool, int8_ignore: Sequence[str], data: Sequence[Any] | None
) -> ExportReport:
    import openvino

    from torchprune.export.narrow_weights import narrow_initializers

    graph, sizes = graph_of(call)
    if call.widened and not int8:  # which wants float32 to make eight bits of
        narrow_initializers(graph)
    outputs = [str(value.name) for value in graph.graph.outputs]
    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home:
        partial = Path(home) / target.name
        save_graph(graph, Path(home) / "model.onnx")
        quantized: list[Quantized] = []
        left: list[str] = []
        with promised("OpenVINO cannot read this graph"):
            if int8 or call.widened:  # weights still have their names, and their bfloat16
                model = openvino.Core().read_model(Path(home) / "model.onnx")
            else:
                model = openvino.convert_model(Path(home) / "model.onnx")
        if int8:
            with promised("OpenVINO cannot quantize this graph"):
                quantized, left = quantize(model, _runs(call, data), int8_ignore)
        with promised("OpenVINO cannot write this graph"):
            openvino.save_model(model, partial, compress_to_fp16=False)
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        with promised("OpenVINO cannot compile this graph"):
            seconds, usual = _compiled(partial, {})
            precise = usual if _precision(usual) == "f32" else _compiled(partial, exact)[1]
        inputs = _inputs(precise, call)
        allowed = float("inf") if int8 else allowed_of(call.module)
        found = check(call, "OpenVINO", lambda s: _run(precise, s), allowed)
        brings = _said(quantized, left, sparse_layers(partial, call)) if int8 else _BRINGS
        brings += said_of(call.widened, int8)
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


def _runs(call: Call, data: Sequence[Any] | None) -> Iterator[list[np.ndarray]]:
    """What the graph is given, batch by batch.

    Raises:
        ExportError: a batch is not of the example's form.
    """
    if data is None:
        yield from (_arrays(sample) for sample in call.samples)
        return
    expected = [t.dim() for t in call.samples[0].tensors]
    for at, batch in enumerate(data):
        args, kwargs = as_call(inputs_in_float32(batch) if call.widened else batch)
        if isinstance(call.module, CachedModel):
            (tokens,) = tensors_of((args, kwargs))
            args, kwargs = call.module.example(tokens, len(tokens), 0, tokens.shape[1]), {}
        given = tensors_of((args, kwargs))
        if [t.dim() for t in given] != expected:
            raise ExportError(
                f"batch {at} of data has {len(given)} tensors of {[t.dim() for t in given]} axes, "
                f"the example {len(expected)} of {expected}"
            )
        yield _arrays_of(given)


def sparse_layers(path: Path, call: Call) -> list[str] | None:
    """Which products of a file leave zeros out on this processor; None if it has no AMX."""
    if not torch.cpu.get_capabilities().get("amx_int8"):
        return None
    compiled = _compiled(path, {**SPARSE, "PERF_COUNT": True})[1]
    request = compiled.create_infer_request()
    request.infer(_arrays(call.samples[0]))
    return [one.node_name for one in request.profiling_info if "sparse" in one.exec_type.lower()]


def _said(quantized: list[Quantized], left: list[str], took: list[str] | None) -> str:
    """What int8 and zeros bring in OpenVINO."""
    fit = [one for one in quantized if one.fit]
    here = (
        "this one has none, and multiplies zeros"
        if took is None
        else f"this one has, and left them out of {len(took)} products ({few(took) or 'none'})"
    )
    kept = (
        f" {len(left)} stay in float32, as what they multiply has outliers beside which eight bits "
        f"leave little of the rest ({few(left)})."
        if left
        else ""
    )
    return (
        f"{len(quantized)} weights are in int8, and so is what they multiply, within the ranges "
        f"that were seen: measure what it costs.{kept} OpenVINO can leave zeros out of what it "
        f"reads of {len(fit)} of the weights in int8 (sides that are multiples of 64, and "
        f"{RATE:.0%} zeros or more), on Intel processors with AMX; {here}. No file can ask for "
        f"it: compile with CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE={RATE}."
    )


def _compiled(path: Path, options: dict[str, Any]) -> tuple[float, Any]:
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
    found = compiled(_arrays(sample))
    return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]


def _arrays(sample: Sample) -> list[np.ndarray]:
    return _arrays_of(sample.tensors)


def _arrays_of(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [t.detach().cpu().numpy() for t in tensors]
