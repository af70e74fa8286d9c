"""The command line: `torchprune prune`, `eval`, `inspect`, `report` and `export`.

Results go to standard output; progress, and errors as one line, go to standard error. torch,
transformers and datasets are imported only when a command needs them, so that help and complaints
come at once. `prune`, `eval` and `export` are in files of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torchprune
from torchprune.cli.console import DebugOption, JsonOption, one_line, typer
from torchprune.cli.eval_model import evaluate
from torchprune.cli.export import export
from torchprune.cli.profiling import profile
from torchprune.cli.prune import prune
from torchprune.cli.verify_artifact import verify
from torchprune.cli.report_page import report
from torchprune.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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

    Exit codes: 0 done, 1 something is wrong with the input (one line says what), 2 wrong usage.
    """


app.command()(prune)


app.command(name="eval")(evaluate)


@app.command()
def inspect(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A torchprune directory.", show_default=False)
    ],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what pruning did: each layer's pattern, its zeros as counted now, its error.

    [bold]Examples[/bold]

      torchprune inspect smol-2of4

      torchprune inspect smol-2of4 --json | jq .total
    """
    with one_line(debug):
        if not directory.is_dir():
            raise InputError(f"no such directory: {directory}")

        from torchprune.checkpoint.save_load import load
        from torchprune.reports.report import report

        found = report(load(directory))
        typer.echo(json.dumps(found.to_dict()) if as_json else str(found))


app.command()(report)
app.command()(export)

app.command()(verify)

app.command()(profile)



def main() -> None:
    """Run the command line."""
    app(prog_name="torchprune")
