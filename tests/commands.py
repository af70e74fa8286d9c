"""What tests of the command line call, and a directory to call it in."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_lm import ARTICLES, save_tiny_lm
from typer.testing import CliRunner, Result

from torchprune.cli.app import app

TEXT = "\n\n".join(ARTICLES)
SMALL = ("--samples", "3", "--length", "16")


def make_home(home: Path) -> Path:
    """A directory with a tiny model and its tokenizer, a text, and the same as JSON lines."""
    save_tiny_lm(home / "model")
    (home / "text.txt").write_text(TEXT, "utf-8")
    rows = "\n".join(json.dumps({"text": t, "n": 1}) for t in ARTICLES)
    (home / "text.jsonl").write_text(rows, "utf-8")
    return home


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def worked(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def complaint(*arguments: object, code: int = 1) -> str:
    """The one line on standard error of a call that ends with this exit code."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]
