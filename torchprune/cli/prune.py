"""`torchprune prune`: a language model pruned, and saved."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from torchprune.cli.console import (
    ColumnOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    QuietOption,
    bars_wanted,
    one_line,
    speaker,
    typer,
)
from torchprune.cli.documents import read_documents
from torchprune.cli.spec import (
    Allocation,
    AllocationOption,
    AlphaOption,
    EffortOption,
    Method,
    MethodOption,
    PermuteOption,
    ReconstructOption,
    RefineOption,
    better_options,
    override_of,
    spec_of,
)
from torchprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

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
            help="Save weights and masks here, over an earlier save. Default, without --hf: a new "
            "directory named after the model, the method, its options and the goal.",
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
    effort: EffortOption = None,
    refine: RefineOption = None,
    alpha: AlphaOption = None,
    reconstruct: ReconstructOption = False,
    permute: PermuteOption = False,
    allocation: AllocationOption = Allocation.uniform,
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

    The recommended combination, at its quickest:

      torchprune prune ./model --method best --effort fast --pattern 2:4 --data notes.txt
    """
    with one_line(debug):
        say = speaker(quiet)
        better = better_options(method, effort, refine, alpha, reconstruct, permute, allocation)
        other_goals = dict(map(override_of, override or ()))

        # Usage is right: what follows needs torch, which takes seconds to import.
        from torchprune.calibration.synthesis import can_synthesise, synthesise
        from torchprune.checkpoint.manifest import is_saved
        from torchprune.checkpoint.save_load import save
        from torchprune.cli.models import device_of, import_transformers, load_model, load_tokenizer
        from torchprune.reports.report import report, runs_of
        from torchprune.sparsify import sparsify

        spec = spec_of(method)(
            sparsity=sparsity,
            pattern=pattern,
            scope=scope,
            targets=target or None,
            ignore=ignore or (),
            overrides=other_goals,
            **better,
        )
        where = device_of(device)
        if output is None and hf is None:
            output = _new_directory(model, spec, better)
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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=__name__)  # sparsify's own are in the report
            sparsify(
                net, spec, batches, progress=bars_wanted(quiet), max_batches=samples, seed=seed
            )
        say(f"pruned in {time.perf_counter() - started:.1f} s")
        if note:
            runs_of(net)[-1].notes.append(note)
        typer.echo(str(report(net)))
        if output is not None:
            save(net, output, tokenizer=tokenizer)
            say(f"saved weights and masks to {output}")
        if hf is not None:
            # by name: type checkers do not see where pyproject.toml puts this package
            import_module("torchprune.export").to_hf(net, hf, tokenizer=tokenizer)
            say(f"saved a plain transformers model to {hf}")


def _new_directory(model: str, spec: Spec, better: dict[str, Any]) -> Path:
    """Such as `SmolLM2-135M-wanda-refine-swaps-2of4`.

    Raises:
        InputError: it is there. What its name does not tell (data, scope, seed, ...) may differ.
    """
    goal = re.sub("[: ]", "-", re.sub(r"(\d+):(\d+)", r"\1of\2", str(spec.goal)))
    words = [name if value is True else f"{name}-{value}" for name, value in better.items()]
    directory = Path("-".join([Path(model).resolve().name, spec.method, *words, goal]))
    if directory.exists():
        raise InputError(f"{directory} exists; name one with --output, or this one to replace it")
    return directory


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
    from torchprune.calibration.text import (
        CHARACTERS_PER_TOKEN,
        draw_windows,
        some_documents,
        tokenise,
    )

    some = some_documents(documents, count * length * CHARACTERS_PER_TOKEN, seed)
    windows = draw_windows(tokenise(tokenizer, some), count, length, seed)
    return [window[None] for window in windows]


def _fitting(model: Any, length: int, say: Callable[[str], None]) -> int:
    """The length, cut to the model's context."""
    from torchprune.calibration.text import context_of

    context = context_of(model) or length
    if length > context:
        say(f"the model's context is {context} tokens: windows are cut to that")
    return min(length, context)
