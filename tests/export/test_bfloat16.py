"""bfloat16 models as float32 graphs: the very same weights, in the bytes of bfloat16."""

from __future__ import annotations

import copy
import itertools
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

from torchprune.export import narrow_weights, onnx_model, packing_pass, to_onnx  # noqa: E402
from torchprune.export.bfloat16 import in_float32  # noqa: E402
from torchprune.export.promises import SizesError  # noqa: E402
from torchprune.study.proofs.onnx_weights import read_graph, weights_in  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # while exporting, of third parties

BFLOAT16, FLOAT = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT


def held(path: Path) -> dict[str, Any]:
    """The large initialisers of a file."""
    tensors = onnx.load(str(path)).graph.initializer
    return {t.name: t for t in tensors if np.prod(t.dims) > 128}


def loaded(path: Path, folder: Path) -> tuple[list[np.ndarray], set[str]]:
    """Constants that a session holds in float32, and the operators that it is left with."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(str(folder / "optimized.onnx")).graph
    assert not [t.name for t in graph.initializer if t.data_type == BFLOAT16]
    arrays = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == FLOAT]
    return arrays, {node.op_type for node in graph.node}


def weights_of(model: nn.Module) -> dict[str, np.ndarray]:
    """A model's weights of two axes and more, masks folded, in float32."""
    folded = torchprune.fold(copy.deepcopy(model))
    return {k: p.detach().float().numpy() for k, p in folded.named_parameters() if p.dim() > 1}


def bytes_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def stack(*sizes: int, share: float = 0.5) -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers).bfloat16()
    return torchprune.sparsify(model, MagnitudeSpec(share), progress=False)


# -- the pass --------------------------------------------------------------------------------------


def graph_of(weights: dict[str, np.ndarray]) -> Any:
    """A graph that gives its weights."""
    inits, nodes = [], []
    for name, weight in weights.items():
        tensor = ir.tensor(weight, name=name)
        inits.append(ir.Value(name=name, const_value=tensor))
        inits[-1].dtype, inits[-1].shape = tensor.dtype, ir.Shape(weight.shape)
        nodes.append(ir.node("Identity", [inits[-1]]))
        out = nodes[-1].outputs[0]
        out.name, out.dtype, out.shape = f"{name}.out", tensor.dtype, ir.Shape(weight.shape)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(
        [], outputs, nodes=nodes, initializers=inits, opset_imports={"": 18}, name="weights"
    )
    return ir.Model(graph, ir_version=10)


KINDS = ("bfloat16", "subnormal", "infinite", "nan", "one float32", "float32")


def drawn(kind: str, shape: tuple[int, ...], share: float, generator: Any) -> np.ndarray:
    """Random numbers of a kind, a share of them zero."""
    bits = np.asarray(generator.integers(0, 1 << 32, shape, np.uint32) & 0xFFFF0000)
    bits = bits.reshape(shape)
    bits[np.isnan(bits.view(np.float32)) | np.isinf(bits.view(np.float32))] = 0x3F800000
    flat = bits.reshape(-1)
    flat[: int(share * flat.size)] = 0
    if flat.size and kind != "bfloat16":
        special = {"subnormal": 0x00010000, "infinite": 0xFF800000, "nan": 0xFFC10000}
        flat[-1] = special.get(kind, 0x3F800001)
    if kind == "float32":
        bits |= 1
    shuffled = generator.permutation(flat).reshape(shape)
    return np.ascontiguousarray(shuffled).view(np.float32)


SHAPES = st.lists(st.integers(1, 99), min_size=0, max_size=2).map(tuple)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), SHAPES, st.sampled_from([0.0, 0.5, 0.9, 1.0]))),
    st.integers(1, 60),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_weights_are_loaded_to_the_bit_and_never_larger(
    kinds: list[tuple[str, tuple[int, ...], float]], letters: int, packing: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    weights = {
        f"{at}{'n' * letters}": drawn(kind, shape, share, generator)
        for at, (kind, shape, share) in enumerate(kinds)
    }
    model = graph_of(weights)
    plain = len(ir.to_proto(model).SerializeToString())
    narrowed = narrow_weights.narrow_initializers(model)
    for (kind, _, _), (name, weight) in zip(kinds, weights.items(), strict=True):
        exact = kind in ("bfloat16", "subnormal", "infinite")
        assert name not in narrowed or exact
        assert name in narrowed or not exact or weight.nbytes < 2 * (100 + letters + 20)
    dense = len(ir.to_proto(model).SerializeToString())
    assert dense <= plain
    assert (dense < plain) is bool(narrowed)
    packed = packing_pass.pack_initializers(model, 0.25) if packing else []
    after = len(ir.to_proto(model).SerializeToString())
    assert (after < dense) if packed else after == dense
    if not weights:
        return
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    unsigned = {p.name for p in packed}  # of whose zeros the signs are lost
    for found, (name, weight) in zip(session.run(None, {}), weights.items(), strict=True):
        expected = weight + 0.0 if name in unsigned else weight
        assert found.dtype == np.float32
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("letters", [1, 70, 140])
def test_the_smallest_that_is_narrowed_is_smaller_so(letters: int) -> None:
    name, least = "n" * letters, (100 + letters) // 2 + 1
    for size in (1, 10, 30, least - 1, least):
        model = graph_of({name: np.ones(size, np.float32)})
        plain = len(ir.to_proto(model).SerializeToString())
        narrowed = narrow_weights.narrow_initializers(model)
        assert bool(narrowed) is (len(ir.to_proto(model).SerializeToString()) < plain)
        assert bool(narrowed) is (size == least)


def test_what_would_be_cast_in_every_run_stays_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow_weights, "LARGEST", 4000)
    model = graph_of({"large": np.ones((32, 32), np.float32), "small": np.ones((30, 30), "f4")})
    assert narrow_weights.narrow_initializers(model) == ["small"]


# -- models ----------------------------------------------------------------------------------------


def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, groups=2))
    return torchprune.sparsify(model.bfloat16(), MagnitudeSpec(), progress=False)


NAMES = ["llama", "gpt2", "bert", "vit", "t5", "mixtral", "mlp", "cnn"]


@pytest.mark.parametrize("name", sample(NAMES, "vit", "cnn"))
def test_a_session_holds_the_models_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_pass, "CHAIN", -(1 << 20))  # small weights are packed too
    if name == "cnn":
        model, data = cnn(), torch.randn(2, 8, 9, 9).bfloat16()
    else:
        model, data = pruned(name, torch.bfloat16), FAMILIES[name].data(torch.bfloat16)[0]
    before = fingerprint(model)
    path = tmp_path / "m.onnx"
    report = to_onnx(model, path, data)
    assert_as_it_was(model, before)
    assert report.relative < 1e-5  # of torch in float32; bfloat16 is a hundred times as far
    assert len(report.packed) > 1
    assert "of bfloat16 and its graph of float32" in str(report)
    assert report.bytes == path.stat().st_size
    arrays, operators = loaded(path, tmp_path)
    assert not operators & {"Compress", "ScatterElements"}
    found = {(a.shape, a.tobytes()) for a in arrays}
    for key, weight in weights_of(model).items():
        turned = np.ascontiguousarray(weight.swapaxes(-1, -2))
        ways = {(weight.shape, weight.tobytes()), (turned.shape, turned.tobytes())}
        assert ways & found, key
    for one in weights_in(read_graph(path)):  # as `torchprune verify` reads it
        if one.value.is_floating_point():
            assert (tuple(one.value.shape), one.value.numpy().tobytes()) in found
    kinds = [i.type for i in (*session_of(path).get_inputs(), *session_of(path).get_outputs())]
    assert set(kinds) <= {"tensor(float)", "tensor(int64)"}


def session_of(path: Path) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("weights", "share"), [("dense", 1.0), ("packed", 0.5 + 1 / 16)])
def test_the_file_is_as_large_as_the_model(weights: str, share: float, tmp_path: Path) -> None:
    model = stack(512, 512, 512)
    report = to_onnx(model, tmp_path / "m.onnx", torch.randn(2, 512), weights=weights)
    assert report.dense_bytes == pytest.approx(bytes_of(model), rel=5e-3)
    assert report.bytes == pytest.approx(share * bytes_of(model), rel=1e-2)


def test_a_mixture_is_taken_and_keys_and_values_are_float32(tmp_path: Path) -> None:
    model: Any = pruned("llama", torch.bfloat16)
    norm = model.model.norm
    norm.weight = nn.Parameter(torch.rand(32))
    model.model.rotary_emb.inv_freq = torch.rand(4)
    ids = torch.randint(3, 60, (2, 6))
    with pytest.raises(RuntimeError, match="dtype"):
        model(ids)  # so in torch, not in the copy
    report = to_onnx(model, tmp_path / "m.onnx", ids, with_cache=True)
    assert report.relative < 1e-5
    assert not report.unmoved
    assert norm.weight.dtype is torch.float32
    tensors = onnx.load(tmp_path / "m.onnx").graph.initializer
    floats = {t.raw_data for t in tensors if t.data_type == FLOAT}
    for tensor in (norm.weight, model.model.rotary_emb.inv_freq):
        assert tensor.detach().numpy().tobytes() in floats
    made = session_of(report.path)
    kinds = {i.name: i.type for i in (*made.get_inputs(), *made.get_outputs())}
    assert {k for n, k in kinds.items() if "past" in n or "present" in n} == {"tensor(float)"}
    assert kinds["logits"] == "tensor(float)"


def t5() -> tuple[nn.Module, Tensor]:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=61, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config), torch.randint(3, 60, (2, 8))


def whisper() -> tuple[nn.Module, Tensor]:
    """Its example is of bfloat16 too."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    widths = {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"max_source_positions": 10, "max_target_positions": 64, "num_mel_bins": 8}
    config = WhisperConfig(vocab_size=61, d_model=32, **layers, **heads, **widths, **ids, **sizes)
    return WhisperForConditionalGeneration(config), torch.randn(2, 8, 20).bfloat16()


WRITERS = {"t5": t5, "whisper": whisper}


@pytest.mark.parametrize("name", sample(WRITERS, "t5"))
def test_a_merged_decoder_holds_bfloat16_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_pass, "CHAIN", -(1 << 20))  # small weights are packed too
    torch.manual_seed(0)
    model, example = WRITERS[name]()
    model = torchprune.sparsify(model.bfloat16().eval(), MagnitudeSpec(), progress=False)
    report = to_onnx(model, tmp_path / "graphs", example, with_cache=True)
    assert report.relative < 1e-5
    assert "of bfloat16" in str(report)
    for part_name, part in report.parts.items():
        large = held(part.path)
        raw = [t.raw_data for t in large.values()]
        assert len(raw) == len(set(raw)) > 8, part_name
        assert not [t.name for t in large.values() if t.data_type == FLOAT]
        assert part.packed
        _, operators = loaded(part.path, tmp_path)
        assert not operators & {"Compress", "ScatterElements"}


def test_large_models_have_their_weights_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stack(256, 256)
    monkeypatch.setattr("torchprune.export.onnx_graph.EXTERNAL", bytes_of(model) + 1000)
    within = to_onnx(model, tmp_path / "m.onnx", torch.randn(2, 256), weights="dense")
    assert within.data is None  # float32 would be more
    monkeypatch.setattr("torchprune.export.onnx_graph.EXTERNAL", 1000)
    report = to_onnx(model, tmp_path / "m.onnx", torch.randn(2, 256), weights="dense")
    assert report.data is not None
    assert report.data.stat().st_size == pytest.approx(bytes_of(model), abs=5000)
    assert report.relative < 1e-5


def test_int8_is_of_the_float32_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(61, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    torchprune.sparsify(model.bfloat16(), MagnitudeSpec(), progress=False)
    wide = in_float32(torchprune.fold(copy.deepcopy(model)))
    ids = torch.randint(3, 60, (2, 8))
    report, wider = (
        to_onnx(one, tmp_path / f"{name}.onnx", ids, int8=True)
        for name, one in {"narrow": model, "wide": wide}.items()
    )
    assert report.difference == wider.difference
    assert report.bytes < wider.bytes - 61 * 64
    tensors = onnx.load(report.path).graph.initializer
    kinds = {t.name: t.data_type for t in tensors}
    assert kinds["0.weight"] == BFLOAT16
    assert kinds["1.weight_quantized"] == onnx.TensorProto.INT8
    assert "what is not int8 in its graph is float32" in str(report)


class Falling(nn.Module):
    """Names its dtype in a module, has a constant of it, and a layer that remembers its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.bfloat16
        self.scale = torch.tensor([0.5, 2.0]).bfloat16()
        self.layers = nn.LSTM(8, 8, batch_first=True)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layers(x.to(self.dtype))
        return self.other(self.one(y)) * self.scale[0]


def test_the_copy_is_tied_as_the_model_and_shares_nothing_that_is_wider() -> None:
    model = Falling().bfloat16()
    before = fingerprint(model)
    wide: Any = in_float32(model)
    assert wide.one.weight is wide.other.weight
    assert {t.dtype for t in wide.state_dict().values()} == {torch.float32}
    x = torch.randn(2, 3, 8)
    expected = copy.deepcopy(model)
    expected.dtype, expected.scale = torch.float32, model.scale.float()
    assert torch.equal(wide(x), expected.float()(x))
    assert_as_it_was(model, before)
    assert model.dtype is torch.bfloat16


def test_sizes_that_do_not_hold_are_fixed_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = onnx_model.graph_of, list[bool]()

    def first_fails(call: Any) -> Any:
        seen.append(call.widened)
        if len(seen) == 1:
            raise SizesError("not at others")
        return honest(call)

    monkeypatch.setattr(onnx_model, "graph_of", first_fails)
    model = stack(64, 64)
    report = to_onnx(model, tmp_path / "m.onnx", torch.randn(2, 64).bfloat16(), weights="dense")
    assert seen == [True, True]
    assert report.note == "not at others"
    assert report.bytes < 1.1 * bytes_of(model)


# -- other readers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sample(["mlp", "llama", "vit"], "mlp"))
def test_openvino_keeps_bfloat16_in_the_file(name: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    from torchprune.export import to_openvino

    model = pruned(name, torch.bfloat16)
    data = FAMILIES[name].data(torch.bfloat16)[0]
    report = to_openvino(model, tmp_path / "m.xml", data)
    assert report.data is not None
    wide = in_float32(torchprune.fold(copy.deepcopy(model)))
    wider = to_openvino(wide, tmp_path / "w.xml", FAMILIES[name].data()[0])
    assert wider.data is not None
    assert report.data.stat().st_size < 0.65 * wider.data.stat().st_size
    arrays = set()
    for node in openvino.Core().read_model(report.path).get_ordered_ops():
        if node.get_type_name() == "Constant" and len(node.shape) > 1:
            kind = node.get_element_type().get_type_name()
            array = node.data
            if kind == "bf16":
                array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            arrays.add((array.shape, array.tobytes()))
    for key, weight in weights_of(model).items():
        turned = np.ascontiguousarray(weight.swapaxes(-1, -2))
        if weight.size > 128:
            assert {(w.shape, w.tobytes()) for w in (weight, turned)} & arrays, key
    assert "nearer to what the weights mean" in str(report)


def test_openvino_in_eight_bits_too(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from torchprune.export import to_openvino

    model, x = stack(64, 64), torch.randn(4, 64).bfloat16()
    report = to_openvino(model, tmp_path / "m.xml", x, int8=True, data=[x, x])
    assert report.bytes < bytes_of(model) + 20_000
    assert report.relative < 0.1


def test_times_are_measured_of_what_such_files_take(tmp_path: Path) -> None:
    from torchprune.export.loaded_files import example_of, loaded_file

    model, x = stack(64, 64), torch.randn(2, 64).bfloat16()
    report = to_onnx(model, tmp_path / "m.onnx", x)
    (found,) = loaded_file(report, example_of(report, model, x, with_cache=False)).run()  # type: ignore[misc]
    assert found.dtype == np.float32


# -- refusals --------------------------------------------------------------------------------------


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ torch.eye(8, dtype=torch.bfloat16)


def test_what_cannot_be_computed_in_float32_says_so(tmp_path: Path) -> None:
    x = torch.randn(2, 8).bfloat16()
    with pytest.raises(ExportError, match="called with the example in float32: RuntimeError"):
        to_onnx(Stubborn().bfloat16(), tmp_path / "m.onnx", x)
    mixed = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8).half())
    match = r"all float32 or bfloat16 or all float16, got torch\.bfloat16, torch\.float16"
    with pytest.raises(ExportError, match=match):
        to_onnx(mixed, tmp_path / "m.onnx", x)
    assert not list(tmp_path.iterdir())
