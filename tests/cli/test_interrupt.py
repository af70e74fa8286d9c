"""Ctrl-C in the middle of a prune: one line, code 130, no half files, and then it goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from commands import SMALL, complaint, make_home, worked

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


def test_a_prune_that_is_interrupted_goes_on_to_the_same_bits(tmp_path):
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
    assert done.stderr == "error: interrupted; --resume goes on from out.progress\n"
    assert "pruning by sparsegpt" in done.stdout
    assert "pruned in" not in done.stdout
    assert [place.name for place in places.iterdir()] == ["out.progress"]
    out = ("--output", places / "out")
    refused = complaint(*arguments, *SMALL, *out)
    assert "out.progress holds an interrupted run: go on with --resume, or delete it" in refused
    other = complaint(*arguments, *SMALL, *out, "--sparsity", "0.6", "--resume")
    assert "the progress of another run" in other
    worked(*arguments, *SMALL, *out, "--resume")
    said = worked(*arguments, *SMALL, "--output", places / "again", "--resume")
    assert "again.progress: beginning from the start" in said
    assert {place.name for place in places.iterdir()} == {"out", "again"}
    models = [torchprune.load(places / name) for name in ("out", "again")]
    states = [torchprune.fold(model).state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


ROOT = Path(torchprune.__file__).resolve().parents[1]
