"""ONNX: masks folded, zeros packed away in the file, and what the runtime computes compared."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchprune.errors import ExportError
from torchprune.export.bfloat16 import said_of
from torchprune.export.call import Call, Sample, file_bytes, folder_of, prepare
from torchprune.export.encoder_decoder import (
    FIRST,
    MERGED,
    NEXT,
    SWITCH,
    is_encoder_decoder,
    prepare_three,
)
from torchprune.export.judged import check, holding
from torchprune.export.onnx_graph import (
    EXTERNAL,
    allowed_of,
    check_inputs,
    data_of,
    graph_bytes,
    graph_of,
    require_onnx,
    save_graph,
    weights_bytes,
)
from torchprune.export.promises import reason_of
from torchprune.export.written import WEIGHTS, ExportReport, together
from torchprune.lowering.kernels.build import is_library

_BRINGS = "Sparsity makes the file smaller; the runtime unpacks it and runs at dense speed."
_INT8 = " int8 is what is faster; it rounds activations too, so measure what it costs."
_KERNELS = (
    "Products read their weights packed, by operators of ours that are in the library beside the "
    "file: smaller, there and in memory, and for few rows of input faster."
)
_NO_KERNELS = "No product is sparse enough to be packed, so there is no library beside the file."
_KERNELS_INT8 = " Nonzeros are rounded to eight bits, activations are not: measure what it costs."
_REGISTER = "SessionOptions.register_custom_ops_library in Python, its like in C, C++, C# and Java"

FORMS = (*WEIGHTS, "kernels")
"""How an ONNX file may hold sparse weights."""


def to_onnx(
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
    merged: bool = True,
) -> ExportReport:
    """Write a model as ONNX, with its masks folded, and compare ONNX Runtime with torch.

    With `weights="packed"` a half-sparse weight takes 0.53 (float32) or 0.56 (float16) of its dense
    bytes in the file; one that would not be smaller so stays dense. Stock operators unpack it when
    a session loads; from then on it is the dense model: same outputs, speed and memory.

    With `weights="kernels"` linear layers multiply by their packed weights, as lowered ones do (see
    `torchprune.lower`): the session holds no more than the file, and decoding is faster. Layers
    that are lowered stay so, int8 too. The operators are in a library that is written beside the
    file, NAME.onnxruntime.so, for processors of this machine's kind and ONNX Runtime from 1.18 on:
    `options.register_custom_ops_library("NAME.onnxruntime.so")` before a session is made. Neither
    torch nor torchprune is needed there. It is native code: load only what you trust.

    A bfloat16 model computes in float32, which has every bfloat16 number: inputs, outputs and
    caches too. Its weights are stored in bfloat16, in half of float32's bytes (packed, 0.56 of
    that), and the runtime widens them when a session loads: the very same numbers, to the bit. The
    graph is compared with the model in float32.

    Args:
        model: masked, folded, lowered or dense; float32, bfloat16 or both, or float16. It is not
            changed.
        path: of the file, replaced if it exists, whole or not at all. A model whose initialisers
            exceed a gigabyte has them in a second file, `path` with `.data` added.
        example_inputs: a tensor or tuple (positional) or a mapping (keywords); those of a bfloat16
            model may be of it.
        weights: "packed", "kernels", or "dense" for zeros as they are.
        with_cache: for decoder-only language models of transformers: the graph takes `input_ids`,
            `attention_mask` (past and present), what else `generate` gives the model (mostly
            `position_ids` of the new tokens, which do not count padding), and
            `past_key_values.N.key` and `.value` of shape (batch, heads, past, size), and gives
            `logits` and `present.N.key` and `.value`. The example is then `input_ids`.
            For encoder-decoders (T5, BART, Whisper) `path` is a folder, and the example has what
            the encoder reads. It gets `encoder_model.onnx` and `decoder_model_merged.onnx`, with
            the names that optimum and transformers.js give their inputs and outputs,
            `past_key_values.N.decoder.key` and so on; see `merged`. Decoders of another form that
            an earlier export left there are removed.
        dynamic_shapes: as for `torch.export.export`; by default the first size of every input
            varies, and the second of integer ones (tokens), where the model runs at other sizes.
            Inputs equally long in the example stay so, unless the model runs only otherwise. With
            a cache, for (input_ids, attention_mask, [past, ...]).
        min_sparsity: weights with a smaller share of zeros stay dense.
        int8: quantize products by ONNX Runtime's own quantizer (not of float16 models): int8
            weights with a scale for every output, zeros still zero, and activations rounded to
            eight bits as they come. Faster on CPUs with VNNI. How far outputs then differ is the
            model's affair: it is reported, not judged, so measure what matters to you. With
            `weights="kernels"` the nonzeros of sparse layers are rounded instead, as by
            `lower(dtype=torch.int8)`, and activations stay as they are.
        int8_ignore: globs over names of weights that stay float32, such as "*.down_proj.*", whose
            inputs have outliers in many language models.
        merged: an encoder-decoder's decoder as one graph, in which `use_cache_branch` says whether
            there is a past; else as `decoder_model.onnx` for the first tokens, and
            `decoder_with_past_model.onnx` for all others, for runtimes without branches. Both hold
            the decoder's weights then.

    Returns:
        sizes, names and differences, and which sizes of the inputs are fixed; print it. Of several
        graphs the sums, with a report of each in `parts`. Outputs
        are named as the model names them: by keys and fields; "output", or "output.0" and so on,
        where it does not.

    Raises:
        MissingExtraError: the extra "onnx" is absent.
        ExportError: a dtype that ONNX Runtime does not compute with, a model that torch cannot
            export (with its reason), kernels without a compiler to make them, or a graph that
            computes otherwise, be it at other sizes that `dynamic_shapes` asks for. No file is
            left then.
    """
    if int8_ignore and not int8:
        raise ExportError("int8_ignore is for int8=True")
    if weights not in FORMS:
        raise ExportError(f"weights must be {', '.join(map(repr, FORMS))}, got {weights!r}")
    require_onnx("torchprune.export.to_onnx")
    target = Path(path)
    how = Form(weights, min_sparsity, int8, tuple(int8_ignore))
    if with_cache and is_encoder_decoder(model):
        return _write_parts(model, target, example_inputs, dynamic_shapes, how, merged)
    call = prepare(
        model,
        example_inputs,
        with_cache=with_cache,
        dynamic_shapes=dynamic_shapes,
        vary=True,
        packed=how.keeps_lowered,
        accept=how.accept,
        wide=True,
    )
    return holding(call, lambda call: write_onnx(call, target, how))


@dataclass(frozen=True)
class Form:
    """How a graph holds its weights; see `to_onnx`."""

    weights: str = "packed"
    min_sparsity: float = 0.25
    int8: bool = False
    int8_ignore: tuple[str, ...] = ()

    @property
    def kernels(self) -> bool:
        """Whether operators of ours read them."""
        return self.weights == "kernels"

    @property
    def keeps_lowered(self) -> bool:
        """Whether layers that are lowered stay so."""
        return self.kernels and not self.int8

    def accept(self, plain: nn.Module) -> float:
        """The difference allowed to a model; raises what `allowed_of` does."""
        return allowed_of(plain, self.int8 and not self.kernels)


def _write_parts(
    model: nn.Module,
    target: Path,
    example: Any,
    dynamic_shapes: Any,
    how: Form,
    merged: bool,
) -> ExportReport:
    """The graphs of an encoder-decoder, in a folder; all or none."""
    if dynamic_shapes is not None:
        raise ExportError("with_cache: an encoder-decoder's sizes are found, not given")
    if target.is_file():
        raise ExportError(f"{target} is a file; an encoder-decoder's graphs go to a folder")
    calls = prepare_three(model, example, how.accept, packed=how.keeps_lowered)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as home:
        two = [calls.pop(FIRST), calls.pop(NEXT)] if merged else None
        parts = {
            name: write_onnx(call, Path(home) / f"{name}.onnx", how) for name, call in calls.items()
        }
        if two is not None:
            parts[MERGED] = _write_merged(two[0], two[1], Path(home) / f"{MERGED}.onnx", how)
        target.mkdir(exist_ok=True)
        moved = {}
        for name, part in parts.items():
            moved[name] = _moved(part, target)
        for name in {FIRST, NEXT, MERGED} - moved.keys():  # readers would take these of before
            old = target / f"{name}.onnx"
            _remove(data_of(old), library_of(old), old)
    return together(target, moved)


def library_of(graph: Path) -> Path:
    """The file beside a graph that holds operators of ours, if it needs any."""
    return graph.with_name(f"{graph.stem}.onnxruntime.so")


def _moved(report: ExportReport, folder: Path) -> ExportReport:
    """What was written, in its place, without what was beside a file of before."""
    target = folder / report.path.name
    stale = data_of(target) if report.data is None else None
    files = [report.data, report.library, report.path]
    places = [None if file is None else folder / file.name for file in files]
    for file, place in zip(files, places, strict=True):
        if file is not None and place is not None:
            file.replace(place)
    _remove(stale, library_of(target) if report.library is None else None)
    return replace(report, path=target, data=places[0], library=places[1])


def _remove(data: Path | None, library: Path | None, graph: Path | None = None) -> None:
    """Remove files of an earlier graph, as far as they are there and ours."""
    for file in (data, graph):
        if file is not None:
            file.unlink(missing_ok=True)
    if library is not None and is_library(library):
        library.unlink()


def write_onnx(call: Call, target: Path, how: Form) -> ExportReport:
    """Write a call; see `to_onnx`."""
    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home:
        graph, sizes, judged = _graph_of(call, Path(home), how)
        made = _Made(graph, sizes, how, [(judged, _run)], [call], call.note)
        return _moved(_finish(made, Path(home) / target.name), target.parent)


def _write_merged(first: Call, after: Call, target: Path, how: Form) -> ExportReport:
    """Write a decoder's two kinds of steps as one graph."""
    from torchprune.export.merged_decoder import merge, same_letters

    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home:
        graphs, sizes, judged = zip(
            *(_graph_of(call, Path(home), how) for call in (first, after)), strict=True
        )
        runs = [partial(_run_branch, False), partial(_run_branch, True)]
        checks = list(zip(judged, runs, strict=True))
        made = _Made(merge(*graphs), same_letters(*sizes), how, checks, [first, after])
        return _moved(_finish(made, Path(home) / target.name), target.parent)


@dataclass(frozen=True)
class _Made:
    """A graph, and what is told of it.

    Attributes:
        sizes: what a report says of sizes.
        checks: calls that it must compute as torch does, and how it is run for each.
        asked: the same calls of the model that was given, before anything was rounded.
    """

    graph: Any
    sizes: dict[str, Any]
    how: Form
    checks: list[tuple[Call, Callable[[Any, Call, Sample], list[Tensor]]]]
    asked: list[Call]
    note: str = ""


def _graph_of(call: Call, home: Path, how: Form) -> tuple[Any, dict[str, Any], Call]:
    """A call's graph, what a report says of its sizes, and what it is judged by."""
    if how.kernels:
        from torchprune.export.onnx_kernels import rounded

        judged = rounded(call, how.int8_ignore, how.min_sparsity) if how.int8 else call
        return *graph_of(judged, kernels=how.min_sparsity), judged
    graph, sizes = graph_of(call)
    if how.int8:
        from torchprune.export.int8 import quantize

        graph = quantize(graph, home, how.int8_ignore, weights_bytes(graph) > EXTERNAL)
    return graph, sizes, call


def _finish(made: _Made, written: Path) -> ExportReport:
    """Pack, save, run and compare a graph.

    Args:
        written: its file, with nothing beside it yet.
    """
    from torchprune.export.narrow_weights import narrow_initializers
    from torchprune.export.onnx_kernels import copy_library, narrow_values, packed_products
    from torchprune.export.packing_pass import pack_initializers

    graph, how = made.graph, made.how
    widened = any(call.widened for call in made.asked)
    if widened:
        narrow_values(graph.graph)
        narrow_initializers(graph)
    packed = packed_products(graph.graph) if how.kernels else []
    saved = sum(p.before - p.after for p in packed)
    library = copy_library(library_of(written)) if packed else None
    if how.weights != "dense":
        dense = graph_bytes(graph)
        packed += pack_initializers(graph, how.min_sparsity)
        saved += dense - graph_bytes(graph)
    data = save_graph(graph, written)
    seconds, session = _session(written, library)
    inputs = [i.name for i in session.get_inputs()]
    found, rounds = [], how.int8 and not how.kernels
    for (call, compute), asked in zip(made.checks, made.asked, strict=True):
        if len(made.checks) == 1:
            check_inputs(inputs, call)

        def outputs(sample: Sample, call: Call = call, compute: Any = compute) -> list[Tensor]:
            found: list[Tensor] = compute(session, call, sample)
            return found

        allowed = float("inf") if rounds else allowed_of(call.module)
        differs = check(call, "ONNX Runtime", outputs, allowed)
        if asked is not call:
            differs = check(asked, "ONNX Runtime", outputs, float("inf"))
        found.append(differs)
    files = [f for f in (data, written, library) if f is not None]
    total = file_bytes(*files)
    own = total - (0 if library is None else file_bytes(library))
    if how.kernels:
        brings = _KERNELS + (_KERNELS_INT8 if how.int8 else "") if library else _NO_KERNELS
    else:
        brings = _BRINGS + (_INT8 if how.int8 else "")
    return ExportReport(
        path=written,
        data=data,
        runtime="ONNX Runtime",
        bytes=total,
        dense_bytes=own + saved,
        packed=[p.name for p in packed],
        difference=max(difference for difference, _ in found),
        relative=max(relative for _, relative in found),
        load_seconds=seconds,
        brings=brings + said_of(widened, rounds),
        inputs=inputs,
        outputs=[o.name for o in session.get_outputs()],
        **made.sizes,
        note=made.note,
        library=library,
        loading="" if library is None else _REGISTER,
    )


def _session(path: Path, library: Path | None) -> tuple[float, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    start = time.perf_counter()
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run this graph: {reason_of(error)}") from error
    return time.perf_counter() - start, made


def _run(session: Any, _: Call, sample: Sample) -> list[Tensor]:
    names = [i.name for i in session.get_inputs()]
    arrays = [t.detach().cpu().numpy() for t in sample.tensors]
    return _outputs(session, None, dict(zip(names, arrays, strict=True)))


def _run_branch(past: bool, session: Any, call: Call, sample: Sample) -> list[Tensor]:
    """One of a merged decoder's steps; what only the other reads is ones of any size."""
    given = {SWITCH: np.array([past])}
    for value in session.get_inputs():
        if value.name != SWITCH:
            dtype = np.float32 if value.type == "tensor(float)" else np.float16
            shape = [size if isinstance(size, int) else 1 for size in value.shape]
            given[value.name] = np.ones(shape, np.int64 if "int" in value.type else dtype)
    names, outputs = call.names
    arrays = [t.detach().cpu().numpy() for t in sample.tensors]
    return _outputs(session, outputs, given | dict(zip(names or [], arrays, strict=True)))


def _outputs(session: Any, names: list[str] | None, given: dict[str, Any]) -> list[Tensor]:
    return [torch.from_numpy(y) for y in session.run(names, given)]
