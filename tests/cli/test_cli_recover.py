"""`torchprune recover`: zeros stay zeros, quality does not fall, and Ctrl-C loses nothing kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call, complaint, make_home, worked

import torchprune
from torchprune.cli.saving import Destination
from torchprune.training import course

DATA = ("--samples", "12", "--length", "16")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_home(tmp_path_factory.mktemp("recover"))
    half = ("--sparsity", "0.5", "--output", home / "half")
    worked("prune", home / "model", "--method", "magnitude", "-q", *half)
    return home


def tensors(directory: Path) -> dict[str, Any]:
    return torchprune.fold(torchprune.load(directory)).state_dict()


def recovering(home: Path, out: Path, *more: object) -> tuple[object, ...]:
    base = ("recover", home / "half", "--teacher", home / "model", "--data", home / "text.txt")
    return (*base, *DATA, "--output", out, *more)


@pytest.mark.parametrize("train", ["all", "norms", "lora"])
def test_what_is_pruned_stays_so_and_it_comes_nearer(home, tmp_path, train):
    out = tmp_path / "out"
    said = worked(*recovering(home, out, "--train", train, "--effort", "fast"))
    assert "recovered: trained" in said
    before, after = (torchprune.masks(torchprune.load(d)) for d in (home / "half", out))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torchprune.report(torchprune.load(out)).sparsity == 0.5
    changed = {k for k, v in tensors(out).items() if not torch.equal(v, tensors(home / "half")[k])}
    assert changed
    assert all("norm" in k for k in changed) is (train == "norms")
    assert not (tmp_path / "out.progress").exists()


def test_json_and_the_commands_so_far(home, tmp_path):
    out = tmp_path / "out"
    result = call(*recovering(home, out, "--effort", "fast", "--json"))
    found = json.loads(result.stdout)
    assert found["recovery"].startswith("recovered: trained")
    assert found["output"] == str(out)
    commands = json.loads(worked("inspect", out, "--json"))["commands"]
    assert [line.split()[1] for line in commands] == ["prune", "recover"]


def test_without_data_the_teacher_writes(home, tmp_path):
    said = worked(
        *("recover", home / "half", "--teacher", home / "model", "--samples", "8", "--length"),
        *("8", "--effort", "fast", "--output", tmp_path / "out"),
    )
    assert "8 windows of 8 tokens of the teacher" in said


def test_after_ctrl_c_it_goes_on_to_the_same_bits(home, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    worked(*recovering(home, whole))
    monkeypatch.setattr(course, "SAVE_SECONDS", 0.0)
    real, saves = course.Course._save, list[int]()

    def save(self: Any, *some: Any) -> None:
        real(self, *some)
        saves.append(self.tokens)
        if len(saves) == 7:
            raise KeyboardInterrupt  # as Ctrl-C does; pytest-xdist ignores the signal

    monkeypatch.setattr(course.Course, "_save", save)
    result = call(*recovering(home, parts))
    last = f"error: interrupted; --resume goes on from {parts}.progress\n"
    assert (result.exit_code, result.stderr) == (130, last)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts.progress"}
    assert "go on with --resume, or delete it" in complaint(*recovering(home, parts))
    other = complaint(*recovering(home, parts, "--resume", "--seed", "1"))
    assert "the progress of another run" in other
    worked(*recovering(home, parts, "--resume"))
    assert len(saves) > 10
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts"}
    one, two = tensors(whole), tensors(parts)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_resume_without_progress_says_so(home, tmp_path):
    said = worked(*recovering(home, tmp_path / "out", "--resume", "--effort", "fast"))
    assert "beginning from the start" in said


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--minutes", "1", "--effort", "fast"), 2, "give one"),
        (("--minutes", "-1"), 2, "must be above 0"),
        (("--data", "absent.txt"), 1, "no such file"),
        (("--teacher", "./nowhere"), 1, "no such directory"),
    ],
)
def test_what_is_wrong_is_one_line(home, tmp_path, options, code, message):
    said = complaint("recover", home / "half", *options, "--output", tmp_path / "out", code=code)
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_with_lora_is_refused(home, tmp_path):
    lora = ("--train", "lora", "--data", home / "text.txt", *DATA, "--output", tmp_path / "out")
    assert "mask" in complaint("recover", home / "model", *lora)
    assert not (tmp_path / "out").exists()


def test_what_is_kept_goes_when_the_result_is_saved_and_not_before(home, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    worked(*recovering(home, whole, "--effort", "fast"))
    monkeypatch.setattr(course, "SAVE_SECONDS", 0.0)
    real = Destination.save

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Destination, "save", killed)
    last = complaint(*recovering(home, parts, "--effort", "fast"), code=130)
    assert last == f"error: interrupted; --resume goes on from {parts}.progress"
    monkeypatch.setattr(Destination, "save", real)
    worked(*recovering(home, parts, "--effort", "fast", "--resume"))
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts"}
    one, two = tensors(whole), tensors(parts)
    assert all(torch.equal(one[name], two[name]) for name in one)
