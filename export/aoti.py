"""AOTInductor: compiled code that Python and C++ load, in a `.pt2`, with our kernels beside it."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from torchprune.errors import ExportError
from torchprune.export.call import Call, file_bytes, folder_of, prepare, prepare_program
from torchprune.export.judged import check, holding, told
from torchprune.export.promises import SizesError, promised, reason_of
from torchprune.export.pt2 import check_choices, check_plain, exported, slim
from torchprune.export.rounding import rounding_of
from torchprune.export.written import ExportReport, tensors_of
from torchprune.lowering.kernels.build import BuildError, is_library, library

_ALLOWED = {torch.float32: 1e-3}
"""Difference from torch, relative to the largest output, beyond which a package is wrong."""

_ALLOWED_HALF = 5e-2
"""The same where some weights are of half precision, which inductor rounds less often."""

_OPTIONS = {
    "cpp.dynamic_threads": True,  # else as many as this process has
    "aot_inductor.check_lowerbound": False,  # where inputs are checked, one row is no mistake
    "aot_inductor.enable_line_tables": False,  # two thirds of a small package
}
"""Of inductor."""

_BRINGS = {
    "packed": "Linear layers read their weights packed: smaller and, for few rows of input on a "
    "CPU, faster.",
    "dense": "The zeros are stored and multiplied like all numbers: neither smaller nor faster.",
}
_NATIVE = (
    " The package is machine code for processors like this one ({}), made by torch {}: load only "
    "what you trust."
)

COMPILED = "the compiled package"
"""What its reports call the runtime."""


def to_aoti(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    weights: str = "packed",
    with_cache: bool = False,
    dynamic_shapes: Any = None,
    min_sparsity: float = 0.25,
) -> ExportReport:
    """Compile a model by AOTInductor into a package with its masks folded, run it, and compare.

    `torch._inductor.aoti_load_package` runs the package in Python, `AOTIModelPackageLoader` in C++
    without Python. With `weights="packed"` its products are those of `to_pt2`, and their operators
    are in a library that is written beside it, NAME.kernels.so. It has to be loaded before the
    package: by `dlopen`, or in Python `torch.ops.load_library`; `import torchprune` will do too.
    Layers that are lowered stay so, int8 too.

    Needs a C++ compiler. Code is made for this processor; `torch._inductor.config.cpp.march` and
    `.simdlen` ask for another. The zip holds compiled code, so load only what you trust.

    Args:
        model: masked, folded, lowered or dense, of any dtype, or a program, as `load_pt2` gives it,
            whose own sizes then vary. It is not changed.
        path: of the file, ending in ".pt2"; replaced if it exists, whole or not at all.
        example_inputs, with_cache, dynamic_shapes: as for `to_onnx`; the last two are a module's.
        weights: "packed", or "dense".
        min_sparsity: weights with a smaller share of zeros stay dense.

    Returns:
        sizes and differences; print it.

    Raises:
        ExportError: a model that torch cannot export or inductor cannot compile (with the reason),
            no compiler, or a package that computes otherwise. No file is left then.
    """
    target = check_choices(path, weights)
    if not isinstance(model, ExportedProgram):
        call = prepare(
            model,
            example_inputs,
            with_cache=with_cache,
            dynamic_shapes=dynamic_shapes,
            vary=True,
            packed=weights == "packed",
        )
        return holding(
            call, lambda call: _write(call, exported(call), target, weights, min_sparsity)
        )
    if with_cache or dynamic_shapes is not None:
        raise ExportError(
            "a program has the inputs and the sizes that it was exported with: give with_cache and "
            "dynamic_shapes to what exports it"
        )
    call = prepare_program(model, example_inputs)
    return _write(call, copy.copy(model), target, weights, min_sparsity)


def _write(
    call: Call, program: ExportedProgram, target: Path, weights: str, min_sparsity: float
) -> ExportReport:
    check_plain(program)
    sizes = told(program, call)
    beside = target.with_name(f"{target.stem}.kernels.so")
    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own making
        program, packed, saved = slim(program, call.module, weights, min_sparsity)
        kernels = _kernels(Path(home) / beside.name) if _uses_kernels(program) else None
        partial = Path(home) / target.name
        program.example_inputs = call.args, call.kwargs
        _compile(program, partial, Path(home) / "parts")
        start = time.perf_counter()
        with promised("AOTInductor cannot load this package"):
            package = torch._inductor.aoti_load_package(str(partial))
        seconds = time.perf_counter() - start
        difference, relative = check(
            call,
            COMPILED,
            lambda sample: tensors_of(package(*sample.args, **sample.kwargs)),
            _allowed(program),
            rounding_of(call),
        )
        own, total = file_bytes(partial), file_bytes(partial, kernels)
        if kernels is not None:
            kernels.replace(beside)
        elif is_library(beside):  # of an older package of this name
            beside.unlink()
        partial.replace(target)
    brings = _BRINGS["dense" if kernels is None else "packed"]
    return ExportReport(
        path=target,
        data=None,
        runtime=COMPILED,
        bytes=total,
        dense_bytes=own + saved,
        packed=packed,
        difference=difference,
        relative=relative,
        load_seconds=seconds,
        brings=brings + _NATIVE.format(_instructions(), torch.__version__),
        **sizes,
        note=call.note,
        library=None if kernels is None else beside,
        loading="in C++; in Python import torchprune will do",
    )


def _compile(program: ExportedProgram, path: Path, parts: Path) -> None:
    """
    Args:
        parts: a directory for what a package is made of, which inductor would keep in its cache.

    Raises:
        ExportError: there is no compiler, or inductor fails.
    """
    from torch._inductor import config

    known = config.get_config_copy()
    options = {name: value for name, value in _OPTIONS.items() if name in known}
    try:
        with torch.no_grad(), config.patch({"aot_inductor.output_path": str(parts)}):
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=options
            )
    except Exception as error:
        kind, why = _failure(getattr(error, "inner_exception", error))
        raise kind(f"{why}; nothing was written") from error


def _failure(error: BaseException) -> tuple[type[ExportError], str]:
    """What inductor failed of, in a line; a SizesError if fixed sizes may help."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if isinstance(error, InvalidCxxCompiler):
        why = f"AOTInductor compiles C++, and found no compiler: {error} (CXX names another)"
        return ExportError, why
    if isinstance(error, CppCompileError):
        lines = error.output.strip().splitlines() or ["it said nothing"]
        said = next((line for line in lines if "error" in line), lines[-1])
        return SizesError, f"the C++ compiler failed: {said}"
    return SizesError, f"AOTInductor could not compile this model: {reason_of(error)}"


def _uses_kernels(program: ExportedProgram) -> bool:
    return any(
        getattr(node.target, "namespace", None) == "torchprune" for node in program.graph.nodes
    )


def _kernels(path: Path) -> Path:
    """
    Raises:
        ExportError: they cannot be compiled.
    """
    try:
        shutil.copyfile(library(), path)
    except BuildError as error:
        raise ExportError(
            f"the kernels of packed weights are needed beside the package: {error}; "
            'weights="dense" needs none'
        ) from error
    return path


def _allowed(program: ExportedProgram) -> float:
    dtypes = {t.dtype for t in program.state_dict.values() if t.is_floating_point()}
    return max((_ALLOWED.get(dtype, _ALLOWED_HALF) for dtype in dtypes), default=_ALLOWED_HALF)


def _instructions() -> str:
    """The instructions that inductor compiles for, in a word or two."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return str(pick_vec_isa()).removeprefix("INVALID_VEC_ISA") or "no vectors"
