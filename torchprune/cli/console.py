"""What the commands share: their common options, and how they speak and fail."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from torchprune.cli.noise import FOR_DEVELOPERS, hush
from torchprune.cli.this_run import json_wanted
from torchprune.errors import MissingExtraError, TorchpruneError

if TYPE_CHECKING:
    import torch

try:
    import typer as typer  # the commands take it from here, after this check
    import typer.core
except ImportError:  # this module is the program: say what to install, and stop
    sys.exit(f"error: {MissingExtraError('typer', 'cli', 'the command line')}")


INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""


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


@dataclass(frozen=True)
class Speech:
    """Options of how a command speaks. (See `registry` for what becomes of such a class.)"""

    as_json: JsonOption = False
    quiet: QuietOption = False
    debug: DebugOption = False

    def say(self, text: str) -> None:
        """Tell of progress: on standard output, or beside it where that is for JSON."""
        if not self.quiet:
            typer.echo(text, err=self.as_json)

    @property
    def bars(self) -> bool:
        """Whether to draw progress bars: for a person at a terminal who did not ask for quiet."""
        return not (self.quiet or self.as_json) and sys.stderr.isatty()


DataOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|DATASET",
        help="Calibration text: a text file, a .jsonl file, or a dataset as NAME:CONFIG:SPLIT. May "
        'be repeated, with weights as "notes.txt=0.7". Default: text that the model itself writes.',
        show_default=False,
    ),
]
ChatOption = Annotated[
    bool,
    typer.Option(
        "--chat/--no-chat",
        help='Have rows with a column "messages" written by the tokenizer\'s chat template, where '
        "it has one; or as plain text. Rows of text are plain either way.",
    ),
]
SamplesOption = Annotated[int, typer.Option(min=1, help="How many windows of calibration text.")]
LengthOption = Annotated[int, typer.Option(min=1, help="Tokens in each of them.")]
SeedOption = Annotated[
    int,
    typer.Option(help="Of all that is drawn: windows' places, own text, examples, permutations."),
]
TEXT: Any = typer.Option(
    "--text",
    "--eval-text",
    metavar="FILE|DATASET",
    help="To measure perplexity on: a text file, a .jsonl file, or a dataset as NAME:CONFIG:SPLIT.",
    show_default=False,
)
TextOption = Annotated[str, TEXT]
MaybeText = Annotated[str | None, TEXT]
"""For commands that measure other things, too."""
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Where the tokenizer is, if not with the model.",
        show_default=False,
    ),
]
DenseOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The model from before it was pruned, to compare with.",
        show_default=False,
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The dense model to measure too, and compare with; for eval also FILE.json, which "
        "--output wrote of it.",
        show_default=False,
    ),
]
SavedArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="A torchprune directory; for inspect and verify any other of .safetensors files, too.",
        show_default=False,
    ),
]
SeqlenOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens per window. Default: the model's context, at most 2048.",
        show_default=False,
    ),
]
WindowsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Read only so many windows. Default: all.", show_default=False),
]
OUTPUT: Any = typer.Option(
    "--output",
    "-o",
    metavar="PATH",
    help="Write the result here: a file whose suffix says its form, or a directory of weights and "
    "masks, over an earlier one.",
    show_default=False,
)
OutputOption = Annotated[Path | None, OUTPUT]
NeededOutput = Annotated[Path, OUTPUT]
"""For commands that write in any case."""
HfOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Save a plain transformers model here, zeros baked in.",
        show_default=False,
    ),
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help='Prune only these: a name, a glob "*.q_proj", "re:REGEX". May be repeated.',
        show_default=False,
    ),
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Leave these dense. May be repeated.", show_default=False),
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on where the same command was interrupted, to the same bits."
    ),
]


def show(text: str) -> None:
    """Print a result. Lines that the terminal would break anywhere are broken between words."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    typer.echo("\n".join(broken(line, width) for line in text.split("\n")) if width else text)


def broken(line: str, width: int) -> str:
    """A line that is not longer than the width, as it is; else in several, with a hanging indent.

    >>> print(broken("- at 1 token it is faster", 14))
    - at 1 token
      it is faster
    """
    if len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip(" -")) or 2)
    return "\n".join(
        textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    )


def print_json(data: Mapping[str, Any]) -> None:
    """The one object of a command that was asked for `--json`; what is no number is a string."""
    typer.echo(json.dumps(_plain(data), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


@contextmanager
def one_line(debug: bool) -> Iterator[None]:
    """Make an error one plain line and exit code 1, or 2 for wrong usage and 130 for Ctrl-C, and a
    warning one line; with debug leave everything as it comes. With `--json` an error is an object
    on standard output too.
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
        _fail(error, error.format_message() if error.param_hint else error.message, 2)
    except KeyboardInterrupt as error:
        _fail(error, str(error) or "interrupted", INTERRUPTED)
    except Exception as error:
        _fail(error, _message(error), 1)


@contextmanager
def kept_in(place: Path | None, how: str = "--resume") -> Iterator[None]:
    """Have Ctrl-C say where what was done is kept, if it is.

    Args:
        how: one goes on from there.
    """
    try:
        yield
    except KeyboardInterrupt:
        if place is None or not place.exists():
            raise
        raise KeyboardInterrupt(f"interrupted; {how} goes on from {place}") from None


def _fail(error: BaseException, message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    if json_wanted():
        print_failure(error, message)
    raise typer.Exit(code) from None


def print_failure(error: BaseException, message: str) -> None:
    """The one object of a command that was asked for `--json` and failed; nothing where standard
    output cannot be written, which may be why it failed."""
    with suppress(OSError):
        print_json({"error": message, "kind": type(error).__name__})


def _show(message: Warning | str, *_: object, **__: object) -> None:
    """In place of `warnings.showwarning`: one line, without the place in the code."""
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, TorchpruneError | OSError):
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"
