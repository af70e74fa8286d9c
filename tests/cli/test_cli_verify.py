"""`torchprune verify` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import call, complaint, make_home, worked
from planted import edit_blobs

import torchprune
from torchprune import MagnitudeSpec
from torchprune.cli.models import import_transformers

HERE = [f"--law={law}" for law in ("files", "checksums", "support", "count", "pattern", "dense")]
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_home(tmp_path_factory.mktemp("verify"))
    kind = import_transformers(False).AutoModelForCausalLM
    model = torchprune.sparsify(
        kind.from_pretrained(made / "model"), MagnitudeSpec(pattern="2:4"), progress=False
    )
    torchprune.save(model, made / "good")
    torchprune.save(model, made / "bad")
    edit_blobs(made / "bad", lambda b: b[f"{UP}.values"][3:4].fill_(float("nan")))
    return made


def test_a_proof(home: Path) -> None:
    said = worked("verify", home / "good", *HERE, "--dense", home / "model")
    assert "proved: 6 laws over 4,608 weights in 14 layers" in said
    assert "holds" in said
    quiet = worked("verify", home / "good", *HERE, "--quiet")
    assert quiet == "proved: 5 laws over 4,608 weights in 14 layers\n"
    told = json.loads(worked("verify", home / "good", *HERE, "--json"))
    assert told["holds"] is True
    assert [check["law"] for check in told["checks"]] == [
        law.removeprefix("--law=") for law in HERE
    ]


def test_a_broken_law(home: Path, tmp_path: Path) -> None:
    result = call("verify", home / "bad", *HERE, "-o", tmp_path / "proof.json")
    assert result.exit_code == 1
    assert f"support: {UP}: expected finite kept weights, got 1 NaN or inf" in result.stdout
    assert result.stdout.rstrip().endswith(f"broken: support ({home / 'bad'})")
    assert result.stderr == ""
    written = json.loads((tmp_path / "proof.json").read_text())
    assert [c["law"] for c in written["checks"] if c["state"] == "broken"] == ["support"]
    quiet = call("verify", home / "bad", *HERE, "--quiet")
    assert quiet.exit_code == 1
    assert len(quiet.stdout.splitlines()) == 2
    shown = call("verify", home / "bad", *HERE, "--json")
    assert shown.exit_code == 1
    assert json.loads(shown.stdout)["holds"] is False


def test_wrong_usage(home: Path, tmp_path: Path) -> None:
    assert "no such directory" in complaint("verify", tmp_path / "nowhere")
    assert "no law is called 'weights'" in complaint("verify", home / "good", "--law", "weights")
    assert "no such file" in complaint("verify", home / "good", "--onnx", tmp_path / "x.onnx")
    assert "one of .html, .json" in complaint("verify", home / "good", "-o", tmp_path / "x.txt")
    assert "no such directory" in complaint(
        "verify", home / "good", "--law", "dense", "--dense", "./no-model"
    )
