"""`torchprune recover`: a pruned model, trained back toward the dense one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from torchprune.cli.console import (
    ModelOption,
    ResumeOption,
    Speech,
    kept_in,
    one_line,
    print_json,
    show,
    typer,
)
from torchprune.cli.loading import Loading
from torchprune.cli.samples import Calibration
from torchprune.cli.saving import Destination
from torchprune.cli.spec import Effort, EffortOption


class Trained(StrEnum):
    """What learns."""

    all = "all"
    norms = "norms"
    lora = "lora"


_TOLD = {
    Trained.all: "all weights but embeddings",
    Trained.norms: "biases and the scales of norms",
    Trained.lora: "low-rank factors, biases and the scales of norms",
}


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
    calibration: Calibration = Calibration(samples=256),
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
    destination: Destination = Destination(),
    loading: Loading = Loading(),
    speech: Speech = Speech(),
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
    with one_line(speech.debug):
        say, bars = speech.say, speech.bars
        if effort is not None and minutes is not None:
            raise typer.BadParameter(
                f"--minutes {minutes:g} says how long, and --effort {effort.value} too; give one",
                param_hint="--minutes",
            )
        if minutes is not None and not 0 < minutes < float("inf"):
            raise typer.BadParameter(f"must be above 0, got {minutes:g}", param_hint="--minutes")

        # Usage is right: what follows needs torch, which takes seconds to import.
        from torchprune.reports.report import report, runs_of
        from torchprune.training.course import RECOVERY
        from torchprune.training.mask_lora import MaskLoRA
        from torchprune.training.recover import Asked, recover_as_asked

        loader = loading.loader(bars)
        place = destination.or_new([Path(model).resolve().name, "recovered", train.value])
        place.check_free()
        progress = place.progress(resume, say)
        sources = calibration.sources(bars)
        say(f"loading {model}")
        net, dense = loader.model(model), None
        if teacher is not None:
            say(f"loading {teacher}")
            dense = loader.model(teacher)
        tokenizer = loader.tokenizer(model, required=bool(sources))
        batches, _ = calibration.windows(
            net, tokenizer, sources, say=say, progress=bars, writer=dense
        )
        kinds: dict[Trained, Any] = {
            Trained.all: "weights",
            Trained.norms: "norms",
            Trained.lora: MaskLoRA(rank=rank, seed=calibration.seed),
        }
        level = (effort or Effort.balanced).value
        how = f"for {minutes:g} minutes" if minutes else f"with effort {level}"
        say(f"training {_TOLD[train]} {how}")
        with kept_in(progress):
            recover_as_asked(
                net,
                batches,
                Asked(level, minutes, kinds[train]),
                teacher=dense,
                seed=calibration.seed,
                path=progress,
                progress=bars,
            )
            note = runs_of(net)[-1].notes[-1]
            if not speech.as_json:
                show(note)
            saved = place.save(net, tokenizer, model, say)
        RECOVERY.forget(progress)
        if speech.as_json:
            print_json({"recovery": note, **report(net).to_dict(), **saved})
