"""`torchprune inspect`: what is zero in a directory of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchprune.cli.console import (
    SavedArgument,
    Speech,
    one_line,
    print_json,
    show,
    typer,
)
from torchprune.cli.run_files import commands_of
from torchprune.errors import InputError


def inspect(
    directory: SavedArgument,
    speech: Speech = Speech(),
) -> None:
    """Show what pruning did: each layer's pattern, its zeros as counted now, its error.

    Of a directory that torchprune did not write, the zeros are counted in its files, one tensor at
    a time, and the patterns found; nothing is known of errors then.

    [bold]Examples[/bold]

      torchprune inspect smol-2of4

      torchprune inspect smol-2of4 --json | jq .total

      torchprune inspect ~/models/somebodys-sparse-llama
    """
    with one_line(speech.debug):
        if not directory.is_dir():
            raise InputError(f"no such directory: {directory}")
        made_by = commands_of(directory)
        found = _found(directory)
        if speech.as_json:
            print_json({**found.to_dict(), **({"commands": made_by} if made_by else {})})
            return
        show(str(found))
        if made_by and not speech.quiet:
            typer.echo("\n".join(["made by:", *(f"  {line}" for line in made_by)]))


def _found(directory: Path) -> Any:
    from torchprune.checkpoint.manifest import MANIFEST, MANIFEST_BESIDE, read_manifest

    if not any((directory / name).exists() for name in (MANIFEST, MANIFEST_BESIDE)):
        from torchprune.cli.file_counts import counted_files

        return counted_files(directory)
    if read_manifest(directory).config is None:
        from torchprune.cli.file_counts import counted_save

        return counted_save(directory)

    from torchprune.checkpoint.save_load import load
    from torchprune.reports.report import report

    return report(load(directory))
