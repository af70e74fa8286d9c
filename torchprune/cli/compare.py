"""`torchprune compare`: several ways to prune one model, side by side on a held-out text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from torchprune.checkpoint.whole_files import write_whole
from torchprune.cli.console import (
    ChatOption,
    ColumnOption,
    DataOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelOption,
    OutputOption,
    QuietOption,
    ResumeOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    TextOption,
    WindowsOption,
    bars_wanted,
    one_line,
    print_json,
    speaker,
    typer,
)
from torchprune.cli.documents import read_documents
from torchprune.cli.registry import options_of_command
from torchprune.cli.run_files import earlier_of_file, remembered
from torchprune.cli.samples import calibration_of, read_sources
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
    data: DataOption = None,
    column: ColumnOption = "text",
    chat: ChatOption = True,
    samples: SamplesOption = 32,
    length: LengthOption = 512,
    seed: SeedOption = 0,
    draws: Annotated[
        int, typer.Option(min=1, help="Draw calibration windows so many times, by seeds in a row.")
    ] = 1,
    seqlen: SeqlenOption = None,
    windows: WindowsOption = None,
    resume: ResumeOption = False,
    output: OutputOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
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
    with one_line(debug):
        say, bars = speaker(quiet), bars_wanted(quiet or as_json)
        asked = {one: parsed(one) for one in spec}
        if len(asked) < len(spec):
            twice = next(one for one in spec if spec.count(one) > 1)
            raise typer.BadParameter(f"{twice!r} is given twice", param_hint="--spec")
        _check_form(output, resume)
        documents = read_documents(text, column, progress=bars)

        # Usage is right: what follows needs torch, which takes seconds to import.
        from torchprune.calibration.text import tokenise
        from torchprune.cli.models import device_of, import_transformers, load_model, load_tokenizer
        from torchprune.study.compare import compare as side_by_side
        from torchprune.study.tasks.evaluation import default_seqlen, perplexity

        specs = {label: made(*one) for label, one in asked.items()}
        store = _store(output, resume)
        sources = read_sources(data or (), column, progress=bars)
        say(f"loading {model}")
        transformers = import_transformers(bars)
        net = load_model(transformers, model, dtype.to_torch(), device_of(device))
        tokenizer = load_tokenizer(transformers, model, required=True)
        ids = tokenise(tokenizer, documents)
        if windows is not None:
            ids = ids[: windows * (seqlen or default_seqlen(net))]
        batches: dict[str, Any] = {}
        if any(one.needs_data for one in specs.values()):
            for number in range(seed, seed + draws):
                batches[f"seed {number}"], _ = calibration_of(
                    net,
                    tokenizer,
                    sources,
                    samples=samples,
                    length=length,
                    seed=number,
                    chat=chat,
                    say=say,
                    progress=bars,
                )
        found = side_by_side(
            lambda: copy.deepcopy(net),
            specs,
            batches or None,
            lambda pruned: perplexity(pruned, ids, seqlen=seqlen),
            max_batches=samples,
            progress=bars,
            path=store,
        )
        if as_json:
            print_json({**json.loads(found.to_json()), **({"output": output} if output else {})})
        else:
            typer.echo(str(found))
        if output is not None:
            _write(found, output)
            say(f"wrote {output}")
        if all(row.error is not None for row in found.rows):
            raise typer.Exit(1)


def _check_form(output: Path | None, resume: bool) -> None:
    if output is None:
        if resume:
            raise typer.BadParameter(
                "nothing is kept without --output, so there is nothing to go on with",
                param_hint="--resume",
            )
        return
    forms = (".json", ".html", ".md", *_FIGURES)
    if output.suffix not in forms:
        raise InputError(f"{output}: a comparison is saved as one of {', '.join(forms)}")


def _store(output: Path | None, resume: bool) -> Path | None:
    """The file that keeps results as they come, with what they were measured by beside it.

    Raises:
        InputError: there are earlier results, and nobody asked to go on; or of something else.
    """
    run = this_run()
    if output is None or run is None:
        return None
    store, beside = output.with_suffix(".json"), output.with_suffix(".run.toml")
    if store.exists():
        if not resume:
            raise InputError(f"{store} exists: go on with it by --resume, or name another --output")
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
    return store


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Dtype) else value


def _write(found: Comparison, output: Path) -> None:
    if output.suffix == ".md":
        write_whole(output, found.to_markdown() + "\n")
    elif output.suffix in _FIGURES:
        found.figure("perplexity", path=output)
    elif output.suffix == ".html":
        found.save(output)
