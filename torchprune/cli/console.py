"""What the commands share: their common options, and how they speak and fail."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from torchprune.cli.noise import FOR_DEVELOPERS, hush
from torchprune.errors import MissingExtraError, TorchpruneError

if TYPE_CHECKING:
    import torch

try:
    import typer as typer  # the commands take it from here, after this check
except ImportError:  # this module is the program: say what to install, and stop
    sys.exit(f"error: {MissingExtraError('typer', 'cli', 'the command line')}")


class Dtype(StrEnum):
    """The dtype a model is loaded in; `auto` is the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    def to_torch(self) -> torch.dtype | None:
        """None stands for the checkpoint's own."""
        import torch

        return None if self is Dtype.auto else getattr(torch, self.value)


ModelOption = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A torchprune directory, a transformers directory, or a name on the model hub.",
        show_default=False,
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Load the model in this dtype.")]
DeviceOption = Annotated[
    str, typer.Option(help='Where to compute: "cpu", "cuda", "cuda:1"; auto is a GPU if any.')
]
ColumnOption = Annotated[str, typer.Option(help="The field of a row that holds the text.")]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results and errors, nothing else.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def speaker(quiet: bool) -> Callable[[str], None]:
    def say(text: str) -> None:
        if not quiet:
            typer.echo(text)

    return say


def bars_wanted(quiet: bool) -> bool:
    """Whether to draw progress bars: for a person at a terminal who did not ask for quiet."""
    return not quiet and sys.stderr.isatty()


@contextmanager
def one_line(debug: bool) -> Iterator[None]:
    """Make an error one plain line and exit code 1, or 2 for wrong usage, and a warning one line;
    with debug leave everything as it comes.
    """
    if debug:
        yield
        return
    hush()
    try:
        with warnings.catch_warnings():
            for category in FOR_DEVELOPERS:
                warnings.simplefilter("ignore", category)
            warnings.showwarning = _show
            yield
    except typer.Exit:
        raise
    except typer.BadParameter as error:
        typer.echo(f"error: {error.format_message()}", err=True)
        raise typer.Exit(2) from None
    except (Exception, KeyboardInterrupt) as error:
        typer.echo(f"error: {_message(error)}", err=True)
        raise typer.Exit(1) from None


def _show(message: Warning | str, *_: object, **__: object) -> None:
    """In place of `warnings.showwarning`: one line, without the place in the code."""
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, TorchpruneError | OSError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"
