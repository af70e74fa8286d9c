"""The group of all commands: wrong usage is an object, too, where `--json` asks for one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torchprune.cli.console import print_failure, typer

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What typer raises of a command line that it cannot read, and shows by itself."""


class Commands(typer.core.TyperGroup):
    """Commands whose usage is told as JSON on standard output where `--json` is among the words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer's."""
        with _told(args):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """As typer's: the words after the command's name are read here."""
        with _told(ctx.args):
            return super().invoke(ctx)


@contextmanager
def _told(words: Sequence[str]) -> Iterator[None]:
    asked = "--json" in words[: words.index("--") if "--" in words else None]
    try:
        yield
    except _UsageError as error:
        if asked:
            print_failure(error, getattr(error, "format_message", error.__str__)())
        raise
