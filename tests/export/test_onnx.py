"""ONNX: what ONNX Runtime computes from the written file, and what the file holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import assert_as_it_was, fingerprint
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved import pruned
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import ExportError

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
ir = pytest.importorskip("onnx_ir", reason="the extra onnx is not installed")

from torchprune.export import packing_pass, to_onnx, unpacking_stages  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # while exporting, of third parties
NAMES = ["llama", "qwen3", "gpt2", "opt", "bert", "vit", "t5", "mixtral"]
CHAIN = {"Gather", "Compress", "ScatterElements"}

TABLES = packing_pass.SHARED
"""Bytes of what all packed weights share, at most."""


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(path)).graph.node}


def session(path: Path, optimized: Path | None = None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, *inputs: Tensor) -> list[Any]:
    made = session(path)
    names = [i.name for i in made.get_inputs()]
    return made.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})


def places_in(path: Path) -> list[str]:
    """Folders of this machine that a file names: of the tests, the libraries, the file itself."""
    packages = [sys.modules[name] for name in ("torch", "torchprune", "transformers")]
    folders = [Path(str(package.__file__)).parent for package in packages]
    held = path.read_bytes()
    named = [str(f) for f in (*folders, Path(__file__).parents[1], path.parent)]
    return [f for f in named if f.encode() in held]


# -- the packing pass -----------------------------------------------------------------------------


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([0.25, 0.5, 0.9, 1.0]),
    st.sampled_from([np.float32, np.float16]),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_unpacked_weights_are_bit_equal(
    rows: int, cols: int, share: float, dtype: Any, pieces: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, cols)).astype(dtype)
    zero = generator.permutation(rows * cols)[: int(np.ceil(share * rows * cols))]
    weight.reshape(-1)[zero] = 0
    if rows * cols > 3:
        tiny = np.finfo(dtype).smallest_subnormal
        kept = np.flatnonzero(weight.reshape(-1))
        weight.reshape(-1)[kept[:1]] = tiny
    pays = 8 * -(-rows * cols // (8 * pieces))
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("CHAIN", -(1 << 20)), ("SHARED", -1), ("PIECE", pays)):
            patch.setattr(packing_pass, name, number)
        for stages in ("SMALLEST",) if pieces > 2 else ():
            patch.setattr(unpacking_stages, stages, 1)
        model = holding({"w": weight})
        (packed,) = packing_pass.pack_initializers(model, 0.2)
    assert packed.name == "w"
    assert packed.before == weight.nbytes
    made = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    (found,) = made.run(None, {})
    assert found.dtype == weight.dtype
    assert found.tobytes() == weight.tobytes()


def holding(weights: dict[str, Any]) -> Any:
    """A graph that gives its weights."""
    inits, nodes = [], []
    for name, weight in weights.items():
        tensor = ir.tensor(weight, name=name)
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
        )
        inits.append(value)
        nodes.append(ir.node("Identity", [value]))
        out = nodes[-1].outputs[0]
        out.name, out.dtype, out.shape = f"{name}.out", tensor.dtype, tensor.shape
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=inits, opset_imports={"": 18})
    return ir.Model(graph, ir_version=10)


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 100),
            st.integers(1, 100),
            st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]),
            st.sampled_from([np.float32, np.float16, np.int8]),
        ),
        max_size=4,
    ),
    st.integers(1, 80),
)
def test_a_packed_graph_is_never_larger_than_a_dense_one(
    weights: list[tuple[int, int, float, Any]], letters: int
) -> None:
    made = {}
    for at, (rows, cols, share, dtype) in enumerate(weights):
        weight = np.ones(rows * cols, dtype)
        weight[: int(share * rows * cols)] = 0
        made[f"{at}{'n' * letters}"] = (
            np.random.default_rng(at).permutation(weight).reshape(rows, -1)
        )
    dense, packed = holding(made), holding(made)
    found = packing_pass.pack_initializers(packed, 0.25)
    sizes = [len(ir.to_proto(model).SerializeToString()) for model in (dense, packed)]
    assert sizes[1] <= sizes[0]
    assert bool(found) is (sizes[1] < sizes[0])


def test_narrow_layers_stay_dense_and_the_report_says_what_is_on_disk(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 64))
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    report = to_onnx(model, tmp_path / "m.onnx", torch.randn(2, 64))
    assert not report.packed
    assert report.bytes == report.dense_bytes == report.path.stat().st_size


PEAK = """
import sys, onnxruntime
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_a_large_packed_graph_opens_in_little_more_memory_than_a_dense_one(tmp_path: Path) -> None:
    generator, weights = np.random.default_rng(0), {}
    for at in range(30):
        weights[f"w{at}"] = generator.standard_normal((512, 768)).astype(np.float32)
        weights[f"w{at}"][generator.random((512, 768)) < 0.5] = 0
    dense, packed = chained(weights), chained(weights)
    assert len(packing_pass.pack_initializers(packed, 0.25)) == 30
    peaks, found = [], []
    for name, model in (("dense", dense), ("packed", packed)):
        path = tmp_path / f"{name}.onnx"
        ir.save(model, path)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
        found += run(path, torch.ones(2, 512))
    assert peaks[1] < 1.6 * peaks[0]  # 4 times, were all unpacked at once
    assert found[0].tobytes() == found[1].tobytes()


def chained(weights: dict[str, Any]) -> Any:
    """A graph of products, each with the sum of the one before."""
    model = holding(weights)
    graph = model.graph
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 512]))
    graph.inputs.append(x)
    axis = ir.tensor(np.array([1]), name="axis")
    graph.register_initializer(ir.Value(name="axis", const_value=axis))
    for node in list(graph):
        (weight,) = node.inputs
        product = ir.node("MatMul", [x, weight])
        total = ir.node("ReduceMean", [product.outputs[0], graph.initializers["axis"]])
        scaled = ir.node("Add", [x, total.outputs[0]])
        graph.insert_before(node, [product, total, scaled])
        x = scaled.outputs[0]
        node.replace_input_with(0, x)
    graph.outputs[:] = [x]
    for node in [node for node in graph if node.op_type == "Identity"]:
        graph.remove(node)
    x.name, x.type, x.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 512])
    return model


# -- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sample(NAMES, "gpt2", "t5", "mixtral"))
def test_families_compute_the_same_in_the_runtime(name: str, tmp_path: Path) -> None:
    model = pruned(name)
    before = fingerprint(model)
    path = tmp_path / "model.onnx"
    report = to_onnx(model, path, FAMILIES[name].data()[0])
    assert_as_it_was(model, before)
    assert report.relative < 1e-5
    assert report.packed
    assert report.bytes == path.stat().st_size < report.dense_bytes
    assert operators(path) >= CHAIN
    assert not places_in(path)
    session(path, tmp_path / "optimized.onnx")
    assert not operators(tmp_path / "optimized.onnx") & {"BitShift", "BitwiseAnd"}  # all folded
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_convolutions_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, groups=2))
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    report = to_onnx(model, tmp_path / "cnn.onnx", torch.randn(2, 8, 9, 9))
    assert len(report.packed) == 2
    for batch in (1, 5):
        x = torch.randn(batch, 8, 9, 9)
        (found,) = run(tmp_path / "cnn.onnx", x)
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_packed_and_dense_files_compute_the_same_bits(tmp_path: Path) -> None:
    model = pruned("llama", pattern="2:4")
    batch = FAMILIES["llama"].data()[0]
    packed = to_onnx(model, tmp_path / "packed.onnx", batch)
    dense = to_onnx(model, tmp_path / "dense.onnx", batch, weights="dense")
    assert not dense.packed
    assert not operators(tmp_path / "dense.onnx") & {"BitShift"}
    assert packed.dense_bytes == pytest.approx(dense.bytes, abs=300)
    for rows, length in ((1, 1), (3, 9)):
        tokens = torch.randint(0, 50, (rows, length))
        (one,), (other,) = (run(tmp_path / f"{n}.onnx", tokens) for n in ("packed", "dense"))
        assert one.tobytes() == other.tobytes()
        with torch.no_grad():
            expected = model(tokens).logits
        torch.testing.assert_close(torch.from_numpy(one), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.532), (torch.float16, 0.564)])
def test_half_of_the_weights_take_little_more_than_half_of_the_file(
    dtype: torch.dtype, share: float, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).to(dtype)
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    x = torch.randn(2, 1024).to(dtype)
    report = to_onnx(model, tmp_path / "m.onnx", x)
    assert report.bytes <= share * 1024 * 1024 * dtype.itemsize + 3000 + TABLES
    assert f"{report.bytes:,} bytes" in str(report)
    assert "runs at dense speed" in str(report)


def test_lowered_models_are_lifted_in_the_file(tmp_path: Path) -> None:
    model = torchprune.lower(pruned("llama"), "bitmask")
    batch = FAMILIES["llama"].data()[0]
    report = to_onnx(model, tmp_path / "m.onnx", batch)
    assert len(report.packed) == 14  # all but the embedding
    assert any("BitmaskLinear" in type(m).__name__ for m in model.modules())


def test_large_models_have_their_weights_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchprune.export.onnx_graph.EXTERNAL", 1000)
    model, batch = pruned("llama"), FAMILIES["llama"].data()[0]
    report = to_onnx(model, tmp_path / "m.onnx", batch)
    assert report.data == tmp_path / "m.onnx.data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    (found,) = run(tmp_path / "m.onnx", batch)
    torch.testing.assert_close(
        torch.from_numpy(found), model(batch).logits.detach(), rtol=1e-4, atol=1e-5
    )


# -- refusals -------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if bool(y.sum() > 0) else -y


@pytest.mark.parametrize(
    ("make", "example", "options", "match"),
    [
        (lambda: nn.Linear(64, 64).double(), torch.ones(1, 64).double(), {}, "float64"),
        (lambda: nn.Linear(64, 64), torch.ones(1, 64), {"weights": "small"}, "'dense', 'kernels'"),
        (lambda: nn.Linear(64, 64), 7, {}, "must be a tensor"),
        (lambda: nn.Linear(64, 64), torch.ones(1, 64), {"with_cache": True}, "token ids"),
        (Branching, torch.ones(2, 64), {}, "could not export"),
    ],
)
def test_what_cannot_be_written_says_why(
    make: Any, example: Any, options: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=match):
        to_onnx(make(), tmp_path / "m.onnx", example, **options)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_computes_otherwise_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = packing_pass._cut
    monkeypatch.setattr(packing_pass, "_cut", lambda flat: honest(np.roll(flat, 1)))
    old = tmp_path / "m.onnx"
    old.write_text("an older file")
    with pytest.raises(ExportError, match="computes otherwise"):
        to_onnx(pruned("llama"), old, FAMILIES["llama"].data()[0])
    assert old.read_text() == "an older file"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_without_the_extra_it_is_named() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import torch, torchprune.export\n"
        "try:\n    torchprune.export.to_onnx(torch.nn.Linear(2, 2), 'x.onnx', torch.ones(1, 2))\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs the package 'onnxruntime': pip install 'torchprune[onnx]'" in done.stdout


# -- int8 on top ----------------------------------------------------------------------------------


def initializers(path: Path) -> dict[str, Any]:
    return {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(str(path)).graph.initializer}


@pytest.mark.parametrize("name", sample(["llama", "bert", "mlp"], "bert", "mlp"))
def test_int8_keeps_zeros_and_packs_what_is_left(name: str, tmp_path: Path) -> None:
    model, batch = pruned(name), FAMILIES[name].data()[0]
    plain = to_onnx(model, tmp_path / "plain.onnx", batch, weights="dense")
    dense = to_onnx(model, tmp_path / "dense.onnx", batch, weights="dense", int8=True)
    packed = to_onnx(model, tmp_path / "packed.onnx", batch, int8=True)
    assert "int8 is what is faster" in str(packed)
    assert dense.bytes < plain.bytes
    assert 0 < dense.relative < 0.3
    floats, integers = initializers(plain.path), initializers(dense.path)
    quantized = [key for key in floats if f"{key}_quantized" in integers]
    assert len(quantized) >= (3 if name == "mlp" else 12)
    for key in quantized:
        found, scale = integers[f"{key}_quantized"], integers[f"{key}_scale"]
        assert found.dtype == np.int8
        assert not integers[f"{key}_zero_point"].any()
        ways = [w for w in (floats[key], floats[key].T) if w.shape == found.shape]  # Gemm turns it
        near = [w for w in ways if np.all(np.abs(found * scale - w) <= 0.51 * scale)]
        assert near, key
        assert not found[near[0] == 0].any()
    inputs = list(batch.values()) if isinstance(batch, dict) else [batch]
    for a, b in zip(run(packed.path, *inputs), run(dense.path, *inputs), strict=True):
        assert np.array_equal(a, b)


def test_int8_makes_a_large_weight_a_sixth_of_its_size(tmp_path: Path) -> None:
    model = torchprune.sparsify(nn.Linear(1024, 1024), MagnitudeSpec(), progress=False)
    report = to_onnx(model, tmp_path / "m.onnx", torch.randn(2, 1024), int8=True)
    assert report.bytes < (1 / 8 + 1 / 2) * 1024 * 1024 + 16 * 1024 + TABLES
    assert report.packed == ["weight_quantized"]


def test_named_weights_stay_float(tmp_path: Path) -> None:
    model, batch = pruned("llama"), FAMILIES["llama"].data()[0]
    ignore = ["*.down_proj.*", "lm_head.weight"]
    to_onnx(model, tmp_path / "m.onnx", batch, weights="dense", int8=True, int8_ignore=ignore)
    kept = [key for key in initializers(tmp_path / "m.onnx") if key.endswith("_quantized")]
    assert any("up_proj" in key for key in kept)
    assert not any("down_proj" in key or "lm_head" in key for key in kept)


def test_int8_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    model, x, path = nn.Linear(8, 8), torch.randn(2, 8), tmp_path / "m.onnx"
    with pytest.raises(ExportError, match="'nope' fits none of weight"):
        to_onnx(model, path, x, int8=True, int8_ignore=["nope"])
    with pytest.raises(ExportError, match="no product with a weight"):
        to_onnx(model, path, x, int8=True, int8_ignore=["*"])
    with pytest.raises(ExportError, match="int8_ignore is for int8=True"):
        to_onnx(model, path, x, int8_ignore=["*"])
    with pytest.raises(ExportError, match="all float32"):
        to_onnx(nn.Linear(8, 8).half(), path, x.half(), int8=True)
    assert not list(tmp_path.iterdir())
