"""torch's own archive of an exported program, `.pt2`, without a pickle in it."""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchprune import passes
from torchprune.errors import CheckpointError, ExportError, LoweringError
from torchprune.export.call import Call, file_bytes, folder_of, prepare, run
from torchprune.export.judged import admit, check, holding, told
from torchprune.export.promises import SizesError, promised, reason_of
from torchprune.export.rounding import rounding_of
from torchprune.export.written import WEIGHTS, ExportReport
from torchprune.lowering.modules import BitmaskLinear
from torchprune.passes.pack_linears import check_packed

_ALLOWED = 3e-2
"""Largest difference from torch, relative to the largest output, beyond which a program is wrong.

Half-precision products that are packed sum in another order; dense ones are equal."""

_ENTRIES = 2500
"""About what an archive holds of a packed weight beside its numbers, more than of a dense one."""

_BRINGS = {
    "packed": "Linear layers read their weights packed: smaller and, for few rows of input on a "
    "CPU, faster. Whoever loads the file must have imported torchprune before.",
    "dense": "The zeros are stored and multiplied like all numbers: neither smaller nor faster.",
}


def to_pt2(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    weights: str = "packed",
    with_cache: bool = False,
    dynamic_shapes: Any = None,
    min_sparsity: float = 0.25,
) -> ExportReport:
    """Write a model as a `torch.export` archive with its masks folded, load it, and compare.

    With `weights="packed"` linear layers with enough zeros become `torchprune::bitmask_linear` (see
    `torchprune.passes.pack_linears`): the file is smaller, and decoding on a CPU faster. Such a
    file needs `import torchprune` before `torch.export.load`. Layers that are lowered stay so. No
    example inputs are stored, so that the archive holds JSON and plain bytes and nothing that
    loading would have to unpickle.

    Args:
        model: masked, folded, lowered or dense, of any dtype. It is not changed.
        path: of the file, ending in ".pt2"; replaced if it exists, whole or not at all.
        example_inputs, with_cache, dynamic_shapes: as for `to_onnx`.
        weights: "packed", or "dense".
        min_sparsity: weights with a smaller share of zeros stay dense.

    Returns:
        sizes and differences; print it.

    Raises:
        ExportError: a model that torch cannot export (with its reason), or a program that computes
            otherwise. No file is left then.
    """
    target = check_choices(path, weights)
    call = prepare(
        model,
        example_inputs,
        with_cache=with_cache,
        dynamic_shapes=dynamic_shapes,
        vary=True,
        packed=weights == "packed",
    )
    return holding(call, lambda call: _write(call, target, weights, min_sparsity))


def check_choices(path: str | os.PathLike[str], weights: str) -> Path:
    """The path of a file to write.

    Raises:
        ExportError: another ending, or unknown weights.
    """
    if weights not in WEIGHTS:
        raise ExportError(f"weights must be {' or '.join(map(repr, WEIGHTS))}, got {weights!r}")
    target = Path(path)
    if target.suffix != ".pt2":
        raise ExportError(f"torch loads such files only if they end in .pt2, got {target.name}")
    return target


def _write(call: Call, target: Path, weights: str, min_sparsity: float) -> ExportReport:
    program = exported(call)
    check_plain(program)
    sizes = told(program, call)
    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export's own making
        program, packed, saved = slim(program, call.module, weights, min_sparsity, _ENTRIES)
        program.example_inputs = None
        partial = Path(home) / target.name
        with promised("torch cannot write this program"):
            torch.export.save(program, partial)
        start = time.perf_counter()
        loaded = load_pt2(partial)
        seconds = time.perf_counter() - start
        module = loaded.module()
        difference, relative = check(
            call,
            "the loaded program",
            lambda s: run(module, s.args, s.kwargs),
            _ALLOWED,
            rounding_of(call),
        )
        total = file_bytes(partial)
        partial.replace(target)
    return ExportReport(
        path=target,
        data=None,
        runtime="the loaded program",
        bytes=total,
        dense_bytes=total + saved,
        packed=packed,
        difference=difference,
        relative=relative,
        load_seconds=seconds,
        brings=_BRINGS[weights],
        **sizes,
        note=call.note,
    )


def load_pt2(path: str | os.PathLike[str]) -> ExportedProgram:
    """`torch.export.load`, but never of an archive in which anything is pickled.

    torch unpickles whatever an archive says is pickled, which runs code of the file's maker. Files
    of `to_pt2` hold none. Even so load only what you trust: torch also evaluates the expressions
    that an archive gives for its sizes.

    Raises:
        CheckpointError: no such archive, it holds pickled tensors, constants or example inputs, or
            packed weights whose parts contradict each other.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            why = _objection(archive)
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"no archive of torch.export: {error}"
    if why is not None:
        raise CheckpointError(f"{path}: {why}")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise CheckpointError(f"{path}: torch could not load it: {reason_of(error)}") from error
    try:
        check_packed(program)
    except LoweringError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return program


def _objection(archive: zipfile.ZipFile) -> str | None:
    """Why an archive is not to be loaded, or None."""
    names = archive.namelist()
    if len({name.lower() for name in names}) < len(names):  # torch looks without regard to case
        return "it holds two files of one name"
    # torch runs compiled code as it loads what holds it, beside a program too.
    if any("/aotinductor/" in name.lower() for name in names):
        return (
            "it holds compiled code, an AOTInductor package: torch._inductor.aoti_load_package "
            "loads one, and runs what is in it, so load only what you trust"
        )
    # And it reads an older form, with pickles, out of files that are in no folder.
    if any("/" not in name for name in names):
        return "no archive of torch.export: it holds files outside of its folder"
    if not any("/models/" in name for name in names):
        return "no archive of torch.export: it holds no model"
    for name in names:
        if "/sample_inputs/" in name.lower() and archive.getinfo(name).file_size:
            return "its example inputs are pickled"
        if name.lower().endswith("_config.json"):
            for key, entry in json.loads(archive.read(name))["config"].items():
                if entry.get("use_pickle") is not False:
                    return f"{key} is pickled"
    return None


def exported(call: Call) -> ExportedProgram:
    """The program of a call.

    Raises:
        ExportError: torch cannot export the model.
    """
    # Of a view torch notes the tensor behind it, and asks for that of every later input.
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: t.detach().clone(), (call.args, call.kwargs)
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch.export's own making
        try:
            program = torch.export.export(
                call.module, args, kwargs, dynamic_shapes=call.dynamic_shapes
            )
        except Exception as error:
            raise SizesError(f"torch could not export this model: {reason_of(error)}") from error
    admit(program, call)
    return program


def slim(
    program: ExportedProgram,
    module: nn.Module,
    weights: str,
    min_sparsity: float,
    entries: int = 0,
) -> tuple[ExportedProgram, list[str], int]:
    """A program with its sparse weights packed, if they are to be.

    Args:
        module: what was exported; it may hold layers that are lowered.
        entries: bytes that a packed weight takes in the file beside its numbers.

    Returns:
        the program, names of the weights that are packed, and the bytes that this saves.
    """
    packed, saved = [], 0
    for name, layer in module.named_modules():
        if isinstance(layer, BitmaskLinear):
            packed.append(f"{name}.weight")
            saved += layer.in_features * layer.out_features * layer.layer_dtype.itemsize
            saved -= layer.packed.nbytes
    if weights == "packed":
        dense = _bytes_of(program)
        passed = passes.pack_linears(program, min_sparsity=min_sparsity, min_saving=entries + 1)
        program, packed = passed.program, packed + passed.modified
        saved += dense - _bytes_of(program) - len(passed.modified) * entries
    return program, packed, saved


def check_plain(program: ExportedProgram) -> None:
    """
    Raises:
        ExportError: a weight is a tensor of another library's kind.
    """
    for name, tensor in program.state_dict.items():
        if is_traceable_wrapper_subclass(tensor):
            raise ExportError(
                f"{name} is a {type(tensor).__name__}, and torch's archives hold plain tensors: "
                "write the model before it is quantized, or let to_onnx(..., int8=True) do that"
            )


def _bytes_of(program: ExportedProgram) -> int:
    return sum(tensor.nbytes for tensor in program.state_dict.values())
