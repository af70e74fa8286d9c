"""Ctrl-C in the middle of a prune: one line, code 130, nothing half-written, and the same again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from commands import SMALL, make_home, worked

import torchprune

INTERRUPTED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from torchprune.masking.transaction import Changes
real, settled = Changes.settle, []
def settle(self):
    settled.append(1)
    if len(settled) == 5:
        os.kill(os.getpid(), signal.SIGINT)
    return real(self)
Changes.settle = settle
from torchprune.cli.app import main
main()
"""


def test_a_prune_that_is_interrupted_leaves_nothing(tmp_path):
    home = make_home(tmp_path / "home")
    arguments = ("prune", home / "model", "--method", "sparsegpt", "--data", home / "text.txt")
    places = tmp_path / "places"
    places.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *map(str, (*arguments, *SMALL)), "--output", "out"],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=places,
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])},
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr == "error: interrupted\n"
    assert "pruning by sparsegpt" in done.stdout
    assert "pruned in" not in done.stdout
    assert list(places.iterdir()) == []
    states = []
    for out in (places / "out", places / "again"):
        worked(*arguments, *SMALL, "--output", out)
        states.append(torchprune.fold(torchprune.load(out)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


ROOT = Path(torchprune.__file__).resolve().parents[1]
