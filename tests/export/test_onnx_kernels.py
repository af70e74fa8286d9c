"""Models whose packed products ONNX Runtime multiplies by our operators, and files beside."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import assert_as_it_was, fingerprint
from commands import complaint, worked
from families import FAMILIES
from saved import pruned
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import CheckpointError, ExportError
from torchprune.lowering.bitmask import SLACK, Bitmask
from torchprune.lowering.kernels.build import BuildError

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from onnx import TensorProto, numpy_helper  # noqa: E402

from torchprune.export import onnx_kernels, to_onnx  # noqa: E402
from torchprune.export.call import prepare  # noqa: E402
from torchprune.export.loaded_files import loaded_file  # noqa: E402
from torchprune.study.proofs.onnx_weights import read_graph, weights_in  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # while exporting, of third parties


# -- models ----------------------------------------------------------------------------------------


def convolved() -> nn.Module:
    """A lowered convolution, and a linear layer."""
    torch.manual_seed(0)
    layers = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 16)
    model = torchprune.sparsify(nn.Sequential(*layers), MagnitudeSpec(), progress=False)
    return torchprune.lower(model, "bitmask", targets=["0", "3"])


def given_to(name: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    if name == "convolved":
        return convolved(), torch.randn(2, 16, 6, 6)
    return pruned(name, dtype), FAMILIES[name].data(dtype)[0]


def stack(*sizes: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).to(dtype).eval()
    return torchprune.sparsify(model, MagnitudeSpec(), progress=False)


def run(report: Any, inputs: dict[str, Any] | None = None) -> list[np.ndarray]:
    options = ort.SessionOptions()
    if report.library is not None:
        options.register_custom_ops_library(str(report.library))
    made = ort.InferenceSession(str(report.path), options)
    found: list[np.ndarray] = made.run(None, inputs)
    return found


NAMES = ["llama", "qwen3", "gemma", "mixtral", "gpt2", "opt", "bert", "t5", "vit", "mlp"]
MODELS = [
    *((name, torch.float32) for name in [*NAMES, "torch_encoder", "convolved"]),
    *((name, dtype) for name in NAMES for dtype in (torch.float16, torch.bfloat16)),
]
CASES = {f"{name}-{str(dtype)[6:]}": (name, dtype) for name, dtype in MODELS}


@pytest.mark.parametrize(
    "case",
    sample(CASES, "llama-float32", "gpt2-bfloat16", "convolved-float32", "bert-float16"),
)
def test_models_compute_as_in_torch(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_kernels, "_ENTRIES", -(1 << 20))  # small weights are packed too
    name, dtype = CASES[case]
    model, data = given_to(name, dtype)
    before = fingerprint(model)
    report = to_onnx(model, tmp_path / "m.onnx", data, weights="kernels")
    assert_as_it_was(model, before)
    assert report.relative < (3e-2 if dtype is torch.float16 else 1e-4)
    assert report.library == tmp_path / "m.onnxruntime.so"
    graph = read_graph(report.path)
    assert graph.products
    operators = {node.op_type for node in onnx.load(report.path).graph.node}
    assert ("BitmaskUnpack" if name == "convolved" else "BitmaskLinear") in operators
    if dtype is torch.bfloat16:
        kinds = {graph.constants[parts[1]].data_type for parts in graph.products}
        assert kinds == {TensorProto.BFLOAT16}
    owned = {f"{n}.weight": m for n, m in torchprune.fold(copy.deepcopy(model)).named_modules()}
    multiplied = 0
    for one in weights_in(graph):
        if one.packed and one.name in owned:
            weight = owned[one.name].weight.detach().float()
            ways = [weight.flatten(2).transpose(1, 2).flatten(1)] if weight.dim() > 2 else []
            ways += [weight, weight.T] if weight.dim() == 2 else []
            assert any(torch.equal(one.value.float(), way) for way in ways), one.name
            multiplied += 1
    assert multiplied >= min(2, len(report.packed))


def test_a_file_is_as_large_as_its_parts_and_unpacks_nothing(tmp_path: Path) -> None:
    model = stack(512, 768, 512)
    report = to_onnx(model, tmp_path / "m.onnx", torch.randn(3, 512), weights="kernels")
    assert report.packed == ["0.weight", "2.weight"]
    parts = sum(Bitmask.pack(m.weight.detach()).nbytes for m in model[::2])
    own = report.path.stat().st_size
    assert parts < own < parts + 10_000
    library = tmp_path / "m.onnxruntime.so"
    assert report.bytes == own + library.stat().st_size
    dense = to_onnx(model, tmp_path / "d.onnx", torch.randn(3, 512), weights="dense")
    assert report.dense_bytes == pytest.approx(dense.bytes, rel=1e-2)
    assert dense.library is None
    held = onnx.load(report.path)
    assert [n.op_type for n in held.graph.node] == ["BitmaskLinear", "Relu", "BitmaskLinear"]
    said = str(report)
    assert f"load {library} before it: SessionOptions.register_custom_ops_library" in said
    call = prepare(model, torch.randn(3, 512), with_cache=False, dynamic_shapes=None, vary=False)
    ready = loaded_file(report, call)
    ready.run()
    assert ready.kernels is not None
    assert len(ready.kernels().sparse) == 2  # as ONNX Runtime's own profile tells


def test_lowered_layers_stay_so_and_int8_is_theirs(tmp_path: Path) -> None:
    x = torch.randn(5, 256)
    plain, lowered = stack(256, 192, 64), stack(256, 192, 64)
    torchprune.lower(lowered, "bitmask", dtype=torch.int8)
    kept = to_onnx(lowered, tmp_path / "l.onnx", x, weights="kernels")
    made = to_onnx(plain, tmp_path / "p.onnx", x, weights="kernels", int8=True)
    assert kept.relative < 1e-5
    assert 1e-3 < made.relative < 3e-2  # of the model that was given
    assert kept.packed == made.packed == ["0.weight", "2.weight"]
    assert np.array_equal(run(kept, {"input": x.numpy()}), run(made, {"input": x.numpy()}))
    weights = {w.name: w.value for w in weights_in(read_graph(made.path)) if w.packed}
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            assert weights[f"{name}.weight"].dtype is torch.int8
            assert not weights[f"{name}.weight"][
                torchprune.masks(plain)[f"{name}.weight"] == 0
            ].any()
    some = to_onnx(plain, tmp_path / "s.onnx", x, weights="kernels", int8=True, int8_ignore=["2.*"])
    kinds = {w.name: w.value.dtype for w in weights_in(read_graph(some.path)) if w.packed}
    assert kinds == {"0.weight": torch.int8, "2.weight": torch.float32}
    assert "Nonzeros are rounded to eight bits, activations are not" in str(some)


def test_lowered_layers_of_bfloat16_without_any_parameter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96, bias=False), nn.ReLU()).bfloat16()
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    torchprune.lower(model, "bitmask")
    x = torch.randn(3, 128).bfloat16()
    report = to_onnx(model, tmp_path / "m.onnx", x, weights="kernels")
    assert report.relative < 1e-5  # of torch in float32
    (found,) = run(report, {"input": x.float().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).float(), rtol=2e-2, atol=2e-2)
    graph = read_graph(report.path)
    (parts,) = graph.products
    assert graph.constants[parts[1]].data_type == TensorProto.BFLOAT16


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_layers_with_one_mask_share_its_bits_and_keep_their_names(
    int8: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(40, 40, bias=False) for _ in range(3)]
    kept = torch.rand(40, 40) < 0.5
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(kept)
        layers[2].weight.copy_(2 * layers[0].weight)  # the same codes, other scales
    model, x = nn.Sequential(*layers), torch.randn(2, 40)
    report = to_onnx(model, tmp_path / "m.onnx", x, weights="kernels", int8=int8)
    assert report.packed == ["0.weight", "1.weight", "2.weight"]
    graph = read_graph(report.path)
    assert len({parts[0] for parts in graph.products}) == (2 if int8 else 1)  # codes of 0
    found = {w.name: w.value for w in weights_in(graph)}
    assert found.keys() == set(report.packed)
    if int8:
        assert len({parts[1] for parts in graph.products}) == 2
        assert torch.equal(found["0.weight"], found["2.weight"])
    else:
        for name, value in found.items():
            assert torch.equal(value, model.get_parameter(name)), name
    assert report.library is not None
    own = report.bytes - report.library.stat().st_size
    dense = to_onnx(model, tmp_path / "d.onnx", x, weights="dense")
    assert report.dense_bytes == pytest.approx(dense.bytes, rel=0.1)
    assert own < (0.4 if int8 else 0.75) * dense.bytes


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=61, decoder_start_token_id=0, **sizes)
    model = T5ForConditionalGeneration(config).eval()
    return torchprune.sparsify(model, MagnitudeSpec(), progress=False)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "two graphs"])
def test_encoder_decoders_with_their_caches(merged: bool, tmp_path: Path) -> None:
    model, ids = t5(), torch.randint(3, 60, (2, 8))
    options: dict[str, Any] = {"with_cache": True, "merged": merged}
    folder = tmp_path / "graphs"
    report = to_onnx(model, folder, ids, weights="kernels", **options)
    assert report.relative < 1e-4
    for part in report.parts.values():
        assert part.library is not None
        assert part.packed
        stored = [constant.raw_data for constant in read_graph(part.path).constants.values()]
        large = [raw for raw in stored if len(raw) > 1000]
        assert len(large) == len(set(large))  # of both branches once
    assert len(list(folder.glob("*.so"))) == len(report.parts)
    to_onnx(model, folder, ids, **options)
    assert not list(folder.glob("*.so"))


def test_a_decoder_takes_steps_and_has_its_weights_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_kernels, "_ENTRIES", -(1 << 20))
    monkeypatch.setattr("torchprune.export.onnx_graph.EXTERNAL", 1000)
    model = pruned("llama", torch.float32)
    report = to_onnx(
        model, tmp_path / "m.onnx", torch.ones(2, 6).long(), weights="kernels", with_cache=True
    )
    assert not report.unmoved
    assert report.data is not None
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data", "m.onnxruntime.so"}
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())


# -- who runs it, and what lies beside it ----------------------------------------------------------


ELSEWHERE = """
import json, sys
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
path, library = sys.argv[1:]
try:
    onnxruntime.InferenceSession(path, options)
except Exception as error:
    said = str(error)
options.register_custom_ops_library(library)
first = onnxruntime.InferenceSession(path, options)
second = onnxruntime.InferenceSession(path, options)
found = [s.run(None, {"input": numpy.ones((2, 64), "f4")})[0].tolist() for s in (first, second)]
print(json.dumps([said, found, "torch" in sys.modules]))
"""


def test_another_process_needs_neither_torch_nor_torchprune(tmp_path: Path) -> None:
    model = stack(64, 96, 32)
    report = to_onnx(model, tmp_path / "m.onnx", torch.ones(2, 64), weights="kernels")
    words = [sys.executable, "-c", ELSEWHERE, str(report.path), str(report.library)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, (first, second), torch_too = json.loads(done.stdout)
    assert "torchprune:BitmaskLinear" in said
    expected = model(torch.ones(2, 64)).tolist()
    assert np.allclose(first, expected, atol=1e-5)
    assert first == second
    assert not torch_too


def test_a_library_of_before_goes_and_another_file_stays(tmp_path: Path) -> None:
    x, beside = torch.ones(2, 64), tmp_path / "m.onnxruntime.so"
    to_onnx(stack(64, 96, 32), tmp_path / "m.onnx", x, weights="kernels")
    assert beside.exists()
    report = to_onnx(nn.Linear(64, 8), tmp_path / "m.onnx", x, weights="kernels")
    assert "No product is sparse enough" in str(report)
    assert not beside.exists()
    beside.write_bytes(b"someone else's")
    to_onnx(nn.Linear(64, 8), tmp_path / "m.onnx", x, weights="kernels")
    assert beside.read_bytes() == b"someone else's"


def test_without_a_compiler_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Path:
        raise BuildError("no C++ compiler was found")

    monkeypatch.setattr(onnx_kernels, "onnx_library", fails)
    with pytest.raises(ExportError, match=r"cannot be compiled: no C.. compiler.*'packed' needs"):
        to_onnx(stack(64, 64), tmp_path / "m.onnx", torch.ones(2, 64), weights="kernels")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_rounded_says_why(tmp_path: Path) -> None:
    x, options = torch.ones(2, 64), {"weights": "kernels", "int8": True}
    with pytest.raises(ExportError, match=r"int8_ignore: '5\.\*' fits none of 0\.weight"):
        to_onnx(stack(64, 64, 8), tmp_path / "m.onnx", x, int8_ignore=["5.*"], **options)
    with pytest.raises(ExportError, match="int8: nothing to lower"):
        to_onnx(nn.Linear(64, 8), tmp_path / "m.onnx", x, **options)
    assert not list(tmp_path.iterdir())


def test_a_wrong_product_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Bitmask.pack

    def turned(weight: Tensor, scales: Tensor | None = None) -> Bitmask:
        return honest(weight.flip(0), scales)

    monkeypatch.setattr(Bitmask, "pack", staticmethod(turned))
    with pytest.raises(ExportError, match="computes otherwise"):
        to_onnx(stack(64, 64), tmp_path / "m.onnx", torch.randn(2, 64), weights="kernels")
    assert not list(tmp_path.iterdir())


# -- proofs and commands ---------------------------------------------------------------------------


def damaged(path: Path, part: str, change: Any) -> None:
    model = onnx.load(path)
    (found,) = [t for t in model.graph.initializer if t.name.endswith(f"up_proj.weight_{part}")][:1]
    array = numpy_helper.to_array(found).copy()
    change(array)
    found.CopyFrom(numpy_helper.from_array(array, found.name))
    onnx.save(model, path)


def test_files_are_proved_by_our_own_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchprune.study.proofs.onnx_parity import check_onnx

    monkeypatch.setattr(onnx_kernels, "_ENTRIES", -(1 << 20))
    model = pruned("llama", torch.float32)
    report = to_onnx(model, tmp_path / "m.onnx", torch.ones(2, 6).long(), weights="kernels")
    assert report.library is not None
    report.library.write_bytes(b"hostile")  # nobody loads it
    masks = torchprune.masks(model)
    folded = torchprune.fold(copy.deepcopy(model))
    proof = check_onnx(folded, report.path, dict.fromkeys(masks))
    assert proof.state == "holds", proof
    assert proof.numbers["packed"] == proof.numbers["pruned_found"] == len(masks)
    whole = report.path.read_bytes()

    def last_value(array: np.ndarray) -> None:
        array[-SLACK - 1] += 1

    def one_more_bit(array: np.ndarray) -> None:
        array[0, 0] ^= 1

    for part, change, said in (
        ("values", last_value, "the folded weight"),
        ("bits", one_more_bit, "contradict each other"),
    ):
        report.path.write_bytes(whole)
        damaged(report.path, part, change)
        proof = check_onnx(folded, report.path, dict.fromkeys(masks))
        assert proof.state == "broken"
        assert said in str(proof), proof
    with pytest.raises(CheckpointError, match="contradict each other"):
        list(weights_in(read_graph(report.path)))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_kernels, "_ENTRIES", -(1 << 20))
    home = tmp_path / "home"
    torchprune.save(pruned("llama", torch.bfloat16), home)
    output = tmp_path / "m.onnx"
    words = ("--to", "onnx", "--kernels", "--output", output)
    told = json.loads(worked("export", home, *words, "--measure", "--json"))
    assert told["library"] == str(tmp_path / "m.onnxruntime.so")
    assert (tmp_path / "m.onnxruntime.so").exists()
    assert "--kernels is for --to onnx" in complaint(
        "export", home, "--to", "pt2", "--kernels", "--output", tmp_path / "m.pt2", code=2
    )
    assert "not with --dense" in complaint("export", home, *words, "--dense", code=2)
