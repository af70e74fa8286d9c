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

_BRINGS = "Sparsity makes the file smaller; the runtime unpacks it and runs at dense speed."
_INT8 = " int8 is what is faster; it rounds activations too, so measure what it costs."


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

    Args:
        model: masked, folded, lowered or dense; float32 or float16. It is not changed.
        path: of the file, replaced if it exists, whole or not at all. A model whose initialisers
            exceed a gigabyte has them in a second file, `path` with `.data` added.
        example_inputs: a tensor or tuple (positional) or a mapping (keywords).
        weights: "packed", or "dense" for zeros as they are.
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
        int8: quantize products by ONNX Runtime's own quantizer (float32 models only): int8 weights
            with a scale for every output, zeros still zero, and activations rounded to eight bits
            as they come. Faster on CPUs with VNNI. How far outputs then differ is the model's
            affair: it is reported, not judged, so measure what matters to you.
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
            export (with its reason), or a graph that computes otherwise, be it at other sizes that
            `dynamic_shapes` asks for. No file is left then.
    """
    if int8_ignore and not int8:
        raise ExportError("int8_ignore is for int8=True")
    if weights not in WEIGHTS:
        raise ExportError(f"weights must be {' or '.join(map(repr, WEIGHTS))}, got {weights!r}")
    require_onnx("torchprune.export.to_onnx")
    target = Path(path)
    how = (weights == "packed", min_sparsity, int8, int8_ignore)
    if with_cache and is_encoder_decoder(model):
        return _write_parts(model, target, example_inputs, dynamic_shapes, how, merged)
    call = prepare(
        model,
        example_inputs,
        with_cache=with_cache,
        dynamic_shapes=dynamic_shapes,
        vary=True,
        accept=lambda plain: allowed_of(plain, int8),
        wide=True,
    )
    return holding(call, lambda call: write_onnx(call, target, *how))


def _write_parts(
    model: nn.Module,
    target: Path,
    example: Any,
    dynamic_shapes: Any,
    how: tuple[Any, ...],
    merged: bool,
) -> ExportReport:
    """The graphs of an encoder-decoder, in a folder; all or none."""
    if dynamic_shapes is not None:
        raise ExportError("with_cache: an encoder-decoder's sizes are found, not given")
    if target.is_file():
        raise ExportError(f"{target} is a file; an encoder-decoder's graphs go to a folder")
    calls = prepare_three(model, example, lambda plain: allowed_of(plain, how[2]))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as home:
        two = [calls.pop(FIRST), calls.pop(NEXT)] if merged else None
        parts = {
            name: write_onnx(call, Path(home) / f"{name}.onnx", *how)
            for name, call in calls.items()
        }
        if two is not None:
            parts[MERGED] = _write_merged(two[0], two[1], Path(home) / f"{MERGED}.onnx", *how)
        target.mkdir(exist_ok=True)
        moved = {}
        for name, part in parts.items():
            data = data_of(target / f"{name}.onnx") if part.data is None else None
            for file in (part.data, part.path):
                if file is not None:
                    file.replace(target / file.name)
            if data is not None:
                data.unlink(missing_ok=True)
            beside = None if part.data is None else target / part.data.name
            moved[name] = replace(part, path=target / part.path.name, data=beside)
        for name in {FIRST, NEXT, MERGED} - moved.keys():  # readers would take these of before
            old = target / f"{name}.onnx"
            for file in (old, data_of(old)):
                if file is not None:
                    file.unlink(missing_ok=True)
    return together(target, moved)


def write_onnx(
    call: Call,
    target: Path,
    packing: bool,
    min_sparsity: float = 0.25,
    int8: bool = False,
    int8_ignore: Sequence[str] = (),
) -> ExportReport:
    """Write a call; see `to_onnx`."""
    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home:
        graph, sizes = _int8_or_not(call, Path(home), int8, int8_ignore)
        made = _Made(graph, sizes, int8, [(call, _run)], call.note)
        return _finish(made, target, Path(home), packing, min_sparsity)


def _write_merged(
    first: Call,
    after: Call,
    target: Path,
    packing: bool,
    min_sparsity: float,
    int8: bool,
    int8_ignore: Sequence[str],
) -> ExportReport:
    """Write a decoder's two kinds of steps as one graph."""
    from torchprune.export.merged_decoder import merge, same_letters

    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home:
        graphs, sizes = zip(
            *(_int8_or_not(call, Path(home), int8, int8_ignore) for call in (first, after)),
            strict=True,
        )
        checks = [(first, partial(_run_branch, False)), (after, partial(_run_branch, True))]
        made = _Made(merge(*graphs), same_letters(*sizes), int8, checks)
        return _finish(made, target, Path(home), packing, min_sparsity)


@dataclass(frozen=True)
class _Made:
    """A graph, what is told of its sizes, and how the calls that it is made of are run by it."""

    graph: Any
    sizes: dict[str, Any]
    int8: bool
    checks: list[tuple[Call, Callable[[Any, Call, Sample], list[Tensor]]]]
    note: str = ""


def _int8_or_not(
    call: Call, home: Path, int8: bool, int8_ignore: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    from torchprune.export.int8 import quantize

    graph, sizes = graph_of(call)
    if int8:
        graph = quantize(graph, home, int8_ignore, weights_bytes(graph) > EXTERNAL)
    return graph, sizes


def _finish(
    made: _Made, target: Path, home: Path, packing: bool, min_sparsity: float
) -> ExportReport:
    """Pack, save, run and compare a graph, and put it in its place."""
    from torchprune.export.narrow_weights import narrow_initializers
    from torchprune.export.packing_pass import pack_initializers

    graph = made.graph
    widened = any(call.widened for call, _ in made.checks)
    if widened:
        narrow_initializers(graph)
    dense = graph_bytes(graph)
    packed = pack_initializers(graph, min_sparsity) if packing else []
    saved = dense - graph_bytes(graph)
    written = home / target.name
    data = save_graph(graph, written)
    seconds, session = _session(written)
    inputs = [i.name for i in session.get_inputs()]
    found = []
    for call, compute in made.checks:
        if len(made.checks) == 1:
            check_inputs(inputs, call)
        allowed = float("inf") if made.int8 else allowed_of(call.module)
        found.append(check(call, "ONNX Runtime", lambda s: compute(session, call, s), allowed))  # noqa: B023
    files = [f for f in (data, written) if f is not None]
    total = file_bytes(*files)
    stale = None if data is not None else data_of(target)
    for file in files:
        file.replace(target.parent / file.name)
    if stale is not None:
        stale.unlink(missing_ok=True)
    return ExportReport(
        path=target,
        data=None if data is None else target.parent / data.name,
        runtime="ONNX Runtime",
        bytes=total,
        dense_bytes=total + saved,
        packed=[p.name for p in packed],
        difference=max(difference for difference, _ in found),
        relative=max(relative for _, relative in found),
        load_seconds=seconds,
        brings=_BRINGS + (_INT8 if made.int8 else "") + said_of(widened, made.int8),
        inputs=inputs,
        outputs=[o.name for o in session.get_outputs()],
        **made.sizes,
        note=made.note,
    )


def _session(path: Path) -> tuple[float, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    start = time.perf_counter()
    try:
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
