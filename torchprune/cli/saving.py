"""Where results go: looked at before the work, written whole after it, with what made them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from torchprune.cli.registry import options_of_command
from torchprune.cli.run_files import RUN_FILE, remembered, toml_writer
from torchprune.cli.this_run import this_run
from torchprune.errors import InputError


def new_directory(words: list[str]) -> Path:
    """A directory named after the work.

    Raises:
        InputError: it is there. What its name does not tell (data, scope, seed, ...) may differ.
    """
    directory = Path("-".join(words))
    if directory.exists():
        raise InputError(f"{directory} exists; name one with --output, or this one to replace it")
    return directory


def check_free(output: Path | None, hf: Path | None) -> None:
    """Refuse to write over anything but an earlier result, before the work and not after it.

    Raises:
        InputError: something else is there.
        MissingExtraError: what a save needs is absent.
    """
    from torchprune.checkpoint.manifest import is_saved

    toml_writer()
    _check(output, is_saved)
    _check(hf, lambda directory: (directory / "torchprune.json").is_file())
    if output is not None and hf is not None and output.resolve() == hf.resolve():
        raise InputError(f"--output and --hf are both {output}; name two directories")


def _check(directory: Path | None, ours: Callable[[Path], bool]) -> None:
    if directory is None or not directory.exists() or ours(directory):
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise InputError(f"{directory} exists and is no empty directory; name another")


def save_all(
    net: Any,
    tokenizer: Any,
    source: str,
    output: Path | None,
    hf: Path | None,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Save a model wherever it was asked for, each directory with its `run.toml`.

    Args:
        source: the directory or name that the command began from.

    Returns:
        what was written: option -> path.
    """
    from torchprune.checkpoint.save_load import save

    along = with_memory(tokenizer, source)
    written = {}
    if output is not None:
        save(net, output, tokenizer=along)
        say(f"saved weights and masks to {output}")
        written["output"] = str(output)
    if hf is not None:
        # by name: type checkers do not see where pyproject.toml puts this package
        import_module("torchprune.export").to_hf(net, hf, tokenizer=along)
        say(f"saved a plain transformers model to {hf}")
        written["hf"] = str(hf)
    return written


def with_memory(tokenizer: Any, source: str) -> Any:
    """What stands for a tokenizer where one is saved, and writes `run.toml` too.

    Args:
        source: the directory or name that the command began from, whose commands come first.
    """
    return _Along(tokenizer, _memory(Path(source)))


class _Along:
    """What goes into a directory beside the weights, before it takes its name."""

    def __init__(self, tokenizer: Any, memory: str) -> None:
        self._tokenizer, self._memory = tokenizer, memory

    def save_pretrained(self, directory: str) -> None:
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(directory)
        if self._memory:
            (Path(directory) / RUN_FILE).write_text(self._memory, "utf-8")


def _memory(source: Path) -> str:
    run = this_run()
    if run is None:
        return ""
    return remembered(run, options_of_command(run.command), source if source.is_dir() else None)
