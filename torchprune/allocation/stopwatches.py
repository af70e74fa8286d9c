"""Milliseconds that a module takes: in torch, or a layer of it in ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.errors import MissingExtraError
from torchprune.structure.budget_spec import BudgetSpec

Stopwatch = Callable[[nn.Module, tuple[Any, ...]], float]
"""(module, inputs) -> milliseconds."""

_FEWEST, _MOST, _SECONDS = 5, 50, 0.05
"""Repetitions, and how long they go on if each takes little."""


def stopwatches_of(spec: BudgetSpec) -> tuple[Stopwatch, Stopwatch]:
    """What measures layers, and what measures all around them."""
    if spec.runtime == "torch":
        return in_torch, in_torch
    if spec.runtime == "onnx":
        return in_onnx_runtime, in_torch
    assert callable(spec.runtime)
    return spec.runtime, spec.runtime


def in_torch(module: nn.Module, inputs: tuple[Any, ...]) -> float:
    """The median of several calls, without gradients, after a first one."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))

    def run() -> None:
        module(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad():
        return _median(run)


def in_onnx_runtime(module: nn.Module, inputs: tuple[Any, ...]) -> float:
    """A Linear or a convolution as one node of ONNX, with the threads that torch has.

    Raises:
        MissingExtraError: onnx or onnxruntime is absent.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx", 'BudgetSpec(runtime="onnx")') from None
    (x,) = inputs
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        _as_onnx(module, x), options, providers=["CPUExecutionProvider"]
    )
    given = {"x": x.detach().float().cpu().numpy()}
    return _median(lambda: session.run(None, given))


def _median(run: Callable[[], Any]) -> float:
    run()
    taken: list[float] = []
    while len(taken) < _FEWEST or (sum(taken) < _SECONDS and len(taken) < _MOST):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1e3 * median(taken)


def _as_onnx(module: Any, x: Tensor) -> bytes:
    """A model of one layer, its weights inside."""
    try:
        import onnx
    except ImportError:
        raise MissingExtraError("onnx", "onnx", 'BudgetSpec(runtime="onnx")') from None
    helper, numpy_of = onnx.helper, onnx.numpy_helper.from_array
    weight = module.weight.detach().float().cpu()
    values, nodes = [], []
    if isinstance(module, nn.Linear):
        values.append(numpy_of(weight.T.contiguous().numpy(), "w"))
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["p"]))
    else:
        values.append(numpy_of(weight.numpy(), "w"))
        space = weight.dim() - 2
        pads = _pads(module)
        nodes.append(
            helper.make_node(
                "Conv",
                ["x", "w"],
                ["p"],
                group=module.groups,
                strides=list(module.stride),
                dilations=list(module.dilation),
                pads=pads,
                kernel_shape=list(weight.shape[2:]),
            )
        )
        assert len(pads) == 2 * space
    if module.bias is not None:
        shape = (-1,) if isinstance(module, nn.Linear) else (-1, *[1] * (weight.dim() - 2))
        values.append(numpy_of(module.bias.detach().float().cpu().reshape(shape).numpy(), "b"))
        nodes.append(helper.make_node("Add", ["p", "b"], ["y"]))
    else:
        nodes[0].output[0] = "y"
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", kind, list(x.shape))],
        [helper.make_tensor_value_info("y", kind, None)],
        values,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


def _pads(module: Any) -> list[int]:
    """The zeros before and after each axis, as ONNX has them."""
    if isinstance(module.padding, str):
        half = module._reversed_padding_repeated_twice[::-1]
        return [*half[1::2], *half[0::2]] if module.padding == "same" else [0] * len(half)
    return [*module.padding, *module.padding]
