"""ONNX: masks folded, zeros packed away in the file, and what the runtime computes compared."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchprune.errors import ExportError, MissingExtraError
from torchprune.export.hf import folded_copy
from torchprune.lowering import lift

WEIGHTS = ("packed", "dense")

_EXTERNAL = 1 << 30
"""Bytes of initialisers above which they go to a file of their own (protobuf ends at 2 GiB)."""

_ALLOWED = {torch.float32: 1e-3, torch.float16: 3e-2}
"""Largest difference from torch, relative to the largest output, beyond which a graph is wrong."""


@dataclass(frozen=True)
class OnnxReport:
    """What `to_onnx` wrote and how it compares.

    Attributes:
        path: the model; `data` beside it holds the initialisers of a large one, else None.
        bytes, dense_bytes: of all files, and what the weights would add up to dense.
        packed: names of the initialisers that were packed.
        difference: largest absolute difference of any output from torch, on the example.
        relative: the same over the largest absolute output.
        load_seconds: to make a session, constants folded.
        inputs, outputs: the graph's names.
    """

    path: Path
    data: Path | None
    bytes: int
    dense_bytes: int
    packed: list[str] = field(default_factory=list)
    difference: float = 0.0
    relative: float = 0.0
    load_seconds: float = 0.0
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        share = self.bytes / self.dense_bytes if self.dense_bytes else 1.0
        return (
            f"{self.path}: {self.bytes:,} bytes ({share:.3f} of dense), {len(self.packed)} weights "
            f"packed; loads in {self.load_seconds:.2f} s; ONNX Runtime differs from torch by at "
            f"most {self.difference:.3g} ({self.relative:.2g} of the largest output)\n"
            f"inputs: {_few(self.inputs)}\noutputs: {_few(self.outputs)}\n"
            "Sparsity makes the file smaller; the runtime unpacks it and runs at dense speed."
        )


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    weights: str = "packed",
    with_cache: bool = False,
    dynamic_shapes: Any = None,
    min_sparsity: float = 0.25,
) -> OnnxReport:
    """Write a model as ONNX, with its masks folded, and compare ONNX Runtime with torch.

    With `weights="packed"` a half-sparse weight takes 0.53 (float32) or 0.56 (float16) of its dense
    bytes in the file. Stock operators unpack it when a session loads; from then on it is the dense
    model: same outputs, speed and memory.

    Args:
        model: masked, folded, lowered or dense; float32 or float16. It is not changed.
        path: of the file, replaced if it exists, whole or not at all. A model whose initialisers
            exceed a gigabyte has them in a second file, `path` with `.data` added.
        example_inputs: a tensor or tuple (positional) or a mapping (keywords).
        weights: "packed", or "dense" for zeros as they are.
        with_cache: for decoder-only language models of transformers: the graph takes `input_ids`,
            `attention_mask` (past and present) and `past_key_values.N.key` and `.value` of shape
            (batch, heads, past, size), and gives `logits` and `present.N.key` and `.value`. The
            example is then `input_ids`.
        dynamic_shapes: as for `torch.export.export`; by default the first size of every input may
            vary, and the second of integer ones (tokens), where the model allows it.
        min_sparsity: weights with a smaller share of zeros stay dense.

    Returns:
        sizes, names and differences; print it.

    Raises:
        MissingExtraError: the extra "onnx" is absent.
        ExportError: a dtype that ONNX Runtime does not compute with, a model that torch cannot
            export (with its reason), or a graph that computes otherwise. No file is left then.
    """
    if weights not in WEIGHTS:
        raise ExportError(f"weights must be {' or '.join(map(repr, WEIGHTS))}, got {weights!r}")
    _require()
    from torchprune.export.packing_pass import pack_initializers

    target = Path(path)
    plain = _exportable(lift(folded_copy(model)).eval())
    dtype = _dtype_of(plain)
    args, kwargs = _as_call(example_inputs)
    names: tuple[list[str] | None, list[str] | None] = (None, None)
    if with_cache:
        from torchprune.export.cached import CachedModel

        cached = CachedModel(plain)
        plain, (args, kwargs) = cached, (cached.example(_tokens_of(args, kwargs)), {})
        names = cached.names()
        dynamic_shapes = cached.dynamic_shapes() if dynamic_shapes is None else dynamic_shapes
    else:
        _without_cache(plain)
    if dynamic_shapes is None:
        dynamic_shapes = _vary(args), _vary(kwargs)
        dynamic_shapes = dynamic_shapes[1] if kwargs else dynamic_shapes[0]
    with torch.no_grad():
        expected = _tensors(plain(*args, **kwargs))
        program = _exported(plain, args, kwargs, dynamic_shapes, names)
    _strip(program.model)
    packed = pack_initializers(program.model, min_sparsity) if weights == "packed" else []
    size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values())
    dense = size + sum(p.before - p.after for p in packed)
    with tempfile.TemporaryDirectory(dir=_folder(target)) as home:
        partial = Path(home) / target.name
        data = Path(f"{partial}.data") if size > _EXTERNAL else None
        _save(program.model, partial, data)
        given = [t.detach().cpu().numpy() for t in _tensors((args, kwargs))]
        seconds, found, inputs, outputs = _run(partial, given)
        difference, relative = _compare(expected, found)
        if not relative <= _ALLOWED[dtype]:
            raise ExportError(
                f"the exported graph computes otherwise than torch: largest difference "
                f"{difference:.3g}, {relative:.2g} of the largest output; nothing was written"
            )
        files = [f for f in (data, partial) if f is not None]
        total = sum(f.stat().st_size for f in files)
        for file in files:
            file.replace(target.parent / file.name)
    return OnnxReport(
        path=target,
        data=None if data is None else target.parent / data.name,
        bytes=total,
        dense_bytes=dense + max(total - size, 0),
        packed=[p.name for p in packed],
        difference=difference,
        relative=relative,
        load_seconds=seconds,
        inputs=inputs,
        outputs=outputs,
    )


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown


def _require() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError(package, "onnx", "torchprune.export.to_onnx") from None


def _dtype_of(model: nn.Module) -> torch.dtype:
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    other = found - _ALLOWED.keys()
    if other or len(found) != 1:
        raise ExportError(
            "to_onnx writes models whose floating parameters are all float32 or all float16, got "
            f"{', '.join(sorted(str(d) for d in found)) or 'none'}: model.float() or model.half()"
        )
    return found.pop()


def _as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Sequence) and not isinstance(example, str):
        return tuple(example), {}
    raise ExportError(
        "example_inputs must be a tensor, a tuple of positional or a mapping of keyword inputs, "
        f"got {type(example).__name__}"
    )


def _exportable(model: nn.Module) -> nn.Module:
    """Routed experts by batched products, which ONNX has, where transformers offers the choice."""
    choose = getattr(model, "set_experts_implementation", None)
    if callable(choose):
        choose("batched_mm")
    return model


def _without_cache(model: nn.Module) -> None:
    """No key-value caches among the outputs of a transformers model."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False


def _tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise ExportError("with_cache needs token ids (batch, length) as the example")
    return tokens


def _vary(inputs: Any) -> Any:
    """Sizes that may vary: batches, and lengths of token sequences."""
    auto = torch.export.Dim.AUTO

    def sizes(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return None
        tokens = leaf.dim() > 1 and not leaf.is_floating_point()
        return {0: auto, 1: auto} if tokens else {0: auto}

    return pytree.tree_map(sizes, inputs)


def _exported(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    names: tuple[list[str] | None, list[str] | None],
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's and onnxscript's own making
        try:
            return torch.onnx.export(
                model,
                args,
                kwargs=kwargs or None,
                dynamo=True,
                verbose=False,
                dynamic_shapes=dynamic_shapes,
                input_names=names[0],
                output_names=names[1],
            )
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = str(cause).strip().splitlines()
            raise ExportError(
                f"torch could not export this model: {type(cause).__name__}: "
                f"{reason[0] if reason else 'no reason given'}"
            ) from error


def _strip(model: Any) -> None:
    """Leave out the exporter's stack traces: most of a small file, and paths of this machine."""
    graphs = [model.graph, *model.functions.values()]
    for item in (model, *graphs, *(node for graph in graphs for node in graph)):
        item.metadata_props.clear()
        item.doc_string = None
    for graph in graphs:
        for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
            value.metadata_props.clear()
            value.doc_string = None


def _folder(target: Path) -> Path:
    if target.is_dir():
        raise ExportError(f"{target} is a directory; to_onnx writes a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent


def _save(model: Any, path: Path, data: Path | None) -> None:
    import onnx
    import onnx_ir

    onnx_ir.save(model, path, external_data=None if data is None else data.name)
    onnx.checker.check_model(str(path))


def _run(path: Path, given: list[Any]) -> tuple[float, list[Any], list[str], list[str]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - start
    inputs = [i.name for i in session.get_inputs()]
    if len(inputs) != len(given):
        raise ExportError(
            f"the graph has {len(inputs)} inputs ({', '.join(inputs)}) and the example "
            f"{len(given)} tensors; leave out those that the model does not use"
        )
    outputs = [o.name for o in session.get_outputs()]
    return seconds, session.run(None, dict(zip(inputs, given, strict=True))), inputs, outputs


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _compare(expected: list[Tensor], found: list[Any]) -> tuple[float, float]:
    """Largest absolute difference, and relative to the largest output; inf if shapes differ."""
    worst = largest = 0.0
    if len(expected) != len(found):
        return float("inf"), float("inf")
    for want, got in zip(expected, map(torch.from_numpy, found), strict=True):
        if want.shape != got.shape:
            return float("inf"), float("inf")
        if want.numel():
            want, got = want.double(), got.double()
            same = (want == got) | (want.isnan() & got.isnan())
            worst = max(worst, float(torch.where(same, 0.0, (want - got).abs()).max()))
            largest = max(largest, float(want.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    return worst, worst / largest if largest else worst
