"""LiteRT flatbuffers: what is in the file, to the bit, what the interpreter computes, refusals."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import assert_as_it_was, fingerprint
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import ExportError, MissingExtraError
from torchprune.export import to_litert
from torchprune.study.speed.file_gains import file_gains

pytest.importorskip("litert_torch", reason="the extra litert is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # while converting, of third parties

from ai_edge_litert import schema_py_generated as schema  # noqa: E402
from ai_edge_litert.interpreter import Interpreter  # noqa: E402

from torchprune.export.litert_sparse import pack_weights, read_model, written_model  # noqa: E402


def mobile() -> nn.Module:
    """A start of stride 2, then depthwise and 1x1 convolutions, as in MobileNet."""
    torch.manual_seed(0)

    def block(width: int, out: int) -> list[nn.Module]:
        deep = nn.Conv2d(width, width, 3, padding=1, groups=width)
        return [deep, nn.ReLU6(), nn.Conv2d(width, out, 1), nn.ReLU6()]

    first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
    rest = [*block(16, 40), *block(40, 40), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(first, nn.ReLU6(), *rest, nn.Linear(40, 300)).eval()


class Keywords(nn.Module):
    """Named inputs and outputs, one of them of whole numbers, and one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, *, ids: Tensor, scale: float) -> dict[str, Any]:
        made = self.two(self.one(x).relu()) * scale
        return {"made": made, "also": (ids + 1, x[:, :3])}


# -- what is in the file ---------------------------------------------------------------------------


def decoded(path: Path) -> list[np.ndarray[Any, Any]]:
    """Every sparse weight of a file, dense again, by the format's own words alone."""
    model, found = read_model(path.read_bytes()), []
    for tensor in model.subgraphs[0].tensors:
        if tensor.sparsity is None:
            continue
        *outer, last = tensor.sparsity.dimMetadata
        assert list(tensor.sparsity.traversalOrder) == list(range(len(tensor.shape)))
        assert [d.format for d in outer] == [schema.DimensionType.DENSE] * len(outer)
        assert [d.denseSize for d in outer] == list(tensor.shape[:-1])
        assert last.format == schema.DimensionType.SPARSE_CSR
        segments, places = last.arraySegments.values, last.arrayIndices.values
        values = np.asarray(model.buffers[tensor.buffer].data, np.uint8).view(np.float32)
        assert segments[0] == 0
        assert segments[-1] == len(values) == len(places)
        rows = np.zeros((int(np.prod(tensor.shape[:-1])), tensor.shape[-1]), np.float32)
        for row, (start, stop) in enumerate(pairwise(segments)):
            rows[row, places[start:stop]] = values[start:stop]
        found.append(rows.reshape(tensor.shape))
    return found


def test_a_mobile_net_is_stored_as_nonzeros_to_the_bit(tmp_path: Path) -> None:
    model = torchprune.sparsify(mobile(), MagnitudeSpec(0.8), progress=False)
    x = torch.randn(1, 3, 32, 32)
    before, path = fingerprint(model), tmp_path / "m.tflite"
    report = to_litert(model, path, x)
    assert_as_it_was(model, before)
    assert report.bytes == path.stat().st_size
    assert report.packed == ["0.weight", "4.weight", "8.weight", "12.weight"]
    assert "together are zero; here 80% are" in report.brings
    folded = torchprune.fold(model)
    want = [folded[at].weight.detach().numpy() for at in (0, 4, 8, 12)]
    want = [np.moveaxis(w, 1, -1) if w.ndim == 4 else w for w in want]
    found = decoded(path)
    assert len(found) == len(want)
    for weight in want:
        assert any(w.shape == weight.shape and np.array_equal(w, weight) for w in found)
    gains = file_gains(to_litert, model, report, x, seconds=0.01, weights="packed")
    assert gains.bytes < 0.55 * gains.dense_bytes
    assert gains.latency is not None
    dense = to_litert(model, path, x, weights="dense")
    assert dense.packed == decoded(path) == []
    assert abs(dense.bytes - report.dense_bytes) < 4096  # tables of the sparse tensors


@settings(deadline=None, max_examples=25)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    last=st.sampled_from([1, 7, 255, 300]),
    zeros=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_what_is_unpacked_is_the_weight(
    shape: list[int], last: int, zeros: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = [*shape[:-1], last]
    weight = rng.standard_normal(shape).astype(np.float32)
    odd = np.array([1.2e-38, -1.2e-38, 3e38, np.float32(1 / 3)], np.float32)
    weight.reshape(-1)[: min(4, weight.size)] = odd[: min(4, weight.size)]
    weight[rng.random(shape) < zeros] = 0
    model = sum_of(weight)
    plain = len(written_model(model))
    packed = pack_weights(model, 0.25)
    content = written_model(model)
    kept, rows = int((weight != 0).sum()), weight.size // last
    width = 1 if last <= 256 else 2
    size = kept * (4 + width) + (rows + 1) * (1 if kept < 256 else 2)
    assert bool(packed) == (kept <= 0.75 * weight.size and size < weight.nbytes)
    if packed:
        assert packed[0].after <= size
        assert packed[0].before == weight.nbytes
        assert len(content) <= plain - weight.nbytes + size + 1024  # what describes it
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    interpreter.set_tensor(given["index"], np.ones(shape, np.float32))
    interpreter.invoke()
    assert np.array_equal(interpreter.get_tensor(made["index"]), weight)


def sum_of(weight: np.ndarray[Any, Any]) -> Any:
    """A graph of one operator: its input times a constant."""
    model, graph, code = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.MUL
    code.version = 1
    buffers = [schema.BufferT(), schema.BufferT()]
    buffers[1].data = np.frombuffer(weight.tobytes(), np.uint8)
    graph.tensors = []
    for name, buffer in (("x", 0), ("w", 1), ("y", 0)):
        tensor = schema.TensorT()
        tensor.name, tensor.buffer, tensor.type = name, buffer, schema.TensorType.FLOAT32
        tensor.shape = np.array(weight.shape, np.int32)
        graph.tensors.append(tensor)
    operator, options = schema.OperatorT(), schema.MulOptionsT()
    operator.opcodeIndex = 0
    operator.inputs, operator.outputs = np.array([0, 1], np.int32), np.array([2], np.int32)
    operator.builtinOptionsType, operator.builtinOptions = schema.BuiltinOptions.MulOptions, options
    graph.operators, graph.inputs, graph.outputs = [operator], [0], [2]
    model.version, model.operatorCodes = 3, [code]
    model.subgraphs, model.buffers = [graph], buffers
    return model


# -- what it computes ------------------------------------------------------------------------------


def test_inputs_and_outputs_have_the_models_names(tmp_path: Path) -> None:
    model = torchprune.sparsify(Keywords(), MagnitudeSpec(0.5), progress=False)
    given = {"x": torch.randn(2, 32), "ids": torch.arange(6), "scale": 0.5}
    report = to_litert(model, tmp_path / "m.tflite", given)
    assert report.inputs == ["x", "ids"]
    assert report.outputs == ["made", "also.0", "also.1"]
    assert report.packed == ["one.weight", "two.weight"]
    interpreter = Interpreter(model_path=str(tmp_path / "m.tflite"))
    runner = interpreter.get_signature_runner()
    x = np.ones((2, 32), np.float32)
    found = runner(x=x, ids=np.arange(6, dtype=np.int32))
    with torch.no_grad():
        want = model(torch.ones(2, 32), ids=torch.arange(6), scale=0.5)
    np.testing.assert_allclose(found["made"], want["made"], atol=1e-5)
    assert np.array_equal(found["also.0"], np.arange(1, 7))


@pytest.mark.parametrize("family", sample(["llama", "bert"], "llama"))
def test_transformers_with_and_without_a_cache(family: str, tmp_path: Path) -> None:
    cache = family == "llama"
    model = FAMILIES[family].make()
    torchprune.sparsify(model, MagnitudeSpec(0.5), progress=False)
    tokens = torch.arange(1, 7)[None] % 32
    report = to_litert(model, tmp_path / "m.tflite", tokens, with_cache=cache)
    assert report.relative < 1e-4
    assert report.packed
    if cache:
        assert "past_key_values.0.key" in report.inputs
        assert "present.0.value" in report.outputs


# -- refusals --------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, path = nn.Linear(8, 8), torch.randn(1, 8), tmp_path / "m.tflite"
    with pytest.raises(ExportError, match=r"\.tflite files, got m.onnx"):
        to_litert(model, tmp_path / "m.onnx", x)
    with pytest.raises(ExportError, match="weights must be 'packed' or 'dense'"):
        to_litert(model, path, x, weights="sparse")
    with pytest.raises(ExportError, match=r"all float32, got torch\.bfloat16"):
        to_litert(nn.Linear(8, 8).bfloat16(), path, x.bfloat16())

    class Eigenvalues(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(super().forward(x)).real

    with pytest.raises(ExportError, match="LiteRT could not convert this model"):
        to_litert(Eigenvalues(4, 4), path, torch.randn(4, 4))
    monkeypatch.setitem(sys.modules, "litert_torch", None)
    with pytest.raises(MissingExtraError, match=r"torchprune\[litert\]"):
        to_litert(model, path, x)
    assert list(tmp_path.iterdir()) == []
