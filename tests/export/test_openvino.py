"""OpenVINO in eight bits: what the file holds, what the runtime computes of it, and refusals."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, export
from torchprune.errors import ExportError
from torchprune.export import openvino_model
from torchprune.export.promises import SizesError

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore")  # while exporting, of third parties

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def weights_of(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> (int8 values, scales) of a file, read back."""
    found = {}
    for node in openvino.Core().read_model(path).get_ordered_ops():
        name = node.get_friendly_name()
        if name.endswith("/int8"):
            values, scale = (node.input(i).get_source_output().get_node() for i in (0, 1))
            while values.get_type_name() == "Convert":
                values = values.input(0).get_source_output().get_node()
            assert values.data.dtype == np.int8
            found[name.removesuffix("/int8")] = (values.data, scale.data)
    return found


def _as_stored(restored: np.ndarray, kept: np.ndarray, scale: float) -> bool:
    near = bool(np.abs(restored - kept).max() <= 0.51 * scale)
    return near and not restored[kept == 0].any()


@pytest.mark.parametrize(
    "name", sample(["mlp", "gpt2", "llama", "mixtral", "resnet", "t5", "vit"], "llama", "resnet")
)
def test_zeros_stay_and_every_product_takes_eight_bits(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = torchprune.sparsify(family.make(), MagnitudeSpec(0.6), progress=False)
    path = tmp_path / "m.xml"
    report = export.to_openvino(model, path, family.data(torch.float32)[0], int8=True)
    assert report.relative < 5e-2
    weights = weights_of(path)
    held = torchprune.fold(copy.deepcopy(model)).state_dict()
    named = {key: weights[key] for key in weights if key in held}
    assert len(named) >= len(weights) - 1  # a head that is the embedding, turned, has no name
    for key, (values, scale) in named.items():
        kept, restored = held[key].numpy(), values * scale
        turned = [x for x in (restored, restored.T) if x.shape == kept.shape]
        assert any(_as_stored(x, kept, float(scale.max())) for x in turned), key
    # Mixtral's experts are stacked, and multiply three axes at a time.
    masks = {key: mask for key, mask in torchprune.masks(model).items() if "experts" not in key}
    masked = sum(int((~mask).sum()) for mask in masks.values())
    stored = sum(int((values == 0).sum()) for values, _ in weights.values())
    assert stored >= masked
    compiled = openvino.Core().compile_model(path, "CPU", {**EXACT, "PERF_COUNT": True})
    request = compiled.create_infer_request()
    call = export.call.prepare(
        model, family.data(torch.float32)[0], with_cache=False, dynamic_shapes=None, vary=False
    )
    request.infer([t.numpy() for t in call.samples[0].tensors])
    ran = [x for x in request.profiling_info if x.status == x.Status.EXECUTED]
    eight = [x.node_name for x in ran if x.exec_type.endswith("I8")]
    assert len(eight) >= len(weights), [(x.node_name, x.exec_type) for x in ran]


def by_hand(layers: list[nn.Linear], x: Tensor, calibrated: Tensor) -> Tensor:
    """Layers with ReLUs between, rounded as the file says, in float64."""
    exact, x = calibrated.double(), x.double()
    for index, layer in enumerate(layers):
        low, high = min(0.0, float(exact.min())), max(0.0, float(exact.max()))
        high = high if high > low else 1.0
        step = (high - low) / 255
        rounded = torch.round((x.clamp(low, high) - low) / step) * step + low
        weight = layer.weight.detach().double()
        scale = weight.abs().amax(1, keepdim=True) / 127
        scale[scale == 0] = 1
        bias = layer.bias.detach().double()
        x = rounded @ (torch.round(weight / scale) * scale).T + bias
        exact = exact @ weight.T + bias
        if index < len(layers) - 1:
            x, exact = x.relu(), exact.relu()
    return x


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    widths=st.lists(st.sampled_from([1, 3, 16, 64]), min_size=2, max_size=4),
    sparsity=st.sampled_from([0.0, 0.5, 0.9]),
    size=st.sampled_from([0.01, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_it_computes_what_the_bytes_say(
    tmp_path_factory: pytest.TempPathFactory,
    widths: list[int],
    sparsity: float,
    size: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    torchprune.sparsify(model, MagnitudeSpec(sparsity), progress=False)
    x = size * torch.randn(7, widths[0])
    path = tmp_path_factory.mktemp("hand") / "m.xml"
    export.to_openvino(model, path, x, int8=True)
    found = openvino.Core().compile_model(path, "CPU", EXACT)([x.numpy()])[0]
    wanted = by_hand(layers, x, x).numpy()
    # A value in the middle of two steps may go either way: a step of each layer, at most.
    assert np.abs(found - wanted).max() <= 2e-2 * max(1e-6, np.abs(wanted).max())


def test_the_report_says_which_weights_could_do_without_zeros(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
    torchprune.sparsify(model, MagnitudeSpec(0.8, ignore=["2"]), progress=False)
    x = torch.randn(4, 128)
    said = str(export.to_openvino(model, tmp_path / "m.xml", x, int8=True))
    assert (
        "of 1 of the weights in int8" in said
    )  # the second has no zeros, the third is no multiple of 64
    assert "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE=0.4" in said
    if torch.cpu.get_capabilities().get("amx_int8"):
        assert "this one has, and left them out of 1 products" in said
    else:
        assert "this one has none" in said


def test_a_file_is_a_quarter_of_what_it_was(tmp_path: Path) -> None:
    model = torchprune.sparsify(nn.Linear(512, 512), MagnitudeSpec(), progress=False)
    x = torch.randn(4, 512)
    plain = export.to_openvino(model, tmp_path / "m.xml", x)
    small = export.to_openvino(model, tmp_path / "m.xml", x, int8=True)
    assert small.bytes < 0.27 * plain.bytes
    assert small.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_ranges_are_those_of_the_data(tmp_path: Path) -> None:
    model, path = nn.Linear(8, 4), tmp_path / "m.xml"
    small, large = torch.randn(4, 8).clamp(-1, 1), 10 * torch.randn(3, 8)
    export.to_openvino(model, path, small, int8=True, data=[small, large])
    found = openvino.Core().compile_model(path, "CPU", EXACT)([large.numpy()])[0]
    wanted = by_hand([model], large, torch.cat([small, large])).numpy()
    assert np.abs(found - wanted).max() <= 2e-2 * np.abs(wanted).max()
    export.to_openvino(model, path, small, int8=True)  # what is beyond is cut off
    found = openvino.Core().compile_model(path, "CPU", EXACT)([large.numpy()])[0]
    assert np.abs(found - wanted).max() > 0.1 * np.abs(wanted).max()


def test_data_of_a_model_with_a_cache_are_tokens(tmp_path: Path) -> None:
    model = FAMILIES["llama"].make()
    tokens = FAMILIES["llama"].data(torch.float32)[0][:, :4]
    windows = [torch.randint(3, 50, (1, length)) for length in (9, 5)]
    path = tmp_path / "m.xml"
    report = export.to_openvino(
        model, path, tokens, with_cache=True, int8=True, data=(w for w in windows)
    )
    assert report.relative < 0.1
    with pytest.raises(ExportError, match="batch 0 of data has 1 tensors"):
        export.to_openvino(model, path, tokens, int8=True, data=[windows[0][0]])


def test_data_are_read_again_where_a_graph_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    real = openvino_model.check

    def at_the_example_alone(call: Any, *rest: Any) -> Any:
        tried.append(len(call.samples))
        if len(call.samples) > 1:
            raise SizesError("not at other sizes")
        return real(call, *rest)

    monkeypatch.setattr(openvino_model, "check", at_the_example_alone)
    x = torch.randn(4, 8)
    model, path = nn.Linear(8, 4), tmp_path / "m.xml"
    report = export.to_openvino(model, path, x, int8=True, data=(y for y in [x, 2 * x]))
    assert tried[0] > 1
    assert tried[-1] == 1
    assert report.note == "not at other sizes"


def test_what_reads_outliers_stays_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(64, 256)
    x[5, 7] = 3000.0  # a step of eight bits is 12 then, where others are about 1
    path = tmp_path / "m.xml"
    report = export.to_openvino(model, path, x, int8=True)
    assert list(weights_of(path)) == ["2.weight"]
    assert "1 stay in float32" in report.brings
    assert "(0.weight)" in report.brings
    assert report.relative < 3e-2
    with pytest.raises(ExportError, match="every product reads has outliers"):
        export.to_openvino(model[0], path, x, int8=True)


def test_what_is_ignored_stays_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    path = tmp_path / "m.xml"
    export.to_openvino(model, path, torch.randn(4, 8), int8=True, int8_ignore=["1.*"])
    assert list(weights_of(path)) == ["0.weight"]


def test_eight_bits_are_refused_where_they_cannot_be(tmp_path: Path) -> None:
    model, x, path = nn.Linear(8, 8), torch.randn(2, 8), tmp_path / "m.xml"
    with pytest.raises(ExportError, match="'nope' fits none of weight"):
        export.to_openvino(model, path, x, int8=True, int8_ignore=["nope"])
    with pytest.raises(ExportError, match="there is no product with a weight to quantize"):
        export.to_openvino(model, path, x, int8=True, int8_ignore=["*"])
    with pytest.raises(ExportError, match="int8_ignore is for int8=True"):
        export.to_openvino(model, path, x, int8_ignore=["*"])
    with pytest.raises(ExportError, match="data is for int8=True"):
        export.to_openvino(model, path, x, data=[x])
    with pytest.raises(ExportError, match="no batch in data"):
        export.to_openvino(model, path, x, int8=True, data=[])
    with pytest.raises(ExportError, match="float32"):
        export.to_openvino(nn.Linear(8, 8).half(), path, x.half(), int8=True)
    assert not list(tmp_path.iterdir())
