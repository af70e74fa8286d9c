"""`torchprune compare`: several ways to prune one model, side by side on a held-out text."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from torchprune.checkpoint.whole_files import write_whole
from torchprune.cli.console import (
    Dtype,
    ModelOption,
    OutputOption,
    ResumeOption,
    SeqlenOption,
    Speech,
    TextOption,
    WindowsOption,
    kept_in,
    one_line,
    print_json,
    show,
    typer,
)
from torchprune.cli.documents import read_documents
from torchprune.cli.loading import Loading
from torchprune.cli.registry import options_of_command
from torchprune.cli.result_files import check_form, store_of
from torchprune.cli.run_files import earlier_of_file, remembered
from torchprune.cli.samples import Calibration
from torchprune.cli.spec_texts import made, parsed
from torchprune.cli.this_run import this_run
from torchprune.errors import InputError

if TYPE_CHECKING:
    from torchprune.study.results import Comparison

_MEASURED_BY = ("model", "text", "column", "seqlen", "windows", "dtype")
"""Options that an earlier result must agree in; what calibrates is told by its bits."""

_FIGURES = (".svg", ".png", ".pdf")


def compare(
    model: ModelOption,
    text: TextOption,
    spec: Annotated[
        list[str],
        typer.Option(
            metavar="METHOD,NAME=VALUE,...",
            help='A method and its options, as in Python: "wanda,pattern=2:4", '
            '"best,effort=fast,sparsity=0.6", "neurons,sparsity=0.2", "layers,drop=2". Repeat it.',
            show_default=False,
        ),
    ],
    calibration: Calibration = Calibration(),
    draws: Annotated[
        int, typer.Option(min=1, help="Draw calibration windows so many times, by seeds in a row.")
    ] = 1,
    seqlen: SeqlenOption = None,
    windows: WindowsOption = None,
    resume: ResumeOption = False,
    output: OutputOption = None,
    loading: Loading = Loading(),
    speech: Speech = Speech(),
) -> None:
    """Prune a model in several ways and show what each costs: perplexity on --text, and time.

    --output is a .json, an .html page, a .md or a figure (.svg, .png, .pdf). Results are kept, in
    the .json of that name, as they come: after Ctrl-C the same command with --resume runs only
    what is missing, and further --spec may be added then.

    [bold]Examples[/bold]

      torchprune compare ./model --text held-out.txt --spec wanda --spec sparsegpt

      torchprune compare ./model --text held-out.txt --spec wanda,pattern=2:4 --output two.json

      torchprune compare --config study.toml --draws 2 --resume

    In a file: spec = ["ria", {method = "wanda", sparsity = 0.6}]
    """
    with one_line(speech.debug):
        say, bars = speech.say, speech.bars
        asked = {one: parsed(one) for one in spec}
        if len(asked) < len(spec):
            twice = next(one for one in spec if spec.count(one) > 1)
            raise typer.BadParameter(f"{twice!r} is given twice", param_hint="--spec")
        check_form(output, (".json", ".html", ".md", *_FIGURES), "a comparison")
        store = store_of(output, resume)
        documents = read_documents(text, calibration.column, progress=bars)

        # Usage is right: what follows needs torch, which takes seconds to import.
        from torchprune.calibration.text import tokenise
        from torchprune.study.compare import compare as side_by_side
        from torchprune.study.tasks.evaluation import default_seqlen, perplexity

        specs = {label: made(*one) for label, one in asked.items()}
        loader = loading.loader(bars)
        if store is not None:
            _remember(store)
        sources = calibration.sources(bars)
        say(f"loading {model}")
        net = loader.model(model)
        tokenizer = loader.tokenizer(model, required=True)
        ids = tokenise(tokenizer, documents)
        if windows is not None:
            ids = ids[: windows * (seqlen or default_seqlen(net))]
        batches: dict[str, Any] = {}
        if any(one.needs_data for one in specs.values()):
            for number in range(calibration.seed, calibration.seed + draws):
                batches[f"seed {number}"], _ = replace(calibration, seed=number).windows(
                    net, tokenizer, sources, say=say, progress=bars
                )
        with kept_in(store):
            found = side_by_side(
                lambda: copy.deepcopy(net),
                specs,
                batches or None,
                lambda pruned: perplexity(pruned, ids, seqlen=seqlen),
                max_batches=calibration.samples,
                progress=bars,
                path=store,
            )
        if speech.as_json:
            print_json({**json.loads(found.to_json()), **({"output": output} if output else {})})
        else:
            show(str(found))
        if output is not None:
            _write(found, output)
            say(f"wrote {output}")
        if all(row.error is not None for row in found.rows):
            typer.echo("error: no --spec could be run; each line above says why", err=True)
            raise typer.Exit(1)


def _remember(store: Path) -> None:
    """Write beside the file that keeps results what they are measured by.

    Raises:
        InputError: there are earlier ones, of something else.
    """
    run = this_run()
    if run is None:
        return
    beside = store.with_suffix(".run.toml")
    if store.exists():
        earlier = earlier_of_file(beside).get(run.command)
        if not isinstance(earlier, dict):
            raise InputError(f"{beside} does not tell what {store} was measured by; name another")
        now = run.table()
        for key in _MEASURED_BY:
            if earlier.get(key) != _plain(now.get(key)):
                raise InputError(
                    f"{store} is of --{key} {earlier.get(key, 'by default')}, and not "
                    f"{_plain(now.get(key, 'by default'))}; name another --output"
                )
    write_whole(beside, remembered(run, options_of_command(run.command), None))


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Dtype) else value


def _write(found: Comparison, output: Path) -> None:
    form = output.suffix.lower()
    if form == ".md":
        write_whole(output, found.to_markdown() + "\n")
    elif form in _FIGURES:
        found.figure("perplexity", path=output)
    elif form == ".html":
        found.save(output)
