"""Places that cannot be written are refused before the work; nothing is left there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import SMALL, call, complaint, make_home, worked

from torchprune.cli.places import check_place
from torchprune.errors import InputError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_home(tmp_path_factory.mktemp("places"))
    half = ("--sparsity", "0.5", "--output", home / "half")
    worked("prune", home / "model", "--method", "magnitude", "-q", *half)
    (home / "file").write_text("mine")
    return home


COMMANDS = {
    "sensitivity": ("model", ".json"),
    "compare": ("model", ".json", "--text", "text.txt", "--spec", "magnitude"),
    "profile": ("half", ".json"),
    "report": ("half", ".html"),
    "verify": ("half", ".json"),
    "eval": ("half", ".json", "--text", "text.txt"),
    "export": ("half", ".onnx", "--to", "onnx"),
    "prune": ("model", ""),
    "shrink": ("model", "", "--neurons", "0.25"),
    "recover": ("half", "", "--data", "text.txt"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_done_for_a_place_that_cannot_be(home, monkeypatch, command):
    monkeypatch.chdir(home)
    before = sorted(str(p) for p in home.rglob("*"))
    model, suffix, *more = COMMANDS[command]
    said = complaint(command, model, *more, "--output", f"file/out{suffix}")
    assert f"file/out{suffix} cannot be written: {home / 'file'} is a file" in said
    if suffix:
        (home / f"taken{suffix}").mkdir(exist_ok=True)
        said = complaint(command, model, *more, "--output", f"taken{suffix}")
        assert "is a directory; name a file in it" in said
        (home / f"taken{suffix}").rmdir()
    else:
        assert "file is a file; name a directory" in complaint(command, model, "--output", "file")
        assert "is a file" in complaint(command, model, *more, "--hf", "file/hf")
    assert sorted(str(p) for p in home.rglob("*")) == before


def test_a_plain_model_is_not_written_over_something_else(home, monkeypatch):
    monkeypatch.chdir(home)
    hf = ("export", "half", "--to", "hf", "--output")
    assert "is no empty directory; name another" in complaint(*hf, "model")
    assert "file/out cannot be written" in complaint(*hf, "file/out")


def test_options_in_an_unwritable_file(home, monkeypatch):
    monkeypatch.chdir(home)
    said = complaint("inspect", "half", "--write-config", "file/run.toml")
    assert "file/run.toml cannot be written" in said
    assert "half is a directory" in complaint("inspect", "half", "--write-config", "half")


def test_a_directory_that_takes_no_files():
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc")
    with pytest.raises(InputError, match="/proc takes no files"):
        check_place(Path("/proc/out.json"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("sensitivity", "model", "--judges", "0"), "--judges"),
        (("sensitivity",), "MODEL"),
        (("sensitivity", "model", "--nosuch"), "--nosuch"),
        (("polish",), "polish"),
        (("compare", "model", "--config", "absent.toml"), "absent.toml"),
    ],
)
def test_wrong_usage_is_an_object_too(words, says):
    result = call(*words, "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert set(found) == {"error", "kind"}
    assert says in found["error"]
    assert "Usage" in result.stderr
    assert call(*words).stdout == ""


def test_after_a_bare_dash_it_is_a_name():
    assert call("verify", "--nosuch", "--", "--json").stdout == ""


SHELL = '"{python}" -m torchprune {words} {redirection}; echo "code $?"'


@pytest.mark.parametrize(
    ("words", "redirection", "code"),
    [
        ("--version", ">/dev/full", 1),
        ("inspect absent --json", ">/dev/full", 1),
        ("inspect absent --json", "2>&-", 1),
        ("--version", ">&-", 0),
    ],
)
def test_streams_that_are_full_or_closed(words, redirection, code):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    line = SHELL.format(python=sys.executable, words=words, redirection=redirection)
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert done.stdout.endswith(f"code {code}\n"), done
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_a_damaged_directory_is_not_taken_for_a_dense_model(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worked("export", home / "half", "--to", "hf", "--output", "beside")
    (tmp_path / "beside" / "torchprune_masks.json").write_text("{")
    worked("prune", home / "model", "--method", "magnitude", "-q", "--output", "whole")
    (tmp_path / "whole" / "manifest.json").write_text("{")
    for name, file in (("beside", "torchprune_masks.json"), ("whole", "manifest.json")):
        said = complaint("sensitivity", name, *SMALL)
        assert file in said
        assert "damaged" in said
    (tmp_path / "empty").mkdir()
    assert "empty holds no model" in complaint("sensitivity", "empty", *SMALL)
    (tmp_path / "weights").write_text("x")
    assert "weights is a file; name the directory" in complaint("sensitivity", "weights", *SMALL)


def test_what_int8_leaves_needs_int8(home):
    half = ("export", home / "half", "--to", "onnx", "--output", "x.onnx")
    said = complaint(*half, "--keep-float", "*down_proj*", code=2)
    assert "add --int8, or leave it out" in said
