"""The law of ONNX files: the folded model's weights, and in the runtime the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.errors import CheckpointError, ExportError, MissingExtraError
from torchprune.lowering.kernels.build import onnx_library
from torchprune.masking.plain_state import slots_of
from torchprune.study.proofs.onnx_weights import (
    GraphFile,
    compare_weight,
    owner_of,
    read_graph,
    weights_in,
)
from torchprune.study.proofs.proof import Breaches, Check, broken, unchecked
from torchprune.study.proofs.seeded_inputs import LENGTH, ROWS, seeded_inputs

_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


def check_onnx(model: nn.Module, path: Path, pruned: Mapping[str, object]) -> Check:
    """Compare an ONNX file with a folded model; the model is not changed.

    Args:
        pruned: names of its pruned tensors.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        return unchecked("onnx", str(MissingExtraError("onnxruntime", "onnx", "reading ONNX")))
    found = Breaches()
    try:
        graph = read_graph(path)
        numbers = _weights(model, graph, path, pruned, found)
    except CheckpointError as error:
        return broken("onnx", path.name, "weights that can be read", error)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        if graph.products:  # by our own operators, not by what lies beside the file
            options.register_custom_ops_library(str(onnx_library()))
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the runtime's errors have no common base
        found.add(path.name, "a graph that ONNX Runtime runs", f"{error!s:.300}")
        return found.judge("onnx", "as far as it could be read", **numbers)
    said = f"{path.name}: weights as the folded model's, and zeros at its zeros"
    try:
        worst, note = _outputs(model, session, found, quantized=bool(numbers.get("int8")))
    except (ExportError, CheckpointError) as error:
        worst, note = 0.0, f"; outputs not compared: {error!s:.200}"
    return found.judge("onnx", f"{said}{note}", **numbers, difference=worst)


def _weights(
    model: nn.Module,
    graph: GraphFile,
    path: Path,
    pruned: Mapping[str, object],
    found: Breaches,
) -> dict[str, int]:
    slots = slots_of(model)
    numbers = {"weights": 0, "packed": 0, "int8": 0, "unnamed": 0}
    seen: set[str] = set()
    for weight in weights_in(graph):
        key = owner_of(weight.name, slots)
        if key is None:
            numbers["unnamed"] += 1
            continue
        seen.add(key)
        numbers["weights"] += 1
        numbers["packed"] += weight.packed
        numbers["int8"] += weight.value.dtype in (torch.int8, torch.uint8)
        compare_weight(weight, key, slots[key].tensor.detach(), found)
    numbers["pruned_found"] = sum(key in seen for key in pruned)
    if pruned and not numbers["pruned_found"]:
        found.add(path.name, f"{len(pruned)} pruned weights by name", "none of them")
    return {name: value for name, value in numbers.items() if value}


def _outputs(
    model: nn.Module, session: Any, found: Breaches, *, quantized: bool
) -> tuple[float, str]:
    """The largest relative difference, and what to say of it."""
    prepare = import_module("torchprune.export.call").prepare
    allowed_of = import_module("torchprune.export.onnx_graph").allowed_of
    compare = import_module("torchprune.export.written").compare
    taken = {i.name: (i.shape, i.type) for i in session.get_inputs()}
    kinds = [_DTYPES[o.type] for o in session.get_outputs() if o.type in _DTYPES]
    if not kinds:
        raise ExportError("its outputs are no floats")
    plain = model
    if any(p.dtype != kinds[0] for p in model.parameters() if p.is_floating_point()):
        plain = copy.deepcopy(model).to(kinds[0])
    cached = any(name.startswith("past_key_values.") for name in taken)
    example = _example(plain, taken, cached)
    call = prepare(plain, example, with_cache=cached, dynamic_shapes=None, vary=False)
    sample = call.samples[0]
    if len(sample.tensors) != len(taken):
        raise ExportError(f"it takes {len(taken)} inputs, the example has {len(sample.tensors)}")
    feed = {n: t.detach().cpu().numpy() for n, t in zip(taken, sample.tensors, strict=True)}
    try:
        outputs = [torch.from_numpy(y) for y in session.run(None, feed)]
    except Exception as error:
        found.add("ONNX Runtime", "outputs on seeded inputs", f"{error!s:.300}")
        return 0.0, ""
    allowed = float("inf") if quantized else allowed_of(plain)
    how = "with its cache" if cached else "on seeded inputs"
    try:
        _, relative = compare(sample.outputs, outputs, allowed)
    except ExportError as error:
        told = str(error).removesuffix("; nothing was written")
        found.add("ONNX Runtime", f"outputs {how} within {allowed:g} of the largest", told)
        return 0.0, ""
    limit = "int8, which no limit judges" if quantized else f"within {allowed:g} of the largest"
    return relative, f"; outputs {how} {limit}"


def _example(model: nn.Module, taken: Mapping[str, Any], cached: bool) -> dict[str, Tensor]:
    """Keyword inputs in the graph's order, in sizes that it takes."""
    known = [shape for n, (shape, _) in taken.items() if n in ("input_ids", "pixel_values")]
    shape: list[Any] = known[0] if known else []
    rows = shape[0] if shape and isinstance(shape[0], int) else ROWS
    length = shape[1] if len(shape) == 2 and isinstance(shape[1], int) else LENGTH
    inputs = seeded_inputs(model, rows, length)
    if cached:
        return {"input_ids": inputs["input_ids"]} if "input_ids" in inputs else {}
    example = {}
    for name in taken:
        if name in inputs:
            example[name] = inputs[name]
        elif name == "attention_mask" and "input_ids" in inputs:
            example[name] = torch.ones_like(inputs["input_ids"])
        else:
            raise ExportError(f"nobody knows what its input {name!r:.60} is")
    return example
