"""Shell completion: the scripts, and quick answers without torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from torchprune.cli.app import app

SHELLS = ("bash", "zsh", "fish")


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_a_script(shell, monkeypatch):
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: shell)
    result = CliRunner().invoke(app, ["--show-completion"], prog_name="torchprune")
    assert result.exit_code == 0
    assert f"_TORCHPRUNE_COMPLETE=complete_{shell}" in result.stdout
    assert "torchprune" in result.stdout


def completed(shell: str, line: str, *python: str) -> subprocess.CompletedProcess[str]:
    """What a shell is answered for a line that the cursor stands behind."""
    words = line.split(" ")
    asked = {
        "_TORCHPRUNE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    return subprocess.run(
        [sys.executable, *python, "-m", "torchprune"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | asked,
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_a_command_is_completed_without_torch(shell):
    done = completed(shell, "torchprune pr", "-X", "importtime")
    assert "prune" in done.stdout
    assert "eval" not in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not {"torch", "transformers", "datasets", "numpy"} & imported


@pytest.mark.parametrize(
    ("line", "expected", "not_expected"),
    [
        ("torchprune prune m --method w", "wanda", "ria"),
        ("torchprune recover m --train n", "norms", "lora"),
        ("torchprune shrink m --neu", "--neurons", "--heads"),
    ],
)
def test_values_and_flags_are_completed(line, expected, not_expected):
    said = completed("bash", line).stdout
    assert expected in said
    assert not_expected not in said
