"""Files that results are written to: their forms looked at before the work, and what they keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchprune.cli.console import typer
from torchprune.cli.places import check_place
from torchprune.errors import InputError


def check_form(
    output: Path | None, forms: Sequence[str], what: str, *, directory: bool = False
) -> None:
    """Refuse a file whose suffix says none of the forms that there are, or that cannot be written.

    Args:
        what: is saved there: "a comparison".
        directory: such a file is a directory, as a Mac's packages are.

    Raises:
        InputError: it is such a one.
    """
    if output is not None and output.suffix.lower() not in forms:
        raise InputError(f"{output}: {what} is saved as one of {', '.join(forms)}")
    check_place(output, directory=directory)


def store_of(output: Path | None, resume: bool) -> Path | None:
    """The `.json` of that name, which keeps results as they come; none without a name.

    Raises:
        typer.BadParameter: going on is asked for, and nothing is named.
        InputError: there are earlier results, and nobody asked to go on.
    """
    if output is None:
        if resume:
            raise typer.BadParameter(
                "nothing is kept without --output, so there is nothing to go on with",
                param_hint="--resume",
            )
        return None
    store = output if output.suffix.lower() == ".json" else output.with_suffix(".json")
    if store.exists() and not resume:
        raise InputError(f"{store} exists: go on with it by --resume, or name another --output")
    return store
