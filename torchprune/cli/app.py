"""The command line: all commands, in the order of work.

Results go to standard output; progress, and errors as one line, go to standard error. torch,
transformers and datasets are imported only when a command needs them, so that help and complaints
come at once. Most commands are in the files of their names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import torchprune
from torchprune.cli.build_kernels import build_kernels
from torchprune.cli.commands import Commands
from torchprune.cli.compare import compare
from torchprune.cli.console import typer
from torchprune.cli.eval_model import evaluate
from torchprune.cli.export import export
from torchprune.cli.inspect import inspect
from torchprune.cli.profiling import profile
from torchprune.cli.prune import prune
from torchprune.cli.recover import recover
from torchprune.cli.registry import add_command
from torchprune.cli.report_page import report
from torchprune.cli.sensing import sensitivity
from torchprune.cli.shrink import shrink
from torchprune.cli.verify_artifact import verify

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

DECIDE, PRUNE, MEASURE, HAND_OVER = (
    "Find out what to prune, and how",
    "Prune, and make up for it",
    "Measure and look",
    "Hand over",
)
"""The headings of the commands, in the order of work."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchprune {torchprune.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Prune language models: exact masks by magnitude, Wanda, RIA, SparseGPT or ADMM.

    [bold]Prune, look, measure:[/bold]

      torchprune prune HuggingFaceTB/SmolLM2-135M --pattern 2:4 --output smol-2of4

      torchprune inspect smol-2of4

      torchprune eval smol-2of4 --text held-out.txt

      torchprune report smol-2of4

      torchprune export smol-2of4 --to onnx --output smol.onnx

    Every command has --json: one object on standard output, on an error too;
    and --config FILE.toml, which holds a table of options for each command.

    Exit codes: 0 done, 1 something is wrong with the input (one line says what),
    2 wrong usage, 130 interrupted by Ctrl-C.
    """


for _panel, _name, _run in (
    (DECIDE, "sensitivity", sensitivity),
    (DECIDE, "compare", compare),
    (PRUNE, "prune", prune),
    (PRUNE, "shrink", shrink),
    (PRUNE, "recover", recover),
    (MEASURE, "eval", evaluate),
    (MEASURE, "inspect", inspect),
    (MEASURE, "profile", profile),
    (MEASURE, "report", report),
    (HAND_OVER, "export", export),
    (HAND_OVER, "verify", verify),
    (HAND_OVER, "build-kernels", build_kernels),
):
    add_command(app, _run, name=_name, panel=_panel)


def main() -> None:
    """Run the command line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    try:
        app(prog_name="torchprune")
    except OSError as error:  # outside of the commands: help, or the version
        sys.exit(f"error: {error}")
