"""Files that were exported, loaded in their runtimes: to be run, and asked which kernels ran."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchprune.errors import ExportError
from torchprune.export.aoti import COMPILED
from torchprune.export.call import Call, prepare
from torchprune.export.openvino_int8 import SPARSE
from torchprune.export.promises import promised
from torchprune.export.written import ExportReport

_WIDE = (".onnx", ".xml")
"""Files that compute in float32 what was bfloat16."""


@dataclass(frozen=True)
class Kernels:
    """What a runtime's own profile of one call tells.

    Attributes:
        sparse: names of what ran by kernels that leave zeros out.
        count: of all kernels that ran.
        source: whose profile it is.
    """

    sparse: list[str]
    count: int
    source: str


@dataclass(frozen=True)
class LoadedFile:
    """A file in its runtime.

    Attributes:
        run: computes the example once.
        kernels: profiles that; None where the runtime has no profile that Python can read.
    """

    run: Callable[[], object]
    kernels: Callable[[], Kernels] | None


def example_of(report: ExportReport, model: Any, example_inputs: Any, *, with_cache: bool) -> Call:
    """One call of a model as the file that was made of it takes it."""
    return prepare(
        model,
        example_inputs,
        with_cache=with_cache,
        dynamic_shapes=None,
        vary=False,
        wide=report.path.suffix in _WIDE,
    )


def loaded_file(report: ExportReport, call: Call) -> LoadedFile:
    """A file that `torchprune.export.to_*` just wrote, in its runtime.

    Raises:
        ExportError: no runtime here runs it, with the reason.
    """
    known = {
        ".onnx": _onnx,
        ".xml": _openvino,
        ".pte": _executorch,
        ".tflite": _litert,
    }
    path = report.path
    if path.suffix == ".pt2":
        with promised(f"{path.name} cannot be loaded"):
            return (_compiled if report.runtime == COMPILED else _pt2)(report, call)
    if path.suffix == ".mlpackage":
        raise ExportError("Core ML runs on Apple's systems alone")
    if path.suffix not in known:
        raise ExportError(f"no runtime is known that runs {path.name}")
    with promised(f"{path.name} cannot be loaded"):
        return known[path.suffix](report, call)


def _onnx(report: ExportReport, call: Call) -> LoadedFile:
    import onnxruntime

    arrays = [t.detach().cpu().numpy() for t in call.samples[0].tensors]

    def session(folder: str = "") -> tuple[Any, dict[str, Any]]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that spin while they wait would slow whoever takes turns with this.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if folder:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
        if report.library is not None:
            options.register_custom_ops_library(str(report.library))
        made = onnxruntime.InferenceSession(
            str(report.path), options, providers=["CPUExecutionProvider"]
        )
        names = [given.name for given in made.get_inputs()]
        return made, dict(zip(names, arrays, strict=True))

    held, given = session()

    def kernels() -> Kernels:
        with tempfile.TemporaryDirectory() as folder:
            watched, same = session(folder)
            watched.run(None, same)
            events = json.loads(Path(watched.end_profiling()).read_text())
        ran = [e for e in events if e.get("name", "").endswith("_kernel_time")]
        sparse = [
            e["name"].removesuffix("_kernel_time")
            for e in ran
            if e["args"].get("op_name", "").startswith(("Sparse", "Bitmask"))
        ]
        return Kernels(sparse, len(ran), "ONNX Runtime")

    return LoadedFile(lambda: held.run(None, given), kernels)


def _pt2(report: ExportReport, call: Call) -> LoadedFile:
    from torchprune.export.pt2 import load_pt2

    module = load_pt2(report.path).module()
    return _in_torch(report, call, module, torch.no_grad)


def _compiled(report: ExportReport, call: Call) -> LoadedFile:
    package = torch._inductor.aoti_load_package(str(report.path))
    return _in_torch(report, call, package, torch.inference_mode)


def _in_torch(
    report: ExportReport, call: Call, module: Callable[..., object], mode: Callable[[], Any]
) -> LoadedFile:
    """What torch runs, and whose packed products its profiler counts."""
    sample = call.samples[0]

    def run() -> object:
        with mode():
            return module(*sample.args, **sample.kwargs)

    def kernels() -> Kernels:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as found:
            run()
        names = [event.name for event in found.events() or [] if "::" in event.name]
        return Kernels(report.packed[: names.count(_PACKED)], len(names), "torch's profiler")

    return LoadedFile(run, kernels)


_PACKED = "torchprune::bitmask_linear"


def _openvino(report: ExportReport, call: Call) -> LoadedFile:
    import openvino

    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        **SPARSE,
    }
    compiled = openvino.Core().compile_model(str(report.path), "CPU", hints)
    arrays = [t.detach().cpu().numpy() for t in call.samples[0].tensors]

    def kernels() -> Kernels:
        measured = {**hints, "PERF_COUNT": True}
        watched = openvino.Core().compile_model(str(report.path), "CPU", measured)
        request = watched.create_infer_request()
        request.infer(arrays)
        ran = [one for one in request.profiling_info if one.status == one.Status.EXECUTED]
        sparse = [one.node_name for one in ran if "sparse" in one.exec_type.lower()]
        return Kernels(sparse, len(ran), "OpenVINO")

    return LoadedFile(lambda: compiled(arrays), kernels)


def _executorch(report: ExportReport, call: Call) -> LoadedFile:
    from executorch.runtime import Runtime, Verification

    program = Runtime.get().load_program(report.path, verification=Verification.Minimal)
    method = program.load_method("forward")
    given = [t.contiguous() for t in call.samples[0].tensors]
    return LoadedFile(lambda: (program, method.execute(given)), None)


def _litert(report: ExportReport, call: Call) -> LoadedFile:
    from torchprune.export.litert_model import inputs_of, opened

    runner = opened(report.path)
    given = inputs_of(runner, call, call.samples[0])
    return LoadedFile(lambda: runner(**given), None)
