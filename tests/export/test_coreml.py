"""Core ML packages: what is in the file, to the bit, what its program computes, and refusals."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import assert_as_it_was, fingerprint
from families import FAMILIES
from saved import contents, pruned
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import ExportError, MissingExtraError
from torchprune.export import call, coreml_model, coreml_sparse, to_coreml
from torchprune.export.coreml_file import WEIGHTS, MLProgram, Step, constants_of, read_package
from torchprune.export.mil_run import MILRun

pytest.importorskip("coremltools", reason="the extra coreml is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # while exporting, of third parties


def plain(width: int = 96) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8))
    return torchprune.sparsify(model, MagnitudeSpec(), progress=False)


def sparse_of(path: Path) -> dict[str, Any]:
    """Name -> constant, of those in sparse form."""
    return {c.name: c for c in constants_of(read_package(path)) if c.mask is not None}


def in_torch(weight: Any) -> Tensor:
    return torch.from_numpy(np.array(weight))


# -- what is in the file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options", "share"),
    [
        (torch.float32, {}, 0.54),
        (torch.float32, {"ios": 18}, 0.54),
        (torch.float16, {}, 0.58),
        (torch.float16, {"int8": True}, 0.34),
        (torch.float32, {"int8": True}, 0.17),
    ],
    ids=str,
)
def test_zeros_and_values_are_in_the_file_to_the_bit(
    dtype: torch.dtype, options: dict[str, Any], share: float, tmp_path: Path
) -> None:
    model = plain(384).to(dtype)
    path = tmp_path / "m.mlpackage"
    report = to_coreml(model, path, torch.randn(2, 384, dtype=dtype), **options)
    assert report.packed == ["0.weight", "2.weight"]
    assert report.bytes == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert 0.5 * share < report.bytes / report.dense_bytes < share
    found = sparse_of(path)
    for name in report.packed:
        weight = torchprune.fold(copy.deepcopy(model)).state_dict()[name]
        (constant,) = [c for c in found.values() if tuple(c.array.shape) == tuple(weight.shape)]
        assert torch.equal(in_torch(constant.mask), weight != 0)
        held = in_torch(constant.array)
        assert held.dtype == dtype
        if options.get("int8"):
            step = weight.abs().amax(1, keepdim=True).float() / 127
            assert ((held.float() - weight.float()).abs() <= step * 0.6 + 1e-6).all()
            assert len((held.float() / step).round()[weight != 0].unique()) > 100
        else:
            assert torch.equal(held, weight)


def test_small_weights_stay(tmp_path: Path) -> None:
    model = plain()
    layer = torchprune.fold(model)[0]  # type: ignore[index]
    small = [1e-12, -1e-30, 1e-40, float(np.nextafter(np.float32(0), np.float32(1)))]
    with torch.no_grad():
        at = layer.weight.reshape(-1).nonzero()[: len(small), 0]
        layer.weight.reshape(-1)[at] = torch.tensor(small)
        layer.weight.reshape(-1)[(layer.weight.reshape(-1) == 0).nonzero()[0]] = -0.0
    to_coreml(model, tmp_path / "m.mlpackage", torch.randn(2, 96))
    (constant,) = [c for c in sparse_of(tmp_path / "m.mlpackage").values() if len(c.array) == 96]
    assert torch.equal(in_torch(constant.array), layer.weight.detach())
    assert constant.mask.reshape(-1)[at].all()
    assert constant.mask.sum() == int((layer.weight != 0).sum())


def test_masked_folded_and_lowered_models_give_one_file(tmp_path: Path) -> None:
    model, x, files = plain(), torch.randn(2, 96), []
    for how in (lambda m: m, torchprune.fold, lambda m: torchprune.lower(m, "bitmask")):
        how(model)
        before = fingerprint(model)
        to_coreml(model, tmp_path / "m.mlpackage", x)
        assert_as_it_was(model, before)
        files.append((tmp_path / "m.mlpackage" / WEIGHTS).read_bytes())
    assert files[0] == files[1] == files[2]


def test_little_weights_and_dense_ones_stay_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    with torch.no_grad():
        model[0].weight[torch.rand(64, 64) < 0.2] = 0
        model[2].weight[torch.rand(2, 64) < 0.3] = 0
    report = to_coreml(model, tmp_path / "m.mlpackage", torch.randn(1, 64))
    assert report.packed == []
    assert report.bytes == report.dense_bytes
    dense = to_coreml(plain(), tmp_path / "n.mlpackage", torch.randn(1, 96), weights="dense")
    assert (dense.packed, sparse_of(dense.path)) == ([], {})
    assert "neither smaller nor faster" in str(dense)


def test_nothing_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.mlpackage"
    to_coreml(plain(), path, torch.randn(2, 96))
    for name, content in contents(path).items():
        for word in (str(tmp_path), str(Path(torch.__file__).parent), str(Path(__file__).parent)):
            assert word.encode() not in content, name


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    sample(
        [f"{name} {kind}" for name in FAMILIES for kind in ("float32", "float16")],
        "bert float32",
        "resnet float16",
    ),
)
def test_families_compute_the_same(case: str, tmp_path: Path) -> None:
    name, kind = case.split()
    dtype = getattr(torch, kind)
    model, batch = pruned(name, dtype), FAMILIES[name].data(dtype)[0]
    before = fingerprint(model)
    report = to_coreml(model, tmp_path / "m.mlpackage", batch)
    assert report.relative < (1e-5 if dtype is torch.float32 else 1e-2)
    assert report.packed
    assert_as_it_was(model, before)


class Function(nn.Module):
    """Any function of an input and some modules."""

    def __init__(self, function: Any, *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.held = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.held)


def kinds() -> dict[str, tuple[nn.Module, Tensor]]:
    return {
        "recurrent": (
            Function(lambda x, a: a(x)[0], nn.LSTM(32, 32, batch_first=True)),
            torch.randn(2, 3, 32),
        ),
        "line": (
            nn.Sequential(nn.Conv1d(16, 32, 3, padding=1), nn.BatchNorm1d(32), nn.GELU()),
            torch.randn(2, 16, 12),
        ),
        "turned": (
            nn.Sequential(
                nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1, output_padding=1),
                nn.BatchNorm2d(16),
                nn.Conv2d(16, 16, 3, groups=2),
            ),
            torch.randn(2, 16, 5, 5),
        ),
        "pools": (
            nn.Sequential(
                nn.Conv2d(3, 32, 5, padding="same", dilation=2),
                nn.MaxPool2d(3, 2, 1, ceil_mode=True),
                nn.AvgPool2d(3, 2, 1, count_include_pad=False),
                nn.InstanceNorm2d(32),
                nn.GroupNorm(4, 32),
                nn.Hardswish(),
            ),
            torch.randn(2, 3, 21, 21),
        ),
        "shared": (
            Function(
                lambda x, a, b: b(a(a(x))) + a(x) * 0.5, nn.Conv2d(16, 16, 3, padding=1),
                nn.BatchNorm2d(16),
            ),
            torch.randn(2, 16, 6, 6),
        ),
        "results": (
            Function(lambda x, a: {"a": a(x), "b": [a(x).argmax(-1), a(x) > 0]}, nn.Linear(32, 32)),
            torch.randn(2, 32),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
def test_kinds_of_layers_compute_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = kinds()[kind]
    with torch.no_grad():
        model.train()(x)  # running statistics of their own
    torchprune.sparsify(model.eval(), MagnitudeSpec(), progress=False)
    report = to_coreml(model, tmp_path / "m.mlpackage", x)
    assert report.relative < 1e-5
    assert report.packed
    if kind == "results":
        assert report.outputs == ["a", "b_0", "b_1"]


def test_norms_go_into_the_weights_and_zeros_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16))
    x = torch.randn(4, 16, 6, 6)
    nn.init.uniform_(model[1].weight, -2, 2)
    with torch.no_grad():
        model(x)
    torchprune.sparsify(model.eval(), MagnitudeSpec(), progress=False)
    report = to_coreml(model, tmp_path / "m.mlpackage", x)
    assert report.packed == ["0.weight"]
    assert not any(s.kind == "batch_norm" for s in read_package(report.path).steps)
    (constant,) = sparse_of(report.path).values()
    assert torch.equal(in_torch(constant.mask), model[0].weight != 0)


def test_sizes_may_vary_within_bounds(tmp_path: Path) -> None:
    dims = torch.export.Dim("batch", max=4), torch.export.Dim("length", max=16)
    path, tokens = tmp_path / "m.mlpackage", torch.randint(0, 60, (2, 7))
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Embedding(64, 16), attention, nn.Linear(16, 64)).eval()
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    report = to_coreml(model, path, tokens, dynamic_shapes=({0: dims[0], 1: dims[1]},))
    assert {high for _, high in report.bounds.values()} == {4, 16}
    other = torch.randint(0, 60, (3, 11))
    with torch.no_grad():
        torch.testing.assert_close(MILRun(read_package(path))([other])[0], model(other))
    with pytest.raises(ExportError, match="a has no greatest value"):
        to_coreml(plain(), path, torch.randn(2, 96), dynamic_shapes=({0: torch.export.Dim("b")},))


def test_a_cache_goes_in_and_comes_out(tmp_path: Path) -> None:
    tokens = torch.randint(0, 50, (2, 3))
    report = to_coreml(pruned("llama"), tmp_path / "m.mlpackage", tokens, with_cache=True)
    assert report.relative < 1e-5
    assert report.outputs[:2] == ["logits", "present_0_key"]


def test_a_cache_as_state_gives_what_the_whole_text_gives(tmp_path: Path) -> None:
    model, tokens = pruned("llama"), torch.randint(3, 60, (1, 12))
    path = tmp_path / "m.mlpackage"
    report = to_coreml(model, path, tokens[:, :2], with_cache=True, state=10)
    assert report.inputs == ["input_ids", "attention_mask", "position_ids"]
    program = read_package(path)
    assert len(program.states) == 4
    assert program.version == 9  # iOS 18
    run, found = MILRun(program), []
    for at in range(0, 12, 2):
        mask = (torch.arange(12) >= 10 - at).long()[None]
        found += run([tokens[:, at : at + 2], mask, torch.arange(at, at + 2)[None]])
    with torch.no_grad():
        whole = model(tokens).logits
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-2, atol=1e-3)


# -- refusals --------------------------------------------------------------------------------------


def test_wrong_calls_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    model, x, path = plain(), torch.randn(2, 96), tmp_path / "m.mlpackage"
    for said, options in {
        "weights must be 'packed' or 'dense'": {"weights": "bits"},
        "int8_ignore is for int8=True": {"int8_ignore": ["*"]},
        "'nothing' fits none of 0.weight": {"int8": True, "int8_ignore": ["nothing"]},
        'int8 is for weights="packed"': {"int8": True, "weights": "dense"},
        "ios must be one of 16, 17, 18, got 15": {"ios": 15},
        "iOS 17 knows no sparse int8 weights: ios=18 does": {"int8": True, "ios": 17},
        "state is for with_cache=True": {"state": 4},
    }.items():
        with pytest.raises(ExportError, match=said.replace("*", r"\*")):
            to_coreml(model, path, x, **options)
    with pytest.raises(ExportError, match=r"are .mlpackage directories, got m\.mlmodel"):
        to_coreml(model, tmp_path / "m.mlmodel", x)
    with pytest.raises(ExportError, match=r"all float32 or all float16, got torch\.bfloat16"):
        to_coreml(plain().bfloat16(), path, x.bfloat16())
    with pytest.raises(ExportError, match="2 tokens of past for steps of 3"):
        to_coreml(pruned("llama"), path, torch.ones(1, 3).long(), with_cache=True, state=2)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_converted_or_checked_says_why(tmp_path: Path) -> None:
    path, layer = tmp_path / "m.mlpackage", nn.Linear(8, 8)
    for said, function in {
        "no translation of these operators.*lgamma": lambda x, a: torch.lgamma(a(x)),
        "gives its input x back": lambda x, a: (a(x), x),
        "could not export": lambda x, a: a(x) if x.sum() > 0 else x,
        "cannot be checked here: resample": lambda x, a: nn.functional.grid_sample(
            a(x)[None, None], x.reshape(1, 2, 4, 2)
        ),
    }.items():
        with pytest.raises(ExportError, match=said):
            to_coreml(Function(function, layer), path, torch.randn(2, 8))
    assert not list(tmp_path.iterdir())


def test_another_directory_is_not_replaced_and_an_earlier_package_is(tmp_path: Path) -> None:
    path = tmp_path / "m.mlpackage"
    path.mkdir()
    (path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="something other than a Core ML package"):
        to_coreml(plain(), path, torch.randn(2, 96))
    assert (path / "mine.txt").read_text() == "mine"
    (path / "mine.txt").unlink()
    to_coreml(plain(), path, torch.randn(2, 96))
    report = to_coreml(plain(64), path, torch.randn(2, 64))
    assert report.bytes == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert [p.name for p in tmp_path.iterdir()] == ["m.mlpackage"]


def test_a_file_that_differs_in_a_bit_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = to_coreml(plain(), tmp_path / "good.mlpackage", torch.randn(2, 96)).path

    def spoilt(change: Any) -> Any:
        def save(made: Any, partial: Path, ios: int) -> None:
            shutil.copytree(good, partial, dirs_exist_ok=True)
            file = partial / WEIGHTS
            file.write_bytes(change(file.read_bytes()))

        return save

    def flip(at: int) -> Any:
        return lambda held: held[:at] + bytes([held[at] ^ 1]) + held[at + 1 :]

    for said, change in {
        "0.weight is not in the file as it was": flip(128),
        "expected": flip(64),
        "ends too early": lambda held: held[:-64],
        "no whole package": lambda held: held[:80],
    }.items():
        monkeypatch.setattr(coreml_model, "_save", spoilt(change))
        with pytest.raises(ExportError, match=said):
            to_coreml(plain(), tmp_path / "m.mlpackage", torch.randn(2, 96))
    assert [p.name for p in tmp_path.iterdir()] == ["good.mlpackage"]


def test_a_weight_that_was_pruned_a_little_further_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = coreml_sparse._sparse_form
    monkeypatch.setattr(
        coreml_sparse, "_sparse_form",
        lambda op, value, *how: real(op, np.where(abs(value) < 0.06, 0, value), *how),
    )  # fmt: skip
    for int8 in (False, True):
        with pytest.raises(ExportError, match=r"0\.weight is not in the file as it was"):
            to_coreml(plain(), tmp_path / "m.mlpackage", torch.randn(2, 96), int8=int8)
    assert not list(tmp_path.iterdir())


def test_a_program_that_computes_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = call.written.compare
    monkeypatch.setattr(
        call.written, "compare", lambda want, got, most: real(want, [got[0] + 1], most)
    )
    with pytest.raises(ExportError, match="computes otherwise"):
        to_coreml(plain(), tmp_path / "m.mlpackage", torch.randn(2, 96))
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)  # importing it raises ImportError
    with pytest.raises(MissingExtraError, match=r"torchprune\[coreml\]"):
        to_coreml(nn.Linear(2, 2), tmp_path / "m.mlpackage", torch.ones(1, 2))


# -- the reading back ------------------------------------------------------------------------------


def test_masks_and_values_that_contradict_each_other_are_refused() -> None:
    def program(**parts: Any) -> MLProgram:
        inputs = {key: [np.array(value, kind)] for key, (value, kind) in parts.items()}
        step = Step("constexpr_sparse_to_dense", inputs, [("w", np.float32)])
        return MLProgram({}, {}, [step], ["w"], 7)

    usual = {
        "nonzero_data": ([1.0, 2.0], np.float32),
        "mask": ([0b101], np.uint8),
        "shape": ([2, 2], np.uint32),
    }
    (constant,) = constants_of(program(**usual))
    assert constant.array.tolist() == [[1.0, 0.0], [2.0, 0.0]]
    for change in (
        {"mask": ([0b111], np.uint8)},
        {"mask": ([0b101, 0], np.uint8)},
        {"mask": ([0b10001], np.uint8)},
        {"shape": ([3, 3], np.uint32)},
    ):
        with pytest.raises(ExportError, match=r"^w: "):
            list(constants_of(program(**{**usual, **change})))
