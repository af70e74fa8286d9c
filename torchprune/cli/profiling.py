"""`torchprune profile`: what a model costs in each form, beside the dense one."""

from __future__ import annotations

from typing import Annotated

from torchprune.cli.console import (
    AgainstOption,
    ModelOption,
    OutputOption,
    Speech,
    one_line,
    show,
    typer,
)
from torchprune.cli.loading import Loading
from torchprune.cli.places import check_place


def profile(
    model: ModelOption,
    against: AgainstOption = None,
    rows: Annotated[
        str, typer.Option(metavar="N,N,...", help="Tokens in a call, without a cache.")
    ] = "1,8,64,512",
    forms: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="masked, eager, compile, bitmask, bitmask_int8, int8, int8_dynamic, "
            "semi_structured, onnx, openvino. Default: all that can be had here.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.001, help="For each form and number of tokens.")
    ] = 1.0,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Also the time of every layer.")
    ] = False,
    prospects: Annotated[
        bool,
        typer.Option(
            "--prospects/--no-prospects",
            help="Time kernels on the shapes of the layers, to say what would bring more.",
        ),
    ] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: torch's own.", show_default=False)
    ] = None,
    output: OutputOption = None,
    loading: Loading = Loading(),
    speech: Speech = Speech(),
) -> None:
    """Measure a model's speed, memory and arithmetic in every form it can run in.

    Forms take turns, so that a busy machine hurts them alike. Forms that cannot be had here are
    lines with the reason. Below the table it says in words what zeros bring, and what would bring
    more.

    [bold]Examples[/bold]

      torchprune profile smol-2of4 --against HuggingFaceTB/SmolLM2-135M --rows 1,8,64

      torchprune profile smol-2of4 --forms eager,bitmask --output profile.json
    """
    with one_line(speech.debug):
        wanted = _numbers(rows)
        names = None if forms is None else [name.strip() for name in forms.split(",")]

        # Usage is right: what follows needs torch, which takes seconds to import.
        import torch

        from torchprune.study.speed.forms import chosen_forms
        from torchprune.study.speed.profile import profile as measured
        from torchprune.study.speed.profile_results import check_suffix

        chosen_forms(names)
        check_suffix(output)
        check_place(output)
        loader = loading.loader(speech.bars)
        net = loader.model(model)
        dense = None if against is None else loader.model(against)
        vocabulary = net.get_input_embeddings().num_embeddings
        found = measured(
            net,
            {"input_ids": torch.arange(512)[None] % vocabulary},
            against=dense,
            rows=wanted,
            forms=names,
            seconds=seconds,
            per_layer=per_layer,
            prospects=prospects,
            threads=threads,
            progress=speech.bars,
        )
        if output is not None:
            found.save(output)
            speech.say(f"wrote {output}")
        if speech.as_json:
            typer.echo(found.to_json())
        else:
            show(str(found))


def _numbers(text: str) -> list[int]:
    """Whole numbers between commas."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise typer.BadParameter(f"--rows {text!r} is not N,N,... such as 1,8,64")
    return found
