"""`torchprune eval`: perplexity on a text, tasks of lm_eval, or both; beside the dense model."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from torchprune.cli.console import (
    AgainstOption,
    ColumnOption,
    MaybeText,
    ModelOption,
    OutputOption,
    SeedOption,
    SeqlenOption,
    Speech,
    TokenizerOption,
    WindowsOption,
    kept_in,
    one_line,
    print_json,
    show,
    typer,
)
from torchprune.cli.documents import read_documents
from torchprune.cli.loading import Loading
from torchprune.cli.result_files import check_form
from torchprune.errors import InputError

if TYPE_CHECKING:
    from torchprune.study.tasks.evaluation import Perplexity

SUFFIXES = (".html", ".json", ".md", ".png", ".svg", ".pdf")


def evaluate(
    model: ModelOption,
    text: MaybeText = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Tasks of lm_eval: names, YAML files, or directories of them.",
            show_default=False,
        ),
    ] = None,
    task_path: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where YAML files of local tasks are.", show_default=False
        ),
    ] = None,
    against: AgainstOption = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Read only so many examples of a task. Default: all.", show_default=False
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Examples shown before a question. Default: the task's own.",
            show_default=False,
        ),
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template",
            help="Ask in the tokenizer's chat template; most published figures are without.",
        ),
    ] = False,
    seqlen: SeqlenOption = None,
    windows: WindowsOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows per forward pass. Default: 1 window, 8 of a task.",
            show_default=False,
        ),
    ] = None,
    column: ColumnOption = "text",
    tokenizer: TokenizerOption = None,
    seed: SeedOption = 0,
    output: OutputOption = None,
    loading: Loading = Loading(),
    speech: Speech = Speech(),
) -> None:
    """Measure a pruned or a dense model: perplexity on a text, scores on tasks, or both.

    The text's documents are joined by blank lines, tokenised once and cut into windows without
    overlap; the tail is dropped. Compare only figures of the same text and --seqlen. With
    --against both models read the same examples, and each difference comes with an interval and
    with how likely chance makes it.

    [bold]Examples[/bold]

      torchprune eval smol-2of4 --text held-out.txt

      torchprune eval ./model --text Salesforce/wikitext:wikitext-2-raw-v1:test

      torchprune eval smol-2of4 --tasks arc_easy,hellaswag --limit 500 --against ./model

      torchprune eval smol-2of4 --tasks ours --task-path tasks --output found.json
    """
    with one_line(speech.debug):
        bars = speech.bars
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        _check(text, names, task_path)
        check_form(output, SUFFIXES, "an evaluation")
        documents = None if text is None else read_documents(text, column, progress=bars)

        from torchprune.calibration.text import tokenise
        from torchprune.study.tasks.evaluation import default_seqlen, perplexity

        loader = loading.loader(bars)
        if names:
            from torchprune.study.tasks.harness_tasks import check_names

            check_names(names, [task_path] if task_path else [])
        net = loader.model(model)
        known = loader.tokenizer(tokenizer or model, required=True)
        asked: list[Any] = list(names)
        if documents is not None:
            ids = tokenise(known, documents)
            length = seqlen or default_seqlen(net)
            ids = ids if windows is None else ids[: windows * length]

            def reading(read: Any) -> Perplexity:
                size = batch_size or 1
                return perplexity(read, ids, seqlen=length, batch_size=size, progress=bars)

            if not names and against is None and output is None:
                _tell(reading(net), speech.as_json)
                return
            reading.__name__ = Path(str(text)).name
            asked.insert(0, reading)

        from torchprune.study.tasks.task_runs import evaluate as evaluate_tasks

        store = output if output is not None and output.suffix.lower() == ".json" else None
        with kept_in(store, "the same command"):
            found = evaluate_tasks(
                net,
                asked,
                tokenizer=known,
                against=_dense(against, loader.model),
                limit=limit,
                batch_size=batch_size or 8,
                num_fewshot=num_fewshot,
                chat=chat_template,
                task_path=task_path,
                seed=seed,
                progress=bars,
                path=store,
            )
        options = {
            "text": text,
            "tasks": tasks,
            "task-path": task_path,
            "against": against,
            "limit": limit,
            "num-fewshot": num_fewshot,
            "seqlen": seqlen,
            "windows": windows,
            "seed": seed or None,
        }
        found = replace(found, command=_command(model, options, chat_template))
        if output is not None:
            found.save(output)
            speech.say(f"wrote {output}")
        if speech.as_json:
            typer.echo(found.to_json())
        else:
            show(str(found))


def _check(text: str | None, names: list[str], folder: Path | None) -> None:
    if text is None and not names:
        raise typer.BadParameter("Missing option: --text, --tasks or both")
    if folder is not None and not folder.is_dir():
        raise InputError(f"no such directory of tasks: {folder}")


def _dense(name: str | None, load: Callable[[str], Any]) -> Any:
    """A saved evaluation is read later; anything else is a model."""
    if name is None or name.endswith(".json"):
        return name
    return load(name)


def _command(model: str, options: dict[str, Any], chat_template: bool) -> str:
    parts = [f"--{k} {shlex.quote(str(v))}" for k, v in options.items() if v is not None]
    return " ".join(
        ["torchprune eval", shlex.quote(model), *parts, *["--chat-template"] * chat_template]
    )


def _tell(found: Perplexity, as_json: bool) -> None:
    """A perplexity alone."""
    if as_json:
        figures = ("perplexity", "nats_per_token", "bits_per_token", "windows", "seqlen", "tokens")
        print_json({name: getattr(found, name) for name in figures})
    else:
        show(str(found))
