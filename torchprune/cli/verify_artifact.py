"""`torchprune verify`: every law of a saved artifact, checked again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from torchprune.cli.console import (
    DebugOption,
    DenseOption,
    JsonOption,
    OutputOption,
    QuietOption,
    SavedArgument,
    bars_wanted,
    one_line,
    print_json,
    typer,
)
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
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
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
    with one_line(debug):
        if not directory.is_dir():
            raise InputError(f"no such directory: {directory}")
        if output is not None and output.suffix.lower() not in (".html", ".json"):
            raise InputError(f"--output {output}: a proof is written as .html or .json")

        from torchprune.cli.models import device_of, import_transformers, load_model
        from torchprune.study.proofs.verify import LAWS
        from torchprune.study.proofs.verify import verify as check

        bars = bars_wanted(quiet or as_json)
        options: dict[str, Any] = {"progress": bars, "onnx": onnx, "laws": law or LAWS}
        if dense is not None:
            transformers, device = import_transformers(bars), device_of("cpu")
            options["dense"] = lambda: load_model(transformers, dense, None, device)
        proof = check(directory, **options)
        if output is not None:
            proof.save(output)
        if as_json:
            print_json(proof.to_dict())
        elif not quiet:
            typer.echo(str(proof))
        else:
            typer.echo("\n".join([*proof.wrongs(), proof.verdict]))
        if not proof.holds:
            raise typer.Exit(1)
