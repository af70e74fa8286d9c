"""The command line: `torchprune prune`, `eval` and `inspect`; `export` is in `cli_export`.

Results go to standard output; progress, and errors as one line, go to standard error. transformers
and datasets are imported only when a command needs them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

import torchprune
from torchprune.cli_export import export
from torchprune.console import (
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
    speaker,
    typer,
)
from torchprune.evaluation import context_of, default_seqlen, perplexity
from torchprune.goals import Override
from torchprune.manifest import is_saved
from torchprune.named import device_of, import_transformers, load_model, load_tokenizer
from torchprune.report import runs_of
from torchprune.specs import (
    ADMMSpec,
    BestSpec,
    MagnitudeSpec,
    RIASpec,
    SparseGPTSpec,
    Spec,
    WandaSpec,
)
from torchprune.synthesis import can_synthesise, synthesise
from torchprune.text import (
    InputError,
    draw_windows,
    read_documents,
    some_documents,
    tokenise,
)

CHARACTERS_PER_TOKEN = 64
"""How much text is tokenised for each calibration token that is wanted."""


class Method(StrEnum):
    """How weights are chosen."""

    magnitude = "magnitude"
    wanda = "wanda"
    ria = "ria"
    sparsegpt = "sparsegpt"
    admm = "admm"
    best = "best"


SPECS: dict[Method, type[Spec]] = {
    Method.magnitude: MagnitudeSpec,
    Method.wanda: WandaSpec,
    Method.ria: RIASpec,
    Method.sparsegpt: SparseGPTSpec,
    Method.admm: ADMMSpec,
    Method.best: BestSpec,
}

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
    """Prune language models: exact masks by magnitude, Wanda or SparseGPT.

    [bold]Prune, look, measure:[/bold]

      torchprune prune HuggingFaceTB/SmolLM2-135M --pattern 2:4 --output smol-2of4

      torchprune inspect smol-2of4

      torchprune eval smol-2of4 --text held-out.txt

      torchprune export smol-2of4 --to onnx --output smol.onnx

    Exit codes: 0 done, 1 something is wrong with the input (one line says what), 2 wrong usage.
    """


@app.command()
def prune(
    model: ModelOption,
    method: Annotated[
        Method,
        typer.Option(
            help="magnitude needs no data; wanda keeps weights as they are; sparsegpt updates "
            "those that stay, and takes longer."
        ),
    ] = Method.wanda,
    pattern: Annotated[
        str,
        typer.Option(
            help='"unstructured", "N:M" (keep N of every M along the input axis), "block:RxC".'
        ),
    ] = "unstructured",
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share of weights to prune, 0 <= x < 1. Default: 0.5; N:M implies its own.",
            show_default=False,
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help='Where the count is exact: "row", "layer", "global". Default: the method\'s own.',
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET",
            help="Calibration text: a text file, a .jsonl file, or a dataset as "
            "NAME:CONFIG:SPLIT. Default: text that the model itself writes.",
            show_default=False,
        ),
    ] = None,
    column: ColumnOption = "text",
    samples: Annotated[int, typer.Option(min=1, help="How many calibration windows.")] = 32,
    length: Annotated[int, typer.Option(min=1, help="Tokens in each window.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the windows' places, or of the own text.")] = 0,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help='Prune only these: a name, a glob "*.q_proj", "re:REGEX". May be repeated.',
            show_default=False,
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Leave these dense. May be repeated.", show_default=False
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help='Another goal for some layers: a sparsity, a pattern, "PATTERN,SPARSITY" or '
            '"dense". May be repeated; the first that fits a layer decides.',
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Save weights and masks here. Default, without --hf: a new directory named after "
            "the model, the method and the pattern.",
            show_default=False,
        ),
    ] = None,
    hf: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Save a plain transformers model here, zeros baked in.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Prune a causal language model and save it.

    [bold]Examples[/bold]

    Half of every row by Wanda, calibrated on text the model writes itself:

      torchprune prune HuggingFaceTB/SmolLM2-135M

    2:4 by SparseGPT on your own text, saved as a plain transformers directory:

      torchprune prune ./model --method sparsegpt --pattern 2:4 --data notes.txt --hf ./small

    70 %, but half in the last projection of every block, on rows of a dataset:

      torchprune prune ./model --sparsity 0.7 --override '*.down_proj=0.5' --data allenai/c4:en
    """
    overrides = dict(_override(item) for item in override or [])
    with one_line(debug):
        say = speaker(quiet)
        spec = SPECS[method](
            sparsity=sparsity,
            pattern=pattern,
            scope=scope,
            targets=target or None,
            ignore=ignore or (),
            overrides=overrides,
        )
        where = device_of(device)
        if output is None and hf is None:
            output = Path(_directory_name(model, spec))
        _check_free(output, is_saved)
        _check_free(hf, lambda directory: (directory / "torchprune.json").is_file())
        reads = data is not None and spec.needs_data
        documents = (
            read_documents(data, column, progress=bars_wanted(quiet)) if data and reads else None
        )
        if data and not reads:
            say(f"{method.value} needs no data: {data} is not read")

        say(f"loading {model}")
        transformers = import_transformers(bars_wanted(quiet))
        net = load_model(transformers, model, dtype.to_torch(), where)
        tokenizer = load_tokenizer(transformers, model, required=reads)
        batches, note = None, ""
        if spec.needs_data:
            length = _fitting(net, length, say)
            say(f"taking {samples} windows of {length} tokens of {data or 'the model itself'}")
            if documents is not None:
                batches = _drawn(tokenizer, documents, samples, length, seed)
            elif can_synthesise(net):
                batches = synthesise(
                    net, sequences=samples, length=length, seed=seed, progress=bars_wanted(quiet)
                )
            note = f"calibrated on {samples} windows of {length} tokens "
            note += f"of {data}" if data else "sampled from the model itself"
        say(f"pruning by {method.value} to {spec.goal}")
        started = time.perf_counter()
        torchprune.sparsify(
            net, spec, batches, progress=bars_wanted(quiet), max_batches=samples, seed=seed
        )
        say(f"pruned in {time.perf_counter() - started:.1f} s")
        if note:
            runs_of(net)[-1].notes.append(note)
        typer.echo(str(torchprune.report(net)))
        if output is not None:
            torchprune.save(net, output, tokenizer=tokenizer)
            say(f"saved weights and masks to {output}")
        if hf is not None:
            # by name: type checkers do not see where pyproject.toml puts this package
            import_module("torchprune.export").to_hf(net, hf, tokenizer=tokenizer)
            say(f"saved a plain transformers model to {hf}")


@app.command(name="eval")
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
        report = torchprune.report(torchprune.load(directory))
        typer.echo(json.dumps(report.to_dict()) if as_json else str(report))


app.command()(export)


# -- what the user named -------------------------------------------------------------------------


def _override(item: str) -> tuple[str, Override]:
    """`NAME=VALUE` as a selector and what `Spec.overrides` accepts."""
    name, found, text = item.rpartition("=")
    if not (name and found and text):
        raise typer.BadParameter(f"{item!r} is not NAME=VALUE", param_hint="--override")
    pattern, pair, share = text.partition(",")
    try:
        return name, ((pattern, float(share)) if pair else float(text))
    except ValueError:
        if pair:
            raise typer.BadParameter(
                f"{item!r}: {share!r} is no sparsity", param_hint="--override"
            ) from None
        return name, text


def _directory_name(model: str, spec: Spec) -> str:
    """Such as `SmolLM2-135M-wanda-2of4`."""
    goal = re.sub(r"(\d+):(\d+)", r"\1of\2", str(spec.goal))
    return f"{Path(model).resolve().name}-{spec.method}-{re.sub('[: ]', '-', goal)}"


def _check_free(directory: Path | None, ours: Callable[[Path], bool]) -> None:
    """Refuse to write over anything but an earlier result, before the work and not after it."""
    if directory is None or not directory.exists() or ours(directory):
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise InputError(f"{directory} exists and is no empty directory; name another")


def _drawn(
    tokenizer: Any, documents: list[str], count: int, length: int, seed: int
) -> list[Tensor]:
    """Calibration batches of one window each, from enough of the documents."""
    some = some_documents(documents, count * length * CHARACTERS_PER_TOKEN, seed)
    windows = draw_windows(tokenise(tokenizer, some), count, length, seed)
    return [window[None] for window in windows]


def _fitting(model: Any, length: int, say: Callable[[str], None]) -> int:
    """The length, cut to the model's context."""
    context = context_of(model) or length
    if length > context:
        say(f"the model's context is {context} tokens: windows are cut to that")
    return min(length, context)


def main() -> None:
    """Run the command line."""
    app(prog_name="torchprune")
