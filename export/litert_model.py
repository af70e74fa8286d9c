"""LiteRT: a `.tflite` flatbuffer, its pruned weights as nonzeros that XNNPACK may skip zeros by."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchprune.errors import ExportError, MissingExtraError
from torchprune.export.call import Call, Sample, file_bytes, folder_of, prepare
from torchprune.export.judged import check, dtype_of
from torchprune.export.promises import promised, reason_of
from torchprune.export.written import WEIGHTS, ExportReport, tensors_of

_ALLOWED = 1e-3
"""Difference from torch, relative to the largest output, beyond which a program is wrong."""

_PACKED = (
    "The file is smaller. XNNPACK leaves zeros out of mobile networks' 1x1 convolutions, on ARM "
    "processors and on x86 without AVX, if more than two thirds of the weights of 1x1 convolutions "
    "and fully connected layers together are zero; here {share:.0%} are. Elsewhere it runs at "
    "dense speed."
)
_DENSE = "The zeros are stored and multiplied like all numbers: neither smaller nor faster."


def to_litert(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    weights: str = "packed",
    with_cache: bool = False,
    min_sparsity: float = 0.25,
) -> ExportReport:
    """Write a model for LiteRT (TensorFlow Lite), masks folded, run it there, compare with torch.

    With `weights="packed"` a weight with enough zeros is stored as its nonzeros and their places:
    at 50 % it takes 0.63 to 0.75 of its dense bytes, at 80 % 0.25 to 0.30. The interpreter unpacks
    it when it loads the file.

    XNNPACK, which runs floating point in LiteRT, then looks for chains that it can compute without
    the zeros: from a 3x3 convolution of stride 2 with three input channels, through 1x1
    convolutions, depthwise ones of 3x3 and 5x5, additions and activations, to a global average.
    More than two thirds of the weights of the chain's 1x1 convolutions, and of the fully connected
    layers behind it, have to be zero: a dense head counts (Elsen et al., Fast Sparse ConvNets,
    2019).

    Args:
        model: masked, folded, lowered or dense; float32. It is not changed.
        path: of the `.tflite` file, replaced if it exists, whole or not at all.
        example_inputs, with_cache: as for `to_onnx`. All sizes are those of the example. Inputs of
            whole numbers are int32 there.
        weights: "packed", or "dense" for zeros as they are.
        min_sparsity: weights with a smaller share of zeros stay dense.

    Returns:
        sizes, names of the signature's inputs and outputs, and differences; print it.

    Raises:
        MissingExtraError: litert-torch is absent.
        ExportError: a dtype it does not take, a model that torch or LiteRT cannot convert (with the
            reason), or a program that computes otherwise. No file is left then.
    """
    if weights not in WEIGHTS:
        raise ExportError(f"weights must be {' or '.join(map(repr, WEIGHTS))}, got {weights!r}")
    target = Path(path)
    if target.suffix != ".tflite":
        raise ExportError(f"LiteRT's models are .tflite files, got {target.name}")
    _require()
    call = prepare(
        model,
        example_inputs,
        with_cache=with_cache,
        dynamic_shapes=None,
        vary=False,
        accept=lambda plain: dtype_of(plain, (torch.float32,), "to_litert"),
    )
    from torchprune.export import litert_sparse as sparse

    with tempfile.TemporaryDirectory(dir=folder_of(target)) as home:
        partial = Path(home) / target.name
        _convert(call, partial)
        with promised("LiteRT's file could not be read again"):
            made = sparse.read_model(partial.read_bytes())
            share = sparse.skippable_share(made)
            packed = sparse.pack_weights(made, min_sparsity) if weights == "packed" else []
            outputs = call.names[1]
            sparse.name_ends(made, call.inputs, outputs)
            partial.write_bytes(sparse.written_model(made))
        with promised("LiteRT cannot load this program"):
            start = time.perf_counter()
            runner = opened(partial)
            seconds = time.perf_counter() - start
        found = check(call, "LiteRT", lambda s: _run(runner, call, s), _ALLOWED)
        total = file_bytes(partial)
        partial.replace(target)
    return ExportReport(
        path=target,
        data=None,
        runtime="LiteRT",
        bytes=total,
        dense_bytes=total + sum(p.before - p.after for p in packed),
        packed=_names(call.module, packed),
        difference=found[0],
        relative=found[1],
        load_seconds=seconds,
        brings=_PACKED.format(share=share) if weights == "packed" else _DENSE,
        inputs=call.inputs,
        outputs=outputs or [],
        sizes={n: tuple(t.shape) for n, t in _inputs(call, call.samples[0])},
    )


def _require() -> None:
    try:
        import ai_edge_litert  # noqa: F401
        import litert_torch  # noqa: F401
    except ImportError:
        raise MissingExtraError("litert-torch", "litert", "torchprune.export.to_litert") from None


class _Flat(nn.Module):
    """A model that takes its tensors and gives its outputs one after the other.

    What of its inputs is no tensor stays as in the example.
    """

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.module = module
        self._leaves, self._tree = pytree.tree_flatten((args, kwargs))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """In the order of `Sample.tensors`."""
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        return tuple(tensors_of(self.module(*args, **kwargs)))


def _convert(call: Call, path: Path) -> None:
    import litert_torch

    with warnings.catch_warnings(), torch.no_grad(), _quietly():
        warnings.simplefilter("ignore")  # of its own making
        flat = _Flat(call.module, call.args, call.kwargs).eval()
        try:
            litert_torch.convert(flat, tuple(call.samples[0].tensors)).export(str(path))
        except Exception as error:
            raise ExportError(f"LiteRT could not convert this model: {reason_of(error)}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without its own progress lines, and what it logs of whole numbers' widths."""
    import logging

    from litert_torch import progress

    config = progress.config
    shown, level = config.show_progress, logging.root.manager.disable
    config.show_progress = False
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        config.show_progress = shown
        logging.disable(level)


def opened(path: Path) -> Any:
    """What runs a file: takes its inputs by their names, and gives its outputs so."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    return interpreter.get_signature_runner()


def inputs_of(runner: Any, call: Call, sample: Sample) -> dict[str, Any]:
    """A sample as arrays by name, in the dtypes that the program takes."""
    dtypes = {name: entry["dtype"] for name, entry in runner.get_input_details().items()}
    return {
        name: tensor.detach().cpu().numpy().astype(dtypes[name])
        for name, tensor in _inputs(call, sample)
        if name in dtypes  # what the model does not read is no input there
    }


def _inputs(call: Call, sample: Sample) -> list[tuple[str, Tensor]]:
    return list(zip(call.inputs, sample.tensors, strict=True))


def _run(runner: Any, call: Call, sample: Sample) -> list[Tensor]:
    """What the program gives, in the order of the model's outputs."""
    found = runner(**inputs_of(runner, call, sample))
    names = call.names[1] or [f"output_{at}" for at in range(len(found))]
    return [torch.from_numpy(np.array(found[name])) for name in names]


def _names(module: nn.Module, packed: Sequence[Any]) -> list[str]:
    """The parameters that the weights of the graph come from, by where their zeros are: the
    converter multiplies scales into them."""
    known = {
        name: weight.detach().cpu().numpy() != 0
        for name, weight in module.named_parameters()
        if weight.dim() > 1
    }
    found = []
    for weight in packed:
        own = weight.dense != 0
        orders = [own, np.moveaxis(own, -1, 1) if own.ndim > 2 else own.T]
        name = next(
            (
                name
                for name, held in known.items()
                for one in orders
                if held.shape == one.shape and np.array_equal(held, one)
            ),
            weight.name,
        )
        known.pop(name, None)
        found.append(name)
    return found
