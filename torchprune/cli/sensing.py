"""`torchprune sensitivity`: what pruning each layer, head or block alone would cost."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from torchprune.cli.console import (
    ChatOption,
    ColumnOption,
    DataOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelOption,
    OutputOption,
    QuietOption,
    ResumeOption,
    SamplesOption,
    SeedOption,
    bars_wanted,
    one_line,
    print_json,
    speaker,
    typer,
)
from torchprune.cli.samples import calibration_of, read_sources
from torchprune.cli.spec_texts import made, parsed
from torchprune.errors import InputError

_FORMS = (".json", ".html", ".svg", ".png", ".pdf")


class Mode(StrEnum):
    """How costs are found."""

    cheap = "cheap"
    exact = "exact"


def sensitivity(
    model: ModelOption,
    what: Annotated[
        str,
        typer.Option(
            metavar="METHOD,NAME=VALUE,...",
            help='What is tried on each layer alone, as in Python: "wanda", "magnitude", or on '
            'whole units: "heads", "neurons", "layers,drop=1".',
        ),
    ] = "wanda",
    levels: Annotated[
        str | None,
        typer.Option(
            metavar="S,S,...",
            help="Sparsities or patterns to try. Default: 0.3, 0.5 and 0.7, or the pattern of "
            "--what.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="cheap predicts from one pass and a few backward; exact changes one layer after "
            "another and runs the model."
        ),
    ] = Mode.cheap,
    judges: Annotated[
        int, typer.Option(min=1, help="Windows that judge in exact mode, the first of the data.")
    ] = 8,
    overrides: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Also print overrides that share so many zeros by these costs, to paste.",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
    column: ColumnOption = "text",
    chat: ChatOption = True,
    samples: SamplesOption = 32,
    length: LengthOption = 512,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    output: OutputOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Find out what pruning each layer, head or block alone would cost. Nothing is pruned.

    --output is a .json, an .html page or a figure. In exact mode results are kept as they
    come, in the .json of that name: after Ctrl-C the same command with --resume goes on.

    [bold]Examples[/bold]

      torchprune sensitivity ./model --data notes.txt --overrides 0.6

      torchprune sensitivity ./model --what magnitude --levels 0.5,2:4 --output costs.html

      torchprune sensitivity ./model --what heads --mode exact --output heads.json --resume
    """
    with one_line(debug):
        say, bars = speaker(quiet), bars_wanted(quiet or as_json)
        asked, tried = parsed(what), _levels(levels)
        store = _store(output, mode, resume)

        # Usage is right: what follows needs torch, which takes seconds to import.
        from torchprune.cli.models import device_of, import_transformers, load_model, load_tokenizer
        from torchprune.study.costs.sensitivity import sensitivity as measured

        spec: Any = made(*asked)
        sources = read_sources(data or (), column, progress=bars)
        say(f"loading {model}")
        transformers = import_transformers(bars)
        net = load_model(transformers, model, dtype.to_torch(), device_of(device))
        tokenizer = load_tokenizer(transformers, model, required=bool(sources))
        batches, _ = calibration_of(
            net,
            tokenizer,
            sources,
            samples=samples,
            length=length,
            seed=seed,
            chat=chat,
            say=say,
            progress=bars,
        )
        found = measured(
            net,
            batches,
            spec,
            levels=tried,
            mode=mode.value,
            max_windows=judges,
            progress=bars,
            path=store,
            max_batches=samples,
            seed=seed,
        )
        shared = None if overrides is None else found.overrides(overrides)
        if as_json:
            extra = {} if shared is None else {"overrides": shared}
            print_json({**json.loads(found.to_json()), **extra})
        else:
            typer.echo(str(found))
            if shared is not None:
                typer.echo(f"overrides = {shared!r}")
        if output is not None:
            found.save(output)
            say(f"wrote {output}")


def _levels(text: str | None) -> list[Any] | None:
    """Sparsities as numbers, patterns as they are."""
    if text is None:
        return None
    found: list[Any] = []
    for part in (part.strip() for part in text.split(",")):
        try:
            found.append(float(part))
        except ValueError:
            found.append(part)
    return found


def _store(output: Path | None, mode: Mode, resume: bool) -> Path | None:
    """The file that keeps results as they come.

    Raises:
        InputError: there are earlier results and nobody asked to go on, or another suffix.
    """
    if output is None:
        if resume:
            raise typer.BadParameter(
                "nothing is kept without --output, so there is nothing to go on with",
                param_hint="--resume",
            )
        return None
    if output.suffix.lower() not in _FORMS:
        raise InputError(f"{output}: a sensitivity is saved as one of {', '.join(_FORMS)}")
    if mode is Mode.cheap and not resume:
        return None
    store = output.with_suffix(".json")
    if store.exists() and not resume:
        raise InputError(f"{store} exists: go on with it by --resume, or name another --output")
    return store
