"""Calls as ONNX graphs, simplified, and such graphs as files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchprune.errors import ExportError, MissingExtraError
from torchprune.export.call import Call
from torchprune.export.graph_names import name_outputs, name_sizes
from torchprune.export.judged import admit, dtype_of, told
from torchprune.export.promises import SizesError, promised, reason_of
from torchprune.export.quiet import without_torchvision_notes

EXTERNAL = 1 << 30
"""Bytes of initialisers above which they go to a file of their own (protobuf ends at 2 GiB)."""


_ALLOWED = {torch.float32: 1e-3, torch.float16: 3e-2}
"""Largest difference from torch, relative to the largest output, beyond which a graph is wrong."""


_FIELD = 3
"""Bytes of a file that say what follows and how long it is, mostly."""


def graph_of(call: Call, kernels: float | None = None) -> tuple[Any, dict[str, Any]]:
    """A call as an `onnx_ir` model, and what a report says of its sizes.

    Args:
        kernels: the least sparsity of weights that operators of ours are to read packed.

    Raises:
        ExportError: torch cannot export it, or not with such sizes.
    """
    from torchprune.export.simplify import simplify

    if kernels is not None:
        from torchprune.export.onnx_kernels import program_with_kernels

        program = program_with_kernels(call, kernels)
    else:
        program = _exported(call)
    admit(program.exported_program, call)
    sizes = told(program.exported_program, call)
    with promised("the graph could not be simplified"):
        simplify(program.model)
        name_outputs(program.model.graph, call.names[1])
        name_sizes(program.model.graph, call.size_names)
    return program.model, sizes


def save_graph(graph: Any, path: Path) -> Path | None:
    """Write a graph, and its weights to a file of their own where they are many.

    Returns:
        that file.
    """
    data = Path(f"{path}.data") if weights_bytes(graph) > EXTERNAL else None
    with promised("the graph could not be written"):
        _save(graph, path, data)
    return data


def data_of(path: Path) -> Path | None:
    """The file beside an earlier graph of ours that holds its weights, if it has one."""
    import onnx

    data = Path(f"{path}.data")
    if not (path.is_file() and data.is_file()):
        return None
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # no graph: the file beside it is not its
        return None
    held = (entry.value for one in graph.initializer for entry in one.external_data)
    return data if data.name in held else None


def allowed_of(model: nn.Module, int8: bool = False, where: str = "to_onnx") -> float:
    """The difference allowed to a model's dtype, to bfloat16 that of float32, in which it computes;
    see `dtype_of` for errors."""
    return _ALLOWED[dtype_of(model, tuple(_ALLOWED)[: 1 if int8 else 2], where, wide=True)]


def require_onnx(caller: str) -> None:
    """
    Raises:
        MissingExtraError: a package of the extra is absent.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError(package, "onnx", caller) from None


def _exported(call: Call) -> Any:
    with warnings.catch_warnings(), without_torchvision_notes(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's and onnxscript's own making
        try:
            return torch.onnx.export(
                call.module,
                call.args,
                kwargs=call.kwargs or None,
                dynamo=True,
                optimize=False,  # its rewriting of a large graph takes longer than all the rest
                verbose=False,
                dynamic_shapes=call.dynamic_shapes,
                input_names=call.names[0],
            )
        except Exception as error:
            raise SizesError(f"torch could not export this model: {reason_of(error)}") from error


def weights_bytes(model: Any) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values())


def graph_bytes(model: Any) -> int:
    """Bytes of a graph's weights, nodes and known sizes in a file, to a few for each weight."""
    from onnx_ir import serde

    graph = model.graph
    held = list(graph.initializers.values())
    size = sum(v.const_value.nbytes + len(v.name) + 4 * _FIELD for v in held)
    made = [out for node in graph for out in node.outputs]
    known = [v for v in (*held, *made) if v.type is not None or v.shape is not None]
    parts = [*map(serde.serialize_node, graph), *map(serde.serialize_value, known)]
    size += sum(part.ByteSize() + _FIELD for part in parts)
    return int(size)


def _save(model: Any, path: Path, data: Path | None) -> None:
    import onnx
    import onnx_ir

    onnx_ir.save(model, path, external_data=None if data is None else data.name)
    onnx.checker.check_model(str(path))


def check_inputs(inputs: Sequence[str], call: Call) -> None:
    """Refuse a graph that lost inputs.

    Raises:
        ExportError: it has not as many as the example has tensors.
    """
    if len(inputs) != len(call.inputs):
        raise ExportError(
            f"the graph has {len(inputs)} inputs ({', '.join(inputs)}) and the example "
            f"{len(call.inputs)} tensors; leave out those that the model does not use"
        )
