"""`torchprune verify`: every law of a saved artifact, checked again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from torchprune.cli.console import (
    DenseOption,
    OutputOption,
    SavedArgument,
    Speech,
    one_line,
    print_json,
    show,
    typer,
)
from torchprune.cli.loading import Loading
from torchprune.cli.result_files import check_form
from torchprune.errors import InputError


def verify(
    directory: SavedArgument,
    dense: DenseOption = None,
    onnx: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An ONNX file of the same model. Default: every .onnx in the directory.",
            show_default=False,
        ),
    ] = None,
    law: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help='Check only this law, as "count". May be repeated.',
            show_default=False,
        ),
    ] = None,
    output: OutputOption = None,
    speech: Speech = Speech(),
) -> None:
    """Check every law of a saved artifact again, and print the proof.

    Files, checksums, exact counts, patterns, zeros to the bit, folding, saving again, stock
    transformers in a process of its own, ONNX Runtime, lowering. A broken law names the module,
    what was expected and what was got. Nothing in the directory is changed or run.

    Exit codes: 0 all laws hold, 1 one is broken or the input is wrong, 2 wrong usage.

    [bold]Examples[/bold]

      torchprune verify smol-2of4

      torchprune verify smol-2of4 --dense HuggingFaceTB/SmolLM2-135M --json
    """
    with one_line(speech.debug):
        if not directory.is_dir():
            raise InputError(f"no such directory: {directory}")
        check_form(output, (".html", ".json"), "a proof")

        from torchprune.study.proofs.verify import LAWS
        from torchprune.study.proofs.verify import verify as check

        options: dict[str, Any] = {"progress": speech.bars, "onnx": onnx, "laws": law or LAWS}
        if dense is not None:
            loader = Loading(device="cpu").loader(speech.bars)
            options["dense"] = lambda: loader.model(dense)
        proof = check(directory, **options)
        if output is not None:
            proof.save(output)
            speech.say(f"wrote {output}")
        if speech.as_json:
            print_json(proof.to_dict())
        elif not speech.quiet:
            show(str(proof))
        else:
            typer.echo("\n".join([*proof.wrongs(), proof.verdict]))
        if not proof.holds:
            raise typer.Exit(1)
