"""Core ML: masks folded, pruned weights as a bit mask and nonzeros, which its runtime reads."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchprune.checkpoint.whole_files import staged
from torchprune.errors import CheckpointError, ExportError, MissingExtraError
from torchprune.export.call import Call, prepare
from torchprune.export.coreml_bridge import LEFT_OUT, Bridged, bridge
from torchprune.export.coreml_file import read_package
from torchprune.export.coreml_sparse import check_weights, chosen, fingerprints, make_sparse, pays
from torchprune.export.coreml_state import with_state
from torchprune.export.judged import check, dtype_of, told
from torchprune.export.mil_run import MILRun
from torchprune.export.promises import reason_of
from torchprune.export.pt2 import exported
from torchprune.export.written import WEIGHTS, ExportReport, input_values

_ALLOWED = {torch.float32: 1e-3, torch.float16: 3e-2}
"""Difference from torch, relative to the largest output, beyond which a program is wrong."""

_RUNTIME = "its own steps, run here without Core ML,"

_BRINGS = {
    "packed": "Core ML keeps sparse weights as a bit mask and nonzeros, on disk and as it loads "
    "them, and has fast paths for them on Apple's processors; how fast is to be measured there.",
    "dense": "The zeros are stored and multiplied like all numbers: neither smaller nor faster.",
}

_SYSTEMS = (16, 17, 18)
_WIDE = 18
"""The iOS that first read sparse int8 weights, and states."""


@dataclass(frozen=True)
class _How:
    """What a package is to be."""

    packed: bool
    min_sparsity: float
    int8: bool
    ignore: Sequence[str]
    ios: int
    allowed: float


def to_coreml(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    weights: str = "packed",
    with_cache: bool = False,
    dynamic_shapes: Any = None,
    min_sparsity: float = 0.25,
    int8: bool = False,
    int8_ignore: Sequence[str] = (),
    state: int | None = None,
    ios: int | None = None,
) -> ExportReport:
    """Write a model as a Core ML package with its pruned weights in Core ML's sparse form.

    Every weight with enough zeros becomes `constexpr_sparse_to_dense`: one bit a weight and the
    values that are not zero, however small. A half-sparse weight takes 0.53 (float32) or 0.56
    (float16) of its dense bytes. With `int8` its nonzeros are rounded to eight bits, with a scale
    for every output: 0.31 of dense float16.

    Core ML runs on Apple's systems alone, and nowhere is it run here. In its place the package is
    read back from its bytes. Its weights are compared with the model's, bit by bit (int8: zeros
    exactly, values to half a step), and its program is computed step by step in torch, by Apple's
    description of the operators, each result rounded to its type, and compared with the model.
    What a Mac or a phone then computes, and how fast, is to be measured there.

    Args:
        model: masked, folded, lowered or dense; float32, or float16, which is what Apple's neural
            engine computes in. It is not changed.
        path: of the package, a directory ending in ".mlpackage"; an earlier one is replaced, whole
            or not at all.
        example_inputs: as for `to_onnx`. Integers become int32, and float16 models take and give
            float16.
        weights: "packed", or "dense" for zeros as they are.
        with_cache: as for `to_onnx`; the past is then as long as in the example, unless
            `dynamic_shapes` bounds it.
        dynamic_shapes: as for `torch.export.export`, every size that varies with a `max`, which
            Core ML demands; by default all sizes are the example's.
        min_sparsity: weights with a smaller share of zeros stay dense, and so do those that the
            sparse form would make larger.
        int8: round the nonzeros of sparse weights to int8. How far outputs then differ is the
            model's affair: it is reported, not judged.
        int8_ignore: globs over names of weights that stay floating point.
        state: with `with_cache`, keep the past inside the program, as Core ML's state: so many
            tokens of it, float16, the oldest of which make room for new ones. The program then
            takes steps of as many rows and tokens as the example has, an `attention_mask` of
            (batch, state + new), zero on the left for what is not filled yet, and what else
            `generate` gives the model.
        ios: the oldest iOS that is to read it, 16, 17 or 18 (macOS 13, 14, 15); by default 16, and
            18 where int8 or state needs it.

    Returns:
        sizes, names and differences; print it.

    Raises:
        MissingExtraError: the extra "coreml" is absent.
        ExportError: a dtype it does not take, a model that torch or coremltools cannot convert
            (with the reason), operators whose results cannot be computed here, weights that are not
            in the file as they were, or a program that computes otherwise. Nothing is left then.
    """
    target = Path(path)
    if weights not in WEIGHTS:
        raise ExportError(f"weights must be {' or '.join(map(repr, WEIGHTS))}, got {weights!r}")
    if target.suffix != ".mlpackage":
        raise ExportError(f"Core ML's packages are .mlpackage directories, got {target.name}")
    if int8_ignore and not int8:
        raise ExportError("int8_ignore is for int8=True")
    if int8 and weights != "packed":
        raise ExportError('int8 is for weights="packed": what is rounded are the nonzeros')
    if state is not None and (not with_cache or dynamic_shapes is not None):
        raise ExportError("state is for with_cache=True, with all sizes fixed")
    system = _system(ios, "sparse int8 weights" * int8 or "state" * (state is not None))
    _require()
    call = prepare(
        model,
        example_inputs,
        with_cache=with_cache,
        dynamic_shapes=dynamic_shapes,
        vary=False,
        accept=_allowed_of,
    )
    allowed = float("inf") if int8 else _allowed_of(call.module)
    if state is not None:
        call, allowed = with_state(call, state), max(allowed, _ALLOWED[torch.float16])
    how = _How(weights == "packed", min_sparsity, int8, int8_ignore, system, allowed)
    try:
        with staged(target, _is_package, "a Core ML package") as partial:
            return _write(call, partial, target, how)
    except CheckpointError as error:
        raise ExportError(str(error)) from error


def _write(call: Call, partial: Path, target: Path, how: _How) -> ExportReport:
    dtype = dtype_of(call.module, tuple(_ALLOWED), "to_coreml")
    program = exported(_in_float32(call))
    sizes = told(program, call)
    _check_bounds(sizes)
    bridged = bridge(program)
    arrays = _weights_of(bridged, dtype)
    rounded: list[str] = []
    if how.int8:
        rounded = chosen([n for n, w in arrays if pays(w, how.min_sparsity, True)], how.ignore)
    made = _converted(bridged, dtype, how.ios, call.names[0], _outputs(call, program))
    saved = 0
    if how.packed:
        wanted = {key: n in rounded for n, w in arrays for key in fingerprints(w)}
        saved = make_sparse(made, how.min_sparsity, wanted, how.ios >= _WIDE)
    _save(made, partial, how.ios)
    read = read_package(partial)
    packed = []
    if how.packed:
        packed = check_weights(read, arrays, how.min_sparsity, rounded)
    start = time.perf_counter()
    run = MILRun(read)
    seconds = time.perf_counter() - start
    difference, relative = check(call, "the Core ML program", lambda s: run(s.tensors), how.allowed)
    total = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    return ExportReport(
        path=target,
        data=None,
        runtime=_RUNTIME,
        bytes=total,
        dense_bytes=total + saved,
        packed=packed,
        difference=difference,
        relative=relative,
        load_seconds=seconds,
        brings=_BRINGS["packed" if how.packed else "dense"],
        inputs=list(read.inputs),
        outputs=read.outputs,
        **sizes,
    )


def _system(ios: int | None, needs: str) -> int:
    least = _WIDE if needs else _SYSTEMS[0]
    if ios is None:
        return least
    if ios not in _SYSTEMS:
        raise ExportError(f"ios must be one of {', '.join(map(str, _SYSTEMS))}, got {ios!r}")
    if ios < least:
        raise ExportError(f"iOS {ios} knows no {needs}: ios={least} does")
    return ios


def _check_bounds(sizes: dict[str, Any]) -> None:
    letters = {size for some in sizes["sizes"].values() for size in some if isinstance(size, str)}
    for letter in sorted(letters):
        if sizes["bounds"].get(letter, (0, None))[1] is None:
            raise ExportError(
                f"Core ML wants sizes that are fixed or have a max, and {letter} has no greatest "
                f"value in {sizes['sizes']}: Dim(name, max=...)"
            )


def _require() -> None:
    try:
        with _quiet():
            import coremltools  # noqa: F401
    except ImportError:
        raise MissingExtraError("coremltools", "coreml", "torchprune.export.to_coreml") from None


def _allowed_of(model: nn.Module) -> float:
    return _ALLOWED[dtype_of(model, tuple(_ALLOWED), "to_coreml")]


def _is_package(directory: Path) -> bool:
    return (directory / "Manifest.json").is_file() and (directory / "Data").is_dir()


def _in_float32(call: Call) -> Call:
    """The same call of a float32 copy: what coremltools knows to convert, to any precision."""
    if dtype_of(call.module, tuple(_ALLOWED), "to_coreml") is torch.float32:
        return call
    half = lambda t: t.is_floating_point()  # noqa: E731
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.float() if half(t) else t, (call.args, call.kwargs)
    )
    return replace(call, module=copy.deepcopy(call.module).float(), args=args, kwargs=kwargs)


def _weights_of(bridged: Bridged, dtype: torch.dtype) -> list[tuple[str, Any]]:
    """The parameters that the program multiplies by, in the type that it computes in."""
    named = [(name, bridged.weights[node]) for node, name in bridged.names.items()]
    return [(n, w.to(dtype).numpy()) for n, w in named if w.dim() > 1 and w.is_floating_point()]


def _outputs(call: Call, program: Any) -> list[str]:
    """Names of the outputs: the cache's, or those that the model's own result has."""
    if call.names[1] is not None:
        return call.names[1]
    tree = program.call_spec.out_spec
    numbered = pytree.tree_unflatten(list(range(tree.num_leaves)), tree)
    paths = [path for path, _ in pytree.tree_flatten_with_path(numbered)[0]]
    keys = ["_".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in p) for p in paths]
    return [k if k and not k[0].isdigit() else "output" + f"_{k}" * bool(k) for k in keys]


def _converted(
    bridged: Bridged, dtype: torch.dtype, ios: int, inputs: list[str] | None, outputs: list[str]
) -> Any:
    """The program as coremltools' own, before it is written."""
    import coremltools as ct

    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes(set(LEFT_OUT))
    half = dtype is torch.float16
    values = input_values(bridged.program)
    names = inputs or list(bridged.program.graph_signature.user_inputs)
    floating: Any = np.float16 if half else np.float32
    with _quiet(), _reasons("coremltools could not convert this model"):
        return ct.convert(
            bridged.program,
            convert_to="milinternal",
            minimum_deployment_target=getattr(ct.target, f"iOS{ios}"),
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            pass_pipeline=pipeline,
            inputs=[
                ct.TensorType(_plain(n), dtype=floating if v.is_floating_point() else np.int32)
                for n, v in zip(names, values, strict=True)
            ],
            outputs=[ct.TensorType(_plain(name)) for name in outputs],
        )


def _plain(name: str) -> str:
    """A name that Core ML takes."""
    return re.sub(r"\W", "_", name)


def _save(made: Any, partial: Path, ios: int) -> None:
    import coremltools as ct

    home = partial / "made.mlpackage"
    with _quiet(), _reasons("coremltools could not write this model"):
        ct.convert(
            made,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, f"iOS{ios}"),
            pass_pipeline=ct.PassPipeline.EMPTY,
            package_dir=str(home),
            skip_model_load=True,
        )
    for part in list(home.iterdir()):
        part.rename(partial / part.name)
    home.rmdir()


@contextlib.contextmanager
def _reasons(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ExportError(f"{what}: {reason_of(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without coremltools' bars, and what it says of versions it was not tested with."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
