"""`torchprune prune`: a causal language model, pruned and saved."""

from __future__ import annotations

import re
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from torchprune.cli.console import (
    IgnoreOption,
    ModelOption,
    ResumeOption,
    Speech,
    TargetOption,
    kept_in,
    one_line,
    print_json,
    show,
    typer,
)
from torchprune.cli.loading import Loading
from torchprune.cli.samples import Calibration, parted
from torchprune.cli.saving import Destination
from torchprune.cli.spec import (
    Allocation,
    AllocationOption,
    AlphaOption,
    EffortOption,
    Method,
    MethodOption,
    PermuteOption,
    QuantizeOption,
    ReconstructOption,
    RefineOption,
    as_values,
    better_options,
    override_of,
    spec_of,
)

if TYPE_CHECKING:
    from torchprune.specs.spec import Spec


def prune(
    model: ModelOption,
    method: MethodOption = Method.wanda,
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
    calibration: Calibration = Calibration(),
    target: TargetOption = None,
    ignore: IgnoreOption = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help='Another goal for some layers: a sparsity, a pattern, "PATTERN,SPARSITY" or '
            '"dense". May be repeated; the first that fits a layer decides.',
            show_default=False,
        ),
    ] = None,
    resume: ResumeOption = False,
    destination: Destination = Destination(),
    effort: EffortOption = None,
    refine: RefineOption = None,
    alpha: AlphaOption = None,
    reconstruct: ReconstructOption = False,
    permute: PermuteOption = False,
    allocation: AllocationOption = Allocation.uniform,
    quantize: QuantizeOption = None,
    loading: Loading = Loading(),
    speech: Speech = Speech(),
) -> None:
    """Prune a causal language model and save it.

    Without --output and --hf the directory is a new one, named after the model, the method, its
    options and the goal. Layers are kept as they are decided, in a directory named as the output
    with ".progress": after Ctrl-C the same command with --resume goes on from there, and it is
    removed at the end.

    [bold]Examples[/bold]

    Half of every row by Wanda, calibrated on text the model writes itself:

      torchprune prune HuggingFaceTB/SmolLM2-135M

    2:4 by SparseGPT on your own text, saved as a plain transformers directory:

      torchprune prune ./model --method sparsegpt --pattern 2:4 --data notes.txt --hf ./small

    70 %, but half in the last projection of every block, on rows of a dataset:

      torchprune prune ./model --sparsity 0.7 --override '*.down_proj=0.5' --data allenai/c4:en

    On prose and on conversations, which the tokenizer's chat template writes:

      torchprune prune ./model --data notes.txt=0.7 --data chat.jsonl=0.3

    The recommended combination, at its quickest:

      torchprune prune ./model --method best --effort fast --pattern 2:4 --data notes.txt

    All of it from a file, and one flag otherwise:

      torchprune prune --config project.toml --sparsity 0.6
    """
    with one_line(speech.debug):
        say, bars = speech.say, speech.bars
        better = better_options(
            method, effort, refine, alpha, reconstruct, permute, allocation, quantize
        )
        other_goals = dict(map(override_of, override or ()))
        names = [parted(item)[0] for item in calibration.data or ()]

        # Usage is right: what follows needs torch, which takes seconds to import.
        from torchprune.checkpoint.decisions import forget_decisions
        from torchprune.reports.report import report, runs_of
        from torchprune.sparsify import sparsify

        spec = spec_of(method)(
            sparsity=sparsity,
            pattern=pattern,
            scope=scope,
            targets=target or None,
            ignore=ignore or (),
            overrides=other_goals,
            **as_values(better),
        )
        loader = loading.loader(bars)
        place = destination.or_new(_words(model, spec, better))
        place.check_free()
        progress = place.progress(resume, say) if spec.needs_data else None
        if resume and progress is None:
            say(f"{method.value} needs no data: nothing is kept, and it begins from the start")
        reads = bool(names) and spec.needs_data
        sources = calibration.sources(bars) if reads else []
        if names and not reads:
            say(f"{method.value} needs no data: {' and '.join(names)} is not read")

        say(f"loading {model}")
        net = loader.model(model)
        tokenizer = loader.tokenizer(model, required=reads)
        batches, note = None, ""
        if spec.needs_data:
            batches, note = calibration.windows(net, tokenizer, sources, say=say, progress=bars)
        say(f"pruning by {method.value} to {spec.goal}")
        started = time.perf_counter()
        with warnings.catch_warnings(), kept_in(progress):
            warnings.filterwarnings("ignore", module=__name__)  # sparsify's own are in the report
            sparsify(
                net,
                spec,
                batches,
                progress=bars,
                max_batches=calibration.samples,
                seed=calibration.seed,
                path=progress,
            )
        say(f"pruned in {time.perf_counter() - started:.1f} s")
        if note:
            runs_of(net)[-1].notes.append(note)
        found = report(net)
        if not speech.as_json:
            show(str(found))
        with kept_in(progress):
            saved = place.save(net, tokenizer, model, say)
        if progress is not None:
            forget_decisions(progress)
        if speech.as_json:
            print_json({**found.to_dict(), **saved})


def _words(model: str, spec: Spec, better: dict[str, Any]) -> list[str]:
    """Such as `SmolLM2-135M`, `wanda`, `refine-swaps`, `2of4`."""
    goal = re.sub("[: ]", "-", re.sub(r"(\d+):(\d+)", r"\1of\2", str(spec.goal)))
    words = [name if value is True else f"{name}-{value}" for name, value in better.items()]
    return [Path(model).resolve().name, spec.method, *words, goal]
