"""What exporters promise: ExportError and no other, outputs named as the model's, nothing old."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from families import FAMILIES
from sweeps import sample
from torch import Tensor, nn
from torch.export import Dim

import torchprune
from torchprune import MagnitudeSpec, export
from torchprune.errors import ExportError
from torchprune.export import onnx_graph, openvino_model
from torchprune.export.graph_names import output_names

pytestmark = pytest.mark.filterwarnings("ignore")  # while exporting, of third parties


class Of(nn.Module):
    """A linear layer, and what a function makes of its input and output."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(8, 8), make

    def forward(self, x: Tensor) -> Any:
        return self.make(x, self.layer(x))


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_runtime_without_an_operator_is_named(dtype, tmp_path):
    model = Of(lambda _, y: torch.softmax(torch.erf(y.to(dtype)) @ y.to(dtype).T, -1).float())
    with pytest.raises(ExportError, match="ONNX Runtime cannot run this graph"):
        export.to_onnx(model, tmp_path / "m.onnx", torch.randn(2, 8))
    assert list(tmp_path.iterdir()) == []


def test_what_one_runtime_lacks_does_not_stop_another(tmp_path):
    pytest.importorskip("openvino")
    model = Of(lambda _, y: torch.erf(y.double()).float())
    assert export.to_openvino(model, tmp_path / "m.xml", torch.randn(2, 8)).relative < 1e-2


@pytest.mark.parametrize("step", ["convert_model", "save_model", "Core"])
def test_whatever_openvino_raises_is_an_export_error(step, tmp_path, monkeypatch):
    openvino = pytest.importorskip("openvino")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(openvino, step, fail)
    with pytest.raises(ExportError, match=r"OpenVINO cannot .*: RuntimeError: no such thing;"):
        export.to_openvino(nn.Linear(8, 8), tmp_path / "m.xml", torch.randn(2, 8))
    assert list(tmp_path.iterdir()) == []


def models_without_a_cache() -> dict[str, nn.Module]:
    from transformers import T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    return {
        "Sequential": nn.Sequential(nn.Embedding(61, 8), nn.Linear(8, 61)),
        "T5ForConditionalGeneration": T5ForConditionalGeneration(
            T5Config(num_layers=1, decoder_start_token_id=0, **small)
        ),
        "Linear": nn.Linear(8, 8),
    }


@pytest.mark.parametrize("kind", ["Sequential", "T5ForConditionalGeneration", "Linear"])
@pytest.mark.parametrize("to", ["to_onnx", "to_pt2"])
def test_a_model_that_takes_no_cache_is_refused(kind, to, tmp_path):
    if kind == "T5ForConditionalGeneration" and to == "to_onnx":
        pytest.skip("it has three graphs there")
    ending = {"to_onnx": "onnx", "to_pt2": "pt2"}[to]
    model = models_without_a_cache()[kind]
    with pytest.raises(ExportError, match=f"with_cache: a {kind} cannot take steps with a cache"):
        getattr(export, to)(
            model, tmp_path / f"m.{ending}", torch.ones(1, 4).long(), with_cache=True
        )
    assert list(tmp_path.iterdir()) == []


def test_an_example_that_does_not_fit_is_an_export_error(tmp_path):
    with pytest.raises(ExportError, match="cannot be called with the example: RuntimeError"):
        export.to_pt2(nn.Linear(8, 8), tmp_path / "m.pt2", torch.randn(2, 7))


def test_a_model_quantized_by_torchao_is_no_archive(tmp_path):
    ao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64))
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    with pytest.raises(ExportError, match=r"weight is a .*hold plain tensors"):
        export.to_pt2(model, tmp_path / "m.pt2", torch.randn(2, 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["to_onnx", "to_openvino", "to_executorch"])
def test_a_dtype_that_is_not_taken_names_what_to_do(to, tmp_path):
    ending = {"to_onnx": "onnx", "to_openvino": "xml", "to_executorch": "pte"}[to]
    if to != "to_onnx":
        pytest.importorskip(to.removeprefix("to_"))
    other = torch.float64
    model = nn.Linear(8, 8).to(other)
    with pytest.raises(ExportError, match=f"{to} writes .*--dtype float32 on the command line"):
        getattr(export, to)(model, tmp_path / f"m.{ending}", torch.randn(2, 8).to(other))


@pytest.mark.parametrize("name", sample(["mlp", "resnet", "llama"], "mlp"))
def test_executorch_takes_bfloat16(name, tmp_path):
    pytest.importorskip("executorch")
    family = FAMILIES[name]
    model = torchprune.sparsify(family.make(torch.bfloat16), MagnitudeSpec(), progress=False)
    report = export.to_executorch(model, tmp_path / "m.pte", family.data(torch.bfloat16)[0])
    assert 0 < report.relative < 3e-2


# -- examples and sizes ----------------------------------------------------------------------------


def lying_otherwise() -> dict[str, tuple[nn.Module, Tensor]]:
    image = torch.randn(2, 3, 8, 8)
    return {
        "turned": (nn.Linear(8, 8), torch.randn(8, 2).T),
        "channels last": (nn.Conv2d(3, 4, 3), image.to(memory_format=torch.channels_last)),
        "every other": (nn.Linear(8, 8), torch.randn(2, 16)[:, ::2]),
        "expanded": (nn.Linear(8, 8), torch.randn(1, 8).expand(2, 8)),
    }


@pytest.mark.parametrize("name", ["turned", "channels last", "every other", "expanded"])
def test_an_example_may_lie_in_memory_as_it_likes(name, tmp_path):
    pytest.importorskip("executorch")
    model, example = lying_otherwise()[name]
    report = export.to_executorch(model, tmp_path / "m.pte", example)
    assert report.relative < 1e-5
    assert "inputs of exactly these sizes" in str(report)


@pytest.mark.parametrize("dim", [Dim.AUTO, Dim.DYNAMIC, Dim("rows", min=1)], ids=str)
def test_sizes_without_a_greatest_are_refused_where_memory_is_planned(dim, tmp_path):
    pytest.importorskip("executorch")
    with pytest.raises(ExportError, match="axis 0 of input may be of any size"):
        export.to_executorch(
            nn.Linear(8, 8), tmp_path / "m.pte", torch.randn(2, 8), dynamic_shapes=({0: dim},)
        )
    assert list(tmp_path.iterdir()) == []


# -- names -----------------------------------------------------------------------------------------

RETURNED: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str]]] = {
    "a tensor": (lambda x, y: y, ["output"]),
    "a tuple": (lambda x, y: (y, x + 1), ["output.0", "output.1"]),
    "keys": (
        lambda x, y: {"scores": y, "more": [x + 1, (x + 2,)]},
        ["scores", "more.0", "more.1.0"],
    ),
    "one value twice": (lambda x, y: {"a": y, "b": y}, ["a", "b"]),
    "an input": (lambda x, y: {"a": y, "same": x}, ["a", "same"]),
    "an input's name": (lambda x, y: {"x": y}, ["x_out"]),
    "a node's name": (lambda x, y: {"relu": y, "linear": y.relu()}, ["relu", "linear"]),
    "a weight's name": (lambda x, y: {"layer.weight": y}, ["layer.weight_out"]),
}


@pytest.mark.parametrize("name", RETURNED)
def test_outputs_are_called_what_the_model_calls_them(name, tmp_path):
    make, names = RETURNED[name]
    model, x = Of(make), torch.randn(2, 8)
    report = export.to_onnx(model, tmp_path / "m.onnx", x)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [o.name for o in session.get_outputs()] == report.outputs == names
    found = session.run(names, {session.get_inputs()[0].name: x.numpy()})
    wanted = torch.utils._pytree.tree_leaves(model(x))
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)


def test_openvino_has_them_too(tmp_path):
    openvino = pytest.importorskip("openvino")
    report = export.to_openvino(
        Of(RETURNED["one value twice"][0]), tmp_path / "m.xml", torch.ones(2, 8)
    )
    assert report.outputs == ["a", "b"]
    compiled = openvino.Core().compile_model(tmp_path / "m.xml", "CPU")
    found = compiled(np.ones((3, 8), np.float32))
    np.testing.assert_array_equal(found["a"], found["b"])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_fields_of_transformers_are_names(family):
    model, batch = FAMILIES[family].make().eval(), FAMILIES[family].data()[0]
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    names = output_names(out)
    assert names is not None
    assert names[0] == next(iter(out.keys()))


# -- what lay there before -------------------------------------------------------------------------


def test_a_smaller_model_takes_the_older_ones_weights_away(tmp_path, monkeypatch):
    path, x = tmp_path / "m.onnx", torch.randn(2, 64)
    monkeypatch.setattr(onnx_graph, "EXTERNAL", 1000)
    assert export.to_onnx(nn.Linear(64, 64), path, x).data == tmp_path / "m.onnx.data"
    assert export.to_onnx(nn.Linear(64, 2), path, x).data is None
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    onnx.checker.check_model(path)


def test_a_file_of_that_name_that_is_not_ours_stays(tmp_path):
    path, x = tmp_path / "m.onnx", torch.randn(2, 64)
    (tmp_path / "m.onnx.data").write_text("mine")
    export.to_onnx(nn.Linear(64, 2), path, x)
    export.to_onnx(nn.Linear(64, 2), path, x)
    assert (tmp_path / "m.onnx.data").read_text() == "mine"


# -- what OpenVINO does by itself ------------------------------------------------------------------


def test_the_difference_told_is_that_of_the_default(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    real = openvino_model._compiled

    def coarse(path: Path, options: dict[str, str]) -> tuple[float, Any]:
        """As on a processor where it chooses bfloat16."""
        return real(path, options or {"INFERENCE_PRECISION_HINT": "bf16"})

    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(4, 64)
    monkeypatch.setattr(openvino_model, "_compiled", coarse)
    report = export.to_openvino(model, tmp_path / "m.xml", x)
    if "computes in bf16" not in report.brings:
        pytest.skip("OpenVINO computes in float32 only on this processor")
    assert 1e-5 < report.relative < 3e-2
    assert "INFERENCE_PRECISION_HINT=f32 it differs by at most" in str(report)
