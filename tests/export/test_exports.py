"""Archives of torch.export, OpenVINO and ExecuTorch: what their runtimes compute, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import assert_as_it_was, fingerprint
from families import FAMILIES
from saved import pruned
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, export
from torchprune.errors import CheckpointError, ExportError, MissingExtraError
from torchprune.export import written

pytestmark = pytest.mark.filterwarnings("ignore")  # while exporting, of third parties
ENDINGS = {"to_pt2": "pt2", "to_openvino": "xml", "to_executorch": "pte"}
ALLOWED = {"to_pt2": 1e-4, "to_executorch": 1e-4, "to_openvino": 2e-2}  # it may choose bfloat16
NEEDS = {"to_openvino": "openvino", "to_executorch": "executorch"}


@pytest.fixture(params=ENDINGS)
def to(request: pytest.FixtureRequest) -> str:
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param], reason="the extra is not installed")
    return str(request.param)


def plain() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    return torchprune.sparsify(model, MagnitudeSpec(), progress=False)


@pytest.mark.parametrize(
    "name", sample(["llama", "gpt2", "bert", "vit", "resnet"], "bert", "resnet")
)
def test_families_compute_the_same_in_every_runtime(name: str, to: str, tmp_path: Path) -> None:
    model, batch = pruned(name), FAMILIES[name].data()[0]
    before = fingerprint(model)
    path = tmp_path / f"m.{ENDINGS[to]}"
    report = getattr(export, to)(model, path, batch)
    assert report.path == path
    assert report.relative < ALLOWED[to]
    assert report.bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert report.brings in str(report)
    assert_as_it_was(model, before)


def test_one_export_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    """Fake tensors remember how attention lays out its results, which is not the same for all."""
    pytest.importorskip("coremltools", reason="the extra is not installed")
    pytest.importorskip("executorch", reason="the extra is not installed")
    model, batch = pruned("bert"), FAMILIES["bert"].data()[0]
    for to, name in (("coreml", "a.mlpackage"), ("executorch", "b.pte"), ("coreml", "c.mlpackage")):
        report = getattr(export, f"to_{to}")(model, tmp_path / name, batch)
        assert report.relative < 1e-4


def test_a_cache_goes_in_and_comes_out(to: str, tmp_path: Path) -> None:
    model = pruned("llama")
    report = getattr(export, to)(
        model, tmp_path / f"m.{ENDINGS[to]}", torch.randint(0, 50, (2, 5)), with_cache=True
    )
    assert report.relative < ALLOWED[to]


def test_wrong_models_leave_no_file(to: str, tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(4, 4), Branches())
    with pytest.raises(ExportError, match="torch could not export this model"):
        getattr(export, to)(model, tmp_path / f"m.{ENDINGS[to]}", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


def test_a_program_that_computes_otherwise_is_not_written(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = written.compare

    def worse(expected: list[Tensor], found: list[Tensor], allowed: float) -> Any:
        return real(expected, [found[0] + 1.0, *found[1:]], allowed)

    monkeypatch.setattr(written, "compare", worse)
    with pytest.raises(ExportError, match="computes otherwise"):
        getattr(export, to)(plain(), tmp_path / f"m.{ENDINGS[to]}", torch.randn(2, 256))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NEEDS)
def test_without_the_package_the_extra_is_named(name: str, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules[{NEEDS[name]!r}] = None
import torch
from torchprune.export import {name}
try:
    {name}(torch.nn.Linear(2, 2), "m.{ENDINGS[name]}", torch.ones(1, 2))
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert MissingExtraError.__name__ in done.stdout
    assert f"torchprune[{NEEDS[name]}]" in done.stdout


# -- torch's archive ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_archives_are_smaller_and_stay_dynamic(dtype: torch.dtype, tmp_path: Path) -> None:
    model = plain().to(dtype)
    x = torch.randn(3, 256, dtype=dtype)
    packed = export.to_pt2(model, tmp_path / "packed.pt2", x)
    dense = export.to_pt2(model, tmp_path / "dense.pt2", x, weights="dense")
    assert packed.packed == ["0.weight", "2.weight"][: 2 if dtype == torch.float32 else 1]
    assert dense.relative == 0
    assert packed.bytes < 0.75 * dense.bytes
    assert packed.dense_bytes == pytest.approx(dense.bytes, rel=0.1)
    for rows in (2, 17):
        x = torch.randn(rows, 256, dtype=dtype)
        for path in (packed.path, dense.path):
            with torch.no_grad():
                found, expected = export.load_pt2(path).module()(x), model(x)
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_an_archive_holds_narrow_weights_as_they_are(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 64))
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    packed = export.to_pt2(model, tmp_path / "packed.pt2", torch.randn(3, 64))
    dense = export.to_pt2(model, tmp_path / "dense.pt2", torch.randn(3, 64), weights="dense")
    assert not packed.packed
    assert packed.bytes == packed.dense_bytes == packed.path.stat().st_size
    assert packed.bytes <= dense.bytes + 200


def test_an_archive_holds_no_pickle_and_runs_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    export.to_pt2(plain(), path, torch.randn(3, 256))
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            start = archive.read(name)[:2]
            assert not start.startswith((b"\x80\x02", b"PK")), name  # pickle, torch.save
    code = f"""
import torch, torchprune
program = torch.export.load({str(path)!r})
print(tuple(program.module()(torch.ones(5, 256)).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "(5, 8)" in done.stdout


def rewritten(path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> Path:
    """A copy of an archive with some of its entries changed, or twice in it."""
    made = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(made, "w") as copy:
        for name in archive.namelist():
            data = archive.read(name)
            changed = change(name, data)
            if changed is not None:
                copy.writestr(*changed)
            if changed is None or changed[0] != name:
                copy.writestr(name, data)
    return made


def pickled(name: str, data: bytes) -> tuple[str, bytes] | None:
    if not name.endswith("weights_config.json"):
        return None
    config = json.loads(data)
    next(iter(config["config"].values()))["use_pickle"] = True
    return name, json.dumps(config).encode()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (pickled, "0.bias is pickled"),
        (lambda n, d: (n, b"\x80") if "sample_inputs" in n else None, "example inputs are pickled"),
        (lambda n, d: (n.upper(), d) if n.endswith("model.json") else None, "files of one name"),
        (lambda n, d: (n, b"[]") if n.endswith("_config.json") else None, "no archive"),
        (lambda n, d: (n, b"{") if n.endswith("model.json") else None, "torch could not load it"),
    ],
)  # fmt: skip
def test_archives_with_pickles_or_damage_are_not_loaded(
    change: Any, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.pt2"
    export.to_pt2(plain(), path, torch.randn(3, 256))
    with pytest.raises(CheckpointError, match=match):
        export.load_pt2(rewritten(path, change))


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    for name, data in (("a.pt2", b""), ("b.pt2", b"PK\x03\x04 and then nothing")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match="no archive of torch"):
            export.load_pt2(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "c.pt2", "w") as archive:
        archive.writestr("x", "y")
    for name in ("c.pt2", "missing.pt2"):
        with pytest.raises(CheckpointError, match="no archive of torch"):
            export.load_pt2(tmp_path / name)


def test_wrong_names_and_choices_are_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 256)
    with pytest.raises(ExportError, match=r"end in \.pt2"):
        export.to_pt2(plain(), tmp_path / "m.pt", x)
    with pytest.raises(ExportError, match="weights must be"):
        export.to_pt2(plain(), tmp_path / "m.pt2", x, weights="thin")
    with pytest.raises(ExportError, match="example_inputs must be a tensor"):
        export.to_pt2(plain(), tmp_path / "m.pt2", 7)
    pytest.importorskip("openvino")
    with pytest.raises(ExportError, match=r"\.xml files"):
        export.to_openvino(plain(), tmp_path / "m.bin", x)
    assert not list(tmp_path.iterdir())
