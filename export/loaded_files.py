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
from torchprune.export.call import Call, prepare, promised
from torchprune.export.written import ExportReport


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


def example_of(model: Any, example_inputs: Any, *, with_cache: bool) -> Call:
    """One call of a model as its exports take it."""
    return prepare(model, example_inputs, with_cache=with_cache, dynamic_shapes=None, vary=False)


def loaded_file(report: ExportReport, call: Call) -> LoadedFile:
    """A file that `torchprune.export.to_*` just wrote, in its runtime.

    Raises:
        ExportError: no runtime here runs it, with the reason.
    """
    known = {
        ".onnx": _onnx,
        ".pt2": _pt2,
        ".xml": _openvino,
        ".pte": _executorch,
        ".tflite": _litert,
    }
    path = report.path
    if report.runtime == COMPILED:
        with promised(f"{path.name} cannot be loaded"):
            return _compiled(report, call)
    if path.suffix == ".mlpackage":
        raise ExportError("Core ML runs on Apple's systems alone")
    if path.suffix not in known:
        raise ExportError(f"no runtime is known that runs {path.name}")
    with promised(f"{path.name} cannot be loaded"):
        return known[path.suffix](path, call)


def _onnx(path: Path, call: Call) -> LoadedFile:
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
        made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
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
            if e["args"].get("op_name", "").startswith("Sparse")
        ]
        return Kernels(sparse, len(ran), "ONNX Runtime")

    return LoadedFile(lambda: held.run(None, given), kernels)


def _pt2(path: Path, call: Call) -> LoadedFile:
    from torchprune.export.pt2 import load_pt2

    program = load_pt2(path)
    module = program.module()

    def run() -> object:
        with torch.no_grad():
            return module(*call.samples[0].args, **call.samples[0].kwargs)

    def kernels() -> Kernels:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as found:
            run()
        events = found.events() or []
        names = [event.name for event in events if "::" in event.name]
        ours = sum(name == _PACKED for name in names)
        layers = [
            str(node.args[1]).removesuffix("_bits").removeprefix("p_").removeprefix("b_")
            for node in program.graph.nodes
            if str(node.target).startswith(_PACKED.replace("::", "."))
        ]
        return Kernels(layers[:ours], len(names), "torch's profiler")

    return LoadedFile(run, kernels)


_PACKED = "torchprune::bitmask_linear"


def _compiled(report: ExportReport, call: Call) -> LoadedFile:
    package = torch._inductor.aoti_load_package(str(report.path))
    sample = call.samples[0]

    def run() -> object:
        with torch.inference_mode():
            return package(*sample.args, **sample.kwargs)

    def kernels() -> Kernels:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as found:
            run()
        names = [event.name for event in found.events() or [] if "::" in event.name]
        ours = sum(name == _PACKED for name in names)
        return Kernels(report.packed[:ours], len(names), "torch's profiler")

    return LoadedFile(run, kernels)


def _openvino(path: Path, call: Call) -> LoadedFile:
    import openvino

    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", hints)
    arrays = [t.detach().cpu().numpy() for t in call.samples[0].tensors]

    def kernels() -> Kernels:
        watched = openvino.Core().compile_model(str(path), "CPU", {**hints, "PERF_COUNT": True})
        request = watched.create_infer_request()
        request.infer(arrays)
        ran = [one for one in request.profiling_info if one.status == one.Status.EXECUTED]
        sparse = [one.node_name for one in ran if "sparse" in one.exec_type.lower()]
        return Kernels(sparse, len(ran), "OpenVINO")

    return LoadedFile(lambda: compiled(arrays), kernels)


def _executorch(path: Path, call: Call) -> LoadedFile:
    from executorch.runtime import Runtime, Verification

    program = Runtime.get().load_program(path, verification=Verification.Minimal)
    method = program.load_method("forward")
    given = [t.contiguous() for t in call.samples[0].tensors]
    return LoadedFile(lambda: (program, method.execute(given)), None)


def _litert(path: Path, call: Call) -> LoadedFile:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=torch.get_num_threads())
    runner = interpreter.get_signature_runner()
    dtypes = {name: entry["dtype"] for name, entry in runner.get_input_details().items()}
    named = zip(call.inputs, call.samples[0].tensors, strict=True)
    given = {n: t.detach().cpu().numpy().astype(dtypes[n]) for n, t in named if n in dtypes}
    return LoadedFile(lambda: runner(**given), None)
