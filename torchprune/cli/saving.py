"""Where results go: looked at before the work, written whole after it, with what made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torchprune.cli.console import HfOption, OutputOption
from torchprune.cli.places import check_place
from torchprune.cli.registry import options_of_command
from torchprune.cli.run_files import RUN_FILE, remembered, toml_writer
from torchprune.cli.this_run import this_run
from torchprune.errors import InputError


@dataclass(frozen=True)
class Destination:
    """Options of where a model goes. (See `registry` for what becomes of such a class.)"""

    output: OutputOption = None
    hf: HfOption = None

    @property
    def named(self) -> bool:
        """Whether any place was named."""
        return self.output is not None or self.hf is not None

    @property
    def main(self) -> Path:
        """The place that what lies beside the result is named after."""
        return self.output or self.hf or Path()

    def or_new(self, words: Sequence[str]) -> Destination:
        """This one, or where none was named a new directory named after the work.

        Raises:
            InputError: it is there. What its name does not tell (data, scope, seed, ...) may
                differ.
        """
        if self.named:
            return self
        directory = Path("-".join(words))
        if directory.exists():
            raise InputError(
                f"{directory} exists; name one with --output, or this one to replace it"
            )
        return replace(self, output=directory)

    def progress(self, resume: bool, say: Callable[[str], None]) -> Path:
        """Where a run is kept until it ends.

        Raises:
            InputError: an earlier one lies there, and nobody asked to go on with it.
        """
        place = self.main.with_name(f"{self.main.name}.progress")
        if place.exists() and not resume:
            raise InputError(
                f"{place} holds an interrupted run: go on with --resume, or delete it to begin anew"
            )
        if resume and not place.exists():
            say(f"no progress at {place}: beginning from the start")
        return place

    def check_free(self) -> None:
        """Refuse to write over anything but an earlier result, before the work and not after it.

        Raises:
            InputError: something else is there.
            MissingExtraError: what a save needs is absent.
        """
        from torchprune.checkpoint.manifest import is_saved

        toml_writer()
        _check(self.output, is_saved)
        check_free_for_hf(self.hf)
        both = [place.resolve() for place in (self.output, self.hf) if place is not None]
        if len(both) > len(set(both)):
            raise InputError(f"--output and --hf are both {self.output}; name two directories")

    def save(
        self, net: Any, tokenizer: Any, source: str, say: Callable[[str], None]
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
        if self.output is not None:
            save(net, self.output, tokenizer=along)
            say(f"saved weights and masks to {self.output}")
            written["output"] = str(self.output)
        if self.hf is not None:
            # by name: type checkers do not see where pyproject.toml puts this package
            import_module("torchprune.export").to_hf(net, self.hf, tokenizer=along)
            say(f"saved a plain transformers model to {self.hf}")
            written["hf"] = str(self.hf)
        return written


def check_free_for_hf(directory: Path | None) -> None:
    """As `Destination.check_free`, of a directory for a plain transformers model.

    Raises:
        InputError: it cannot be written, or something other than an earlier one is there.
    """
    _check(directory, lambda earlier: (earlier / "torchprune.json").is_file())


def _check(directory: Path | None, ours: Callable[[Path], bool]) -> None:
    if directory is None:
        return
    check_place(directory, directory=True)
    if directory.exists() and not ours(directory) and any(directory.iterdir()):
        raise InputError(f"{directory} exists and is no empty directory; name another")


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
