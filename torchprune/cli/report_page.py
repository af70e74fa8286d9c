"""`torchprune report`: a page of all that is known of a pruned model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from torchprune.cli.console import (
    ColumnOption,
    DenseOption,
    MaybeText,
    OutputOption,
    SavedArgument,
    SeqlenOption,
    Speech,
    TokenizerOption,
    WindowsOption,
    one_line,
    print_json,
    typer,
)
from torchprune.cli.documents import read_documents
from torchprune.cli.loading import Loading
from torchprune.cli.registry import options_of_command
from torchprune.cli.result_files import check_form
from torchprune.cli.run_files import commands_of, spoken
from torchprune.cli.this_run import this_run
from torchprune.errors import InputError, TorchpruneError

if TYPE_CHECKING:
    from torchprune.reports.pieces import Page, Pairs

READERS = {
    "evaluation.json": ("torchprune.study.tasks.task_results", "Evaluation"),
    "profile.json": ("torchprune.study.speed.profile_results", "Profile"),
    "sensitivity.json": ("torchprune.study.costs.sensitivities", "SensitivityResult"),
    "comparison.json": ("torchprune.study.results", "Comparison"),
    "history.json": ("torchprune.training.level_history", "History"),
}
"""Files that are shown where they lie in the directory, and the classes whose `from_json` reads
them."""


def report(
    directory: SavedArgument,
    output: OutputOption = None,
    dense: DenseOption = None,
    text: MaybeText = None,
    column: ColumnOption = "text",
    seqlen: SeqlenOption = None,
    windows: WindowsOption = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Continue this with both models; needs --dense. May be repeated. Default: four "
            "short ones.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="New tokens for each prompt; 0 writes none.")
    ] = 48,
    tokenizer: TokenizerOption = None,
    loading: Loading = Loading(),
    speech: Speech = Speech(),
) -> None:
    """Write a page about a pruned model: one file, no network.

    Sizes, sparsity and error by layer, what stayed dense and why; with --text the perplexity, with
    --dense that of the dense model and both models' texts side by side. Results that lie in DIR
    (evaluation.json, profile.json, sensitivity.json, comparison.json, history.json) are on the
    page, too. --json prints the page's data and writes a file only if --output names one.

    [bold]Examples[/bold]

      torchprune report smol-2of4

      torchprune report smol-2of4 --dense ./model --text held-out.txt --output smol.html
    """
    with one_line(speech.debug):
        if prompt and dense is None:
            raise typer.BadParameter("--prompt needs --dense: the texts stand side by side")
        if not directory.is_dir():
            raise InputError(f"no such directory: {directory}")
        if output is None and not speech.as_json:
            output = directory / "report.html"
        check_form(output, (".html", ".json", ".png", ".svg", ".pdf"), "a report")
        say, bars = replace(speech, quiet=speech.quiet or speech.as_json).say, speech.bars
        documents = None if text is None else read_documents(text, column, progress=bars)

        from torchprune.checkpoint.save_load import load
        from torchprune.reports.page import joined, led_by, save_result
        from torchprune.reports.report import report as report_of

        found = report_of(load(directory))
        page = replace(found.page(), title=f"Pruning report: {directory.resolve().name}")
        measured: list[Page | Pairs] = []
        writes = dense is not None and tokens > 0
        if text is not None or writes:
            loader = loading.loader(bars)
            measured = _measured(
                loader.model,
                {**({"dense": dense} if dense else {}), "pruned": str(directory)},
                loader.tokenizer(tokenizer or str(directory), required=True),
                documents,
                text=Path(text).name if text else "",
                seqlen=seqlen,
                windows=windows,
                prompts=prompt,
                tokens=tokens if writes else 0,
                say=say,
                bars=bars,
            )
        others = lying_in(directory)
        commands = commands_of(directory) or list(filter(None, [page.command]))
        if (run := this_run()) is not None:
            commands += ["# this page:", spoken(run, options_of_command(run.command))]
        command = "\n".join(commands)
        together = joined(page.title, page, *others) if others or measured else page
        whole = replace(led_by(together, *measured), command=command)
        if output is not None:
            save_result(output, whole, found.figure)
            say(f"wrote {output} ({output.stat().st_size:,} bytes)")
        if speech.as_json:
            print_json(whole.data)


def lying_in(directory: Path) -> list[Page]:
    """The pages of the results that lie in a directory, in the order of `READERS`.

    Raises:
        InputError: one of them is damaged.
    """
    pages = []
    for name, (module, kind) in READERS.items():
        path = directory / name
        if not path.is_file():
            continue
        try:
            result = getattr(import_module(module), kind).from_json(path.read_text("utf-8"))
        except (TorchpruneError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {error}") from error
        pages.append(result.page())
    return pages


def _measured(
    load: Callable[[str], Any],
    models: dict[str, str],
    tokenizer: Any,
    documents: list[str] | None,
    *,
    text: str,
    seqlen: int | None,
    windows: int | None,
    prompts: list[str] | None,
    tokens: int,
    say: Callable[[str], None],
    bars: bool,
) -> list[Page | Pairs]:
    """Perplexity and generations, one model in memory at a time."""
    from torchprune.calibration.text import tokenise
    from torchprune.study.side_by_side import PROMPTS, greedy, pairs_of
    from torchprune.study.tasks.evaluation import default_seqlen
    from torchprune.study.tasks.text_quality import quality_page, window_losses

    ids = None if documents is None else tokenise(tokenizer, documents)
    losses: dict[str, list[float]] = {}
    written: dict[str, list[str]] = {}
    asked = prompts or list(PROMPTS)
    for name, where in models.items():
        say(f"loading the {name} model, {where}")
        net = load(where)
        seqlen = seqlen or min(default_seqlen(net), 512)
        if ids is not None:
            say(f"reading {text}")
            losses[name] = window_losses(net, ids, seqlen=seqlen, windows=windows, progress=bars)
        if tokens:
            say(f"continuing {len(asked)} prompts")
            written[name] = greedy(net, tokenizer, asked, tokens=tokens)
        del net
    found: list[Page | Pairs] = []
    if losses:
        found.append(quality_page(losses, seqlen=seqlen or 0, text=text))
    if written:
        found.append(pairs_of(asked, written["dense"], written["pruned"]))
    return found
