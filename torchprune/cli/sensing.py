"""`torchprune sensitivity`: what pruning each layer, head or block alone would cost."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated, Any

from torchprune.cli.console import (
    ModelOption,
    OutputOption,
    ResumeOption,
    Speech,
    kept_in,
    one_line,
    print_json,
    show,
    typer,
)
from torchprune.cli.loading import Loading
from torchprune.cli.result_files import check_form, store_of
from torchprune.cli.samples import Calibration
from torchprune.cli.spec_texts import made, parsed

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
            help="Also print overrides that share so many zeros, 0 <= x < 1, by these costs, to "
            "paste.",
            show_default=False,
        ),
    ] = None,
    calibration: Calibration = Calibration(),
    resume: ResumeOption = False,
    output: OutputOption = None,
    loading: Loading = Loading(),
    speech: Speech = Speech(),
) -> None:
    """Find out what pruning each layer, head or block alone would cost. Nothing is pruned.

    --output is a .json, an .html page or a figure. In exact mode results are kept as they
    come, in the .json of that name: after Ctrl-C the same command with --resume goes on.

    [bold]Examples[/bold]

      torchprune sensitivity ./model --data notes.txt --overrides 0.6

      torchprune sensitivity ./model --what magnitude --levels 0.5,2:4 --output costs.html

      torchprune sensitivity ./model --what heads --mode exact --output heads.json --resume
    """
    with one_line(speech.debug):
        say, bars = speech.say, speech.bars
        asked, tried = parsed(what, "--what"), _levels(levels)
        if overrides is not None and not overrides < 1:
            raise typer.BadParameter(
                f"the share of zeros, 0 <= x < 1, got {overrides:g}", param_hint="--overrides"
            )
        check_form(output, _FORMS, "a sensitivity")
        store = store_of(output, resume) if mode is Mode.exact or resume else None

        # Usage is right: what follows needs torch, which takes seconds to import.
        from torchprune.study.costs.sensitivity import sensitivity as measured
        from torchprune.study.costs.sensitivity import tried_on

        spec: Any = made(*asked)
        tried_on(spec, tried)  # refused here, if it is
        loader = loading.loader(bars)
        sources = calibration.sources(bars)
        say(f"loading {model}")
        net = loader.model(model)
        tokenizer = loader.tokenizer(model, required=bool(sources))
        batches, _ = calibration.windows(net, tokenizer, sources, say=say, progress=bars)
        with kept_in(store):
            found = measured(
                net,
                batches,
                spec,
                levels=tried,
                mode=mode.value,
                max_windows=judges,
                progress=bars,
                path=store,
                max_batches=calibration.samples,
                seed=calibration.seed,
            )
        shared = None if overrides is None else found.overrides(overrides)
        if speech.as_json:
            extra = {} if shared is None else {"overrides": shared}
            print_json({**json.loads(found.to_json()), **extra})
        else:
            show(str(found))
            if shared is not None:
                typer.echo(_pasted(shared))
        if output is not None:
            found.save(output)
            say(f"wrote {output}")


def _pasted(shared: dict[str, float]) -> str:
    """Overrides as Python has them, a layer a line."""
    lines = (f"    {name!r}: {sparsity}," for name, sparsity in shared.items())
    return "\n".join(["overrides = {", *lines, "}"])


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
