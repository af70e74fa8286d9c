"""`torchprune recover`: a pruned model, trained back toward the dense one."""

from __future__ import annotations

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
    HfOption,
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
from torchprune.cli.saving import check_free, new_directory, save_all
from torchprune.cli.spec import Effort, EffortOption
from torchprune.errors import InputError


class Trained(StrEnum):
    """What learns."""

    all = "all"
    norms = "norms"
    lora = "lora"


def recover(
    model: ModelOption,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model, to learn from. Default: none; the model's own loss on --data.",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
    column: ColumnOption = "text",
    chat: ChatOption = True,
    samples: SamplesOption = 256,
    length: LengthOption = 512,
    seed: SeedOption = 0,
    effort: EffortOption = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="How long it may take, instead of an effort. Such a run is not repeatable to the "
            "bit.",
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        Trained,
        typer.Option(
            help="all weights but embeddings; norms: biases and the scales of norms; lora: these, "
            "and low-rank factors that are merged into what the masks keep."
        ),
    ] = Trained.all,
    rank: Annotated[int, typer.Option(min=1, help="Of the factors of --train lora.")] = 8,
    resume: ResumeOption = False,
    output: OutputOption = None,
    hf: HfOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a pruned model toward the dense one. Its zeros stay zeros.

    Some of the windows only judge, and the weights that were best on them are saved. Every few
    minutes the run is kept in a directory named as the output with ".progress": after Ctrl-C the
    same command with --resume goes on from there, and it is removed at the end. Without --output
    and --hf the directory is a new one, named after the model and what is trained.

    [bold]Examples[/bold]

      torchprune recover smol-2of4 --teacher HuggingFaceTB/SmolLM2-135M --data notes.txt

      torchprune recover smol-2of4 --teacher ./dense --data notes.txt --minutes 30 --output better

      torchprune recover smol-2of4 --data notes.txt --train norms --effort fast
    """
    with one_line(debug):
        say, bars = speaker(quiet), bars_wanted(quiet or as_json)
        if effort is not None and minutes is not None:
            raise typer.BadParameter(
                f"--minutes {minutes:g} says how long, and --effort {effort.value} too; give one",
                param_hint="--minutes",
            )
        if minutes is not None and not 0 < minutes < float("inf"):
            raise typer.BadParameter(f"must be above 0, got {minutes:g}", param_hint="--minutes")

        # Usage is right: what follows needs torch, which takes seconds to import.
        from torchprune.cli.models import device_of, import_transformers, load_model, load_tokenizer
        from torchprune.reports.report import report, runs_of
        from torchprune.training.mask_lora import MaskLoRA
        from torchprune.training.recover import recover as train_back

        where = device_of(device)
        if output is None and hf is None:
            output = new_directory([Path(model).resolve().name, "recovered", train.value])
        check_free(output, hf)
        place = progress_of(output or hf or Path(), resume)
        sources = read_sources(data or (), column, progress=bars)
        if resume and not place.exists():
            say(f"no progress at {place}: beginning from the start")
        say(f"loading {model}")
        transformers = import_transformers(bars)
        net = load_model(transformers, model, dtype.to_torch(), where)
        dense = None
        if teacher is not None:
            say(f"loading {teacher}")
            dense = load_model(transformers, teacher, dtype.to_torch(), where)
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
            writer=dense,
        )
        kinds: dict[Trained, Any] = {
            Trained.all: "weights",
            Trained.norms: "norms",
            Trained.lora: MaskLoRA(rank=rank, seed=seed),
        }
        level: Any = (effort or Effort.balanced).value
        say(f"training {train.value} for " + (f"{minutes:g} minutes" if minutes else level))
        train_back(
            net,
            batches,
            teacher=dense,
            effort=level,
            minutes=minutes,
            train=kinds[train],
            seed=seed,
            path=place,
            progress=bars,
        )
        note = runs_of(net)[-1].notes[-1]
        if not as_json:
            typer.echo(note)
        saved = save_all(net, tokenizer, model, output, hf, say)
        if as_json:
            print_json({"recovery": note, **report(net).to_dict(), **saved})


def progress_of(output: Path, resume: bool) -> Path:
    """Where a run is kept until it ends.

    Raises:
        InputError: an earlier one lies there, and nobody asked to go on with it.
    """
    place = output.with_name(f"{output.name}.progress")
    if place.exists() and not resume:
        raise InputError(
            f"{place} holds an interrupted run: go on with --resume, or delete it to begin anew"
        )
    return place
