"""Damage that leaves files well formed: each flipped bit is refused by name, or changes nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import as_version_1, prune, raw, sealed, state
from torch import nn

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec
from torchprune.checkpoint.checksums import checksum, of_tensors
from torchprune.checkpoint.manifest import read_manifest
from torchprune.errors import CheckpointError

MASKED, KEPT, PACKED, DENSE = "0.weight", "1.weight", "2.weight", "3.weight"


def layers() -> nn.Module:
    """Tensors of every encoding: masked, masked with dense weights, packed, plain, transient."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(64, 64), nn.Linear(8, 4), nn.BatchNorm1d(4)
        )
    with torch.no_grad():
        model[2].weight[:50] = 0
    model.register_buffer("table", torch.arange(3.0), persistent=False)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sums") / "saved"
    model = prune(layers(), MagnitudeSpec(targets="0"))
    solver = SparseGPTSpec(targets="1")
    prune(model[:2], solver, [torch.randn(9, 8)], keep_dense=True)
    torchprune.save(model, directory)
    found = {e.encoding for e in read_manifest(directory).tensors.values()}
    assert found == {"masked", "packed", "dense"}
    return directory


def flip(path: Path, at: int) -> None:
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)


def place_of(path: Path, blob: str) -> int:
    """A byte in the middle of a tensor."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    first, end = json.loads(content[8 : 8 + length])[blob]["data_offsets"]
    return 8 + length + (first + end) // 2


def load_into(directory: Path, **options: Any) -> nn.Module:
    return torchprune.load_into(layers(), directory, **options)


def refusal(model: nn.Module, directory: Path) -> str | None:
    """What `load_into` says against a directory, or None."""
    try:
        torchprune.load_into(model, directory)
    except CheckpointError as error:
        return str(error)
    return None


FILES = ["manifest.json", "weights.safetensors"]


@settings(max_examples=100)
@given(st.data())
def test_no_flipped_bit_loads_as_something_else(saved: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    at = data.draw(st.integers(0, 8 * (saved / name).stat().st_size - 1))
    expected = state(load_into(saved))
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(shutil.copytree(saved, directory, dirs_exist_ok=True))
        flip(copy / name, at)
        fresh = prune(layers(), MagnitudeSpec(0.25, targets="0"))
        before = raw(fresh)
        error = refusal(fresh, copy)
        if error is None:
            assert state(fresh) == expected
        else:
            assert name in error
            assert raw(fresh) == before


@pytest.mark.parametrize(
    ("blob", "tensor"),
    [
        (f"{MASKED}.bits", MASKED),
        (f"{MASKED}.values", MASKED),
        (f"{KEPT}.dense", KEPT),
        (f"{PACKED}.bits", PACKED),
        (f"{PACKED}.values", PACKED),
        (DENSE, DENSE),
        ("4.running_mean", "4.running_mean"),
        ("4.num_batches_tracked", "4.num_batches_tracked"),
        ("table", "table"),
    ],
)
def test_a_flipped_bit_is_named_by_file_and_tensor(
    blob: str, tensor: str, saved: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    path = copy / "weights.safetensors"
    flip(path, 8 * place_of(path, blob))
    with pytest.raises(CheckpointError) as caught:
        load_into(copy)
    assert str(path) in str(caught.value)
    assert f" {tensor}" in str(caught.value)
    assert "verify=False" in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_flipped_bit_in_the_settings_is_refused(name: str, tmp_path: Path) -> None:
    torchprune.save(prune(llama().eval()), tmp_path)
    content = (tmp_path / name).read_bytes()
    for at in range(0, 8 * len(content), 613):
        flip(tmp_path / name, at)
        with pytest.raises(CheckpointError, match=name):
            torchprune.load(tmp_path)
        (tmp_path / name).write_bytes(content)
    torchprune.load(tmp_path)


def test_without_verifying_the_damage_is_loaded(saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    flip(copy / "weights.safetensors", 8 * place_of(copy / "weights.safetensors", DENSE))
    with pytest.raises(CheckpointError, match="damaged"):
        load_into(copy)
    damaged, whole = load_into(copy, verify=False), load_into(saved)
    assert state(damaged) != state(whole)
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**content, "architecture": "Another"}))
    with pytest.raises(CheckpointError, match=r"manifest.json: damaged"):
        load_into(copy)
    assert state(load_into(copy, verify=False)) == state(damaged)


def test_load_skips_every_checksum_too(tmp_path: Path) -> None:
    model = prune(llama().eval())
    torchprune.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    with pytest.raises(CheckpointError, match=r"config.json: damaged or changed"):
        torchprune.load(tmp_path)
    assert torchprune.load(tmp_path, verify=False).config.rms_norm_eps == 1e-4


def test_files_from_before_checksums_load_and_say_so(tmp_path: Path) -> None:
    model = prune(llama().eval())
    torchprune.save(model, tmp_path / "old")
    as_version_1(tmp_path / "old")
    loaded = torchprune.load(tmp_path / "old")
    assert state(loaded)["weights"] == state(model)["weights"]
    for read in (loaded, torchprune.load_into(llama().eval(), tmp_path / "old")):
        assert "without checksums" in torchprune.report(read).notes[-1]
        assert "without checksums" in str(torchprune.report(read))
    torchprune.save(loaded, tmp_path / "new")
    assert state(torchprune.load(tmp_path / "new")) == state(model)  # the note is not passed on
    again = torchprune.load_into(loaded, tmp_path / "new")
    assert state(again) == state(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(version=1),
        lambda m: m.update(header=None),
        lambda m: m["tensors"][MASKED].update(checksum=None),
        lambda m: m["tensors"][MASKED].pop("checksum"),
        lambda m: m.pop("header"),
    ],
)
def test_checksums_cannot_be_lost_on_the_way(change: Any, saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(CheckpointError, match="belongs to"):
        load_into(copy)


def test_the_checksum_is_the_one_of_zip_files() -> None:
    assert checksum([b"1234", b"56789"]) == "cbf43926"
    assert of_tensors([torch.tensor([1, 2], dtype=torch.uint8), torch.zeros(0)]) == checksum(
        [b"\x01\x02"]
    )
