"""The command line: all commands, in the order of work.

Results go to standard output; progress, and errors as one line, go to standard error. torch,
transformers and datasets are imported only when a command needs them, so that help and complaints
come at once. Most commands are in the files of their names.
"""

from __future__ import annotations

import json
from typing import Annotated

import torchprune
from torchprune.cli.compare import compare
from torchprune.cli.console import (
    ColumnOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelOption,
    QuietOption,
    bars_wanted,
    one_line,
    typer,
)
from torchprune.cli.documents import read_documents
from torchprune.cli.export import export
from torchprune.cli.inspect import inspect
from torchprune.cli.prune import prune
from torchprune.cli.recover import recover
from torchprune.cli.registry import add_command
from torchprune.cli.shrink import shrink

app = typer.Typer(
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

      torchprune export smol-2of4 --to onnx --output smol.onnx

    Every command has --json: one object on standard output, on an error too;
    and --config FILE.toml, which holds a table of options for each command.

    Exit codes: 0 done, 1 something is wrong with the input (one line says what),
    2 wrong usage, 130 interrupted by Ctrl-C.
    """


def evaluate(
    model: ModelOption,
    text: Annotated[
        str,
        typer.Option(
            metavar="FILE|DATASET",
            help="A text file, a .jsonl file, or a dataset as NAME:CONFIG:SPLIT.",
            show_default=False,
        ),
    ],
    seqlen: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens per window. Default: the model's context, at most 2048.",
            show_default=False,
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="Read only so many windows. Default: all.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 1,
    column: ColumnOption = "text",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the tokenizer is, if not with the model.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure the perplexity of a pruned or a dense model.

    The text's documents are joined by blank lines, tokenised once and cut into windows without
    overlap; the tail is dropped. Compare only figures of the same text and --seqlen.

    [bold]Examples[/bold]

      torchprune eval smol-2of4 --text held-out.txt

      torchprune eval ./model --text Salesforce/wikitext:wikitext-2-raw-v1:test
    """
    with one_line(debug):
        bars = bars_wanted(quiet or as_json)
        documents = read_documents(text, column, progress=bars)

        from torchprune.calibration.text import tokenise
        from torchprune.cli.models import device_of, import_transformers, load_model, load_tokenizer
        from torchprune.study.evaluation import default_seqlen, perplexity

        transformers = import_transformers(bars)
        net = load_model(transformers, model, dtype.to_torch(), device_of(device))
        known = load_tokenizer(transformers, tokenizer or model, required=True)
        ids = tokenise(known, documents)
        if windows is not None:
            ids = ids[: windows * (seqlen or default_seqlen(net))]
        result = perplexity(net, ids, seqlen=seqlen, batch_size=batch_size, progress=bars)
        if as_json:
            figures = ("perplexity", "nats_per_token", "bits_per_token", "windows", "seqlen")
            typer.echo(json.dumps({k: getattr(result, k) for k in (*figures, "tokens")}))
        else:
            typer.echo(str(result))


for _panel, _name, _run in (
    (DECIDE, "compare", compare),
    (PRUNE, "prune", prune),
    (PRUNE, "shrink", shrink),
    (PRUNE, "recover", recover),
    (MEASURE, "eval", evaluate),
    (MEASURE, "inspect", inspect),
    (HAND_OVER, "export", export),
):
    add_command(app, _run, name=_name, panel=_panel)


def main() -> None:
    """Run the command line."""
    app(prog_name="torchprune")
