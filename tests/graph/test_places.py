"""Messages name the user's own line wherever the user's files, torch and this package lie."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import torchprune

BRANCHING = """
import torch
from torch import nn

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x):
        if float(self.up(x).sum()) > 0:
            return x
        return self.up(x)
"""
LINE = "torch.export cannot capture this Branching at mine.py:11: "


def module_at(path: Path) -> ModuleType:
    """The module of `BRANCHING`, written to a file and imported from there."""
    path.parent.mkdir(parents=True)
    path.write_text(BRANCHING, "utf-8")
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "folder",
    ["torchprune", "torch", "é", "torch/torchprune/export", "site-packages/torch", "a b", "<x>"],
)
def test_a_model_is_the_users_in_a_folder_of_any_name(folder: str, tmp_path: Path) -> None:
    model = module_at(tmp_path / folder / "mine.py").Branching()
    with pytest.raises(torchprune.TorchpruneError) as caught:
        torchprune.plan_shrink(model, torch.randn(2, 4))
    assert LINE in str(caught.value)


def test_a_name_that_only_begins_like_the_package_is_not_the_package(tmp_path: Path) -> None:
    beside = Path(torchprune.__file__).parent.with_name("torchprune_of_mine") / "mine.py"
    code = compile(BRANCHING, str(beside), "exec")
    found: dict[str, Any] = {"__name__": "mine"}
    exec(code, found)
    with pytest.raises(torchprune.TorchpruneError) as caught:
        torchprune.plan_shrink(found["Branching"](), torch.randn(2, 4))
    assert LINE in str(caught.value)


IN_A_CLONE = """
import sys, torch, torchprune
from mine import Branching
print(torchprune.__file__)
try:
    torchprune.plan_shrink(Branching(), torch.randn(2, 4))
except torchprune.TorchpruneError as error:
    print(error)
"""


def test_a_clone_of_any_name_tells_its_own_lines_from_the_users(tmp_path: Path) -> None:
    """The package itself lies in such folders, and the user's file beside it, as tests do."""
    clone = tmp_path / "torch" / "é" / "torchprune"
    clone.mkdir(parents=True)
    (clone / "torchprune").symlink_to(Path(torchprune.__file__).parent)
    (clone / "mine.py").write_text(BRANCHING, "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CLONE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(clone), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    where, message = done.stdout.strip().splitlines()
    assert where == str(clone / "torchprune" / "__init__.py")
    assert LINE in message
