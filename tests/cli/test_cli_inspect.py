"""`torchprune inspect` on what torchprune did not write, and on models that transformers lacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import complaint, make_home, worked
from safetensors.torch import save_file
from torch import nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.cli.file_counts import counted_files


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("inspect"))


def test_a_folded_directory_shows_the_zeros_that_its_report_had(home, tmp_path):
    out, plain = tmp_path / "out", tmp_path / "plain"
    two_four = ("--method", "magnitude", "--pattern", "2:4", "--output", out, "--hf", plain)
    worked("prune", home / "model", "-q", *two_four)
    ours, found = (json.loads(worked("inspect", d, "--json")) for d in (out, plain))
    sparse = {y["name"]: y for y in found["layers"] if y["pattern"]}
    assert {y["name"] + ".weight": y["zeros"] for y in ours["layers"]} == {
        name: y["zeros"] for name, y in sparse.items()
    }
    assert {y["pattern"] for y in sparse.values()} == {"2:4"}
    assert found["commands"] == ours["commands"]
    said = worked("inspect", plain)
    assert "50.00%" in said
    assert "made by:\n  torchprune prune" in said
    assert "made by" not in worked("inspect", plain, "--quiet")


def test_a_dense_directory_has_no_sparse_layers(home):
    said = worked("inspect", home / "model")
    assert "0 of 6,560 weights in 16 tensors are zero" in said
    assert "dense: 16 tensors" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("kept", "pattern"),
    [((1, 0, 0, 0), "1:4"), ((1, 1, 0, 0), "2:4"), ((1, 1, 1, 0), "unstructured")],
)
def test_patterns_are_found(tmp_path, dtype, kept, pattern):
    weight = torch.tensor(kept).repeat(8, 4).to(dtype)
    other = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).repeat(3, 2).to(dtype)
    vector = torch.zeros(5, dtype=dtype)
    save_file({"a": weight, "b": other, "c": vector}, tmp_path / "x.safetensors")
    found = {t.name: t for t in counted_files(tmp_path).tensors}
    assert set(found) == {"a", "b"}
    assert found["a"].pattern == pattern
    assert found["a"].zeros == int((weight == 0).sum())
    assert found["b"].pattern == "4:8"


def test_sharded_files_are_all_read(home, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "model")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    whole, parts = counted_files(home / "model"), counted_files(tmp_path)
    assert {t.name for t in whole.tensors} == {t.name for t in parts.tensors}
    assert whole.size == parts.size


def test_a_model_of_no_known_class_is_counted_from_its_save(tmp_path):
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    torchprune.sparsify(net, MagnitudeSpec(pattern="2:4"), progress=False)
    torchprune.save(net, tmp_path / "net")
    found = json.loads(worked("inspect", tmp_path / "net", "--json"))
    report = torchprune.report(net)
    assert found["total"] == {"zeros": report.zeros, "size": report.size, "sparsity": 0.5}
    assert [y["pattern"] for y in found["layers"]] == ["2:4", "2:4"]


def test_what_holds_no_weights_is_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("", "utf-8")
    said = complaint("inspect", tmp_path)
    assert "no manifest of torchprune and no .safetensors file; it has notes.txt" in said
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    assert "damaged or truncated" in complaint("inspect", tmp_path)
