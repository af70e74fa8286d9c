"""Lessons for libraries that are imported later, however often somebody asks before."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from torchprune.masking.awaited import when_imported


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_asking_whether_it_is_there_uses_up_no_lesson(
    asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"torchprune_awaited_{asked}"
    (tmp_path / f"{name}.py").write_text("import os\nif os.environ.get('BAD'): 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    told: list[ModuleType] = []
    when_imported({name: told.append})
    for _ in range(asked):
        assert importlib.util.find_spec(name) is not None  # as transformers asks for peft
    monkeypatch.setenv("BAD", "1")
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(name)
    assert told == []
    monkeypatch.delenv("BAD")
    module = importlib.import_module(name)
    importlib.import_module(name)
    assert told == [module]
    monkeypatch.delitem(sys.modules, name)


def test_what_is_not_there_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    when_imported({"torchprune_never": lambda module: None})
    assert importlib.util.find_spec("torchprune_never") is None
