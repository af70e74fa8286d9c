"""Help and wrong usage come without torch; everybody else's program has all of the package."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from torchprune.process import is_the_command

SCRIPT = Path(sysconfig.get_path("scripts")) / "torchprune"
HEAVY = {"torch", "transformers", "datasets", "numpy", "huggingface_hub"}


def imported(*command: object) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """A finished process of Python, and the packages that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    names = {line.rpartition("|")[2].strip() for line in lines}
    assert {"typer", "torchprune.errors"} <= names, done.stderr
    return done, {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--help",), 0, "torchprune inspect smol-2of4"),
        (("--version",), 0, "torchprune 0."),
        (("prune", "--help"), 0, "--pattern"),
        (("prune", "model", "--methd", "wanda"), 2, "No such option"),
        (("prune", "model", "--method", "wandaa"), 2, "wandaa"),
        (("prune", "model", "--override", "q_proj"), 2, "is not NAME=VALUE"),
        (("eval", "model"), 2, "Missing option"),
        (("polish",), 2, "No such command"),
        (("inspect", "absent"), 1, "no such directory: absent"),
        (("eval", "model", "--text", "absent.txt"), 1, "no such file: absent.txt"),
    ],
)
def test_no_torch_for_help_and_wrong_usage(arguments, code, says):
    done, names = imported("-m", "torchprune", *arguments)
    assert done.returncode == code
    assert says in done.stdout + done.stderr
    assert not names & HEAVY


def test_the_installed_script_is_as_quick():
    if not SCRIPT.exists():
        pytest.skip("the package's script is not installed")
    done, names = imported(SCRIPT, "--help")
    assert done.returncode == 0
    assert not names & HEAVY


def test_torch_would_be_seen():
    code = "import torchprune.cli.app; assert callable(torchprune.sparsify)"
    done, names = imported("-c", code)
    assert done.returncode == 0, done.stderr
    assert "torch" in names


@pytest.mark.parametrize(
    ("program", "words", "expected"),
    [
        ("-m", ["python", "-m", "torchprune", "--help"], True),
        ("-m", ["python", "-W", "error", "-m", "torchprune"], True),
        ("-m", ["python", "-m", "pytest", "torchprune"], False),
        ("-m", ["python", "-m", "torchprune.testing"], False),
        ("-m", ["python", "-m"], False),
        (str(SCRIPT), ["python", str(SCRIPT)], True),
        (f"{SCRIPT}.exe", ["python"], True),
        ("torchprune", ["python", "torchprune"], False),  # somebody's own, in the working directory
        ("/somewhere/bin/torchprune", ["python"], False),
        ("prune.py", ["python", "prune.py"], False),
        ("", ["python"], False),
        ("-c", ["python", "-c", "import torchprune"], False),
    ],
)
def test_what_is_the_command(monkeypatch, tmp_path, program, words, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    monkeypatch.setattr(sys, "orig_argv", words)
    assert is_the_command() is expected


def test_a_program_without_arguments_is_no_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    assert not is_the_command()
    monkeypatch.delattr(sys, "argv")  # as where Python is embedded
    assert not is_the_command()
