"""What other libraries say: harmless lines are left out, all else is passed on."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import call, complaint, make_home, worked

from torchprune.cli import documents
from torchprune.cli.noise import _HARMLESS, hush, without_runtime_lines
from torchprune.reports.report import remember_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("noise"))


@pytest.fixture
def as_they_were() -> Iterator[None]:
    """The loggers without our filters, and so again afterwards."""
    loggers = [logging.getLogger(name) for name in _HARMLESS]
    before = [list(logger.filters) for logger in loggers]
    for logger in loggers:
        logger.filters.clear()
    yield
    for logger, filters in zip(loggers, before, strict=True):
        logger.filters[:] = filters


def test_only_known_messages_of_known_loggers_are_dropped(as_they_were, caplog):
    enum = (
        "%s is an Enum subclass and is now natively supported by torch.compile as an opaque value "
        "type. Calling register_constant() on Enum subclasses is deprecated"
    )
    for _ in range(2):  # asked twice, as by two commands
        hush()
    logging.getLogger("torchao").warning("Failed to load /some/_C_cutlass_90a.abi3.so: no GPU")
    logging.getLogger("torch.utils._pytree").warning(enum, "<enum 'KernelPreference'>")
    assert caplog.messages == []
    logging.getLogger("torchao").warning("this torch is too old")
    logging.getLogger("torch.utils._pytree").warning("%s is registered twice", "Tree")
    logging.getLogger("somebody").warning("Failed to load what was asked for")
    assert len(caplog.messages) == 3
    assert all(len(logging.getLogger(name).filters) == 1 for name in _HARMLESS)


def warn_while_reading(monkeypatch: pytest.MonkeyPatch, text: str, kind: type[Warning]) -> None:
    """Have the commands meet a foreign warning on the way."""
    real = documents.plain_text

    def read(path: Path) -> str:
        warnings.warn(text, kind, stacklevel=1)
        return real(path)

    monkeypatch.setattr(documents, "plain_text", read)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", [UserWarning, RuntimeWarning])
def test_a_warning_is_one_line(home, monkeypatch, kind):
    warn_while_reading(monkeypatch, "the weights\nare of another model", kind)
    result = call("eval", home / "model", "--text", home / "text.txt")
    assert result.exit_code == 0
    assert result.stderr == "warning: the weights are of another model\n"


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_advice_to_developers_is_left_out(home, monkeypatch, kind):
    warn_while_reading(monkeypatch, "call it otherwise", kind)
    worked("eval", home / "model", "--text", home / "text.txt")


def test_weights_that_are_missing_are_told(home, tmp_path):
    """A model that is half random is no harmless matter."""
    from safetensors.torch import load_file, save_file

    for file in (home / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    told: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("transformers").addHandler(listener)
    try:
        assert call("eval", tmp_path, "--text", home / "text.txt").exit_code == 0
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    assert "model.layers.0.mlp.up_proj.weight" in "\n".join(told)


@pytest.mark.filterwarnings("default")
def test_what_pruning_warns_of_is_in_the_report_alone(home, tmp_path, monkeypatch):
    sparsify = importlib.import_module("torchprune.sparsify")
    monkeypatch.setattr(sparsify, "without_data", lambda targets, spec: iter(()))

    def remember(model, run):
        run.warnings.append("q_proj is pruned oddly")
        remember_run(model, run)

    monkeypatch.setattr(sparsify, "remember_run", remember)
    magnitude = ("--method", "magnitude", "--output", tmp_path / "out")
    assert "q_proj is pruned oddly" in worked("prune", home / "model", *magnitude)


def test_errors_are_one_line_still(home):
    assert "no such file" in complaint("eval", home / "model", "--text", "absent.txt")


# -- a process of its own, since what is said on import is said once -------------------------------


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def test_a_command_says_nothing_foreign_and_debug_does(home):
    pytest.importorskip("torchao", reason="its absence is as quiet")
    evaluate = ("-m", "torchprune", "eval", home / "model", "--text", home / "text.txt")
    done = program(*evaluate)
    assert done.returncode == 0
    assert done.stderr == ""
    done = program(*evaluate, "--debug")
    assert done.returncode == 0
    assert "torchao" in done.stderr or "Enum" in done.stderr


def test_an_example_says_nothing_foreign(tmp_path):
    code = "import sys; sys.path.insert(0, 'examples'); import smollm2, deployed, demo"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == done.stdout == ""


def test_lines_about_the_processor_are_left_out_and_no_others(capfd):
    with without_runtime_lines():
        os.write(2, b"[cpuinfo_utils.cpp:71] Reading file\nError: mine\n[cpuinfo_utils.cpp:87] x\n")
        print("and mine", file=sys.stderr)
    assert sorted(capfd.readouterr().err.splitlines()) == ["Error: mine", "and mine"]
