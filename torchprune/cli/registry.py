"""How a function becomes a command: with `--config` and `--write-config`, known while it runs.

Options that commands share stand in frozen dataclasses whose fields are annotated as typer reads
them. A parameter of such a class is, on the command line and in files, all its fields in their
order; the defaults are those of the parameter's default, and the function is called with one value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from torchprune.cli.console import one_line, typer
from torchprune.cli.run_files import Option, options_of, read_options, write_options
from torchprune.cli.this_run import Run, running
from torchprune.errors import InputError

_FILES = ("config", "write_config")
_PANEL = "Options in a file"

_known: dict[str, dict[str, Option]] = {}


def add_command(
    app: typer.Typer, run: Callable[..., None], *, name: str | None = None, panel: str
) -> None:
    """Make a function a command of the app.

    Args:
        run: its parameters, annotated as typer reads them, are the command's options; it is called
            with all of them by name, inside of `running`.
        name: the command's; the function's own if None.
        panel: the heading it is listed under.
    """
    word = name or run.__name__
    app.command(name=word, help=prose(run.__doc__ or ""), rich_help_panel=panel)(_told(run, word))


def prose(docstring: str) -> str:
    """Its paragraphs as one line each, so that they wrap where the terminal ends and not where the
    source does; indented ones stay as they are."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(
        part if part.startswith(" ") else part.replace("\n", " ") for part in paragraphs
    )


def options_of_command(name: str) -> dict[str, Option]:
    """A command's own options, by parameter."""
    return _known[name]


def _told(run: Callable[..., None], name: str) -> Callable[..., None]:
    written = inspect.signature(run, eval_str=True)
    signature = spread(written)
    options = _known[name] = options_of(signature)

    def read(context: typer.Context, file: Path | None) -> Path | None:
        if file is not None and not context.resilient_parsing:
            try:
                found = read_options(file, name, options.values(), list(_known))
            except InputError as error:
                raise typer.BadParameter(str(error)) from None
            context.default_map = {**(context.default_map or {}), **found}
        return file

    @wraps(run)
    def told(**given: Any) -> None:
        target = given.pop("write_config")
        del given["config"]
        keys = {parameter: option.key for parameter, option in options.items()}
        now = Run(name, keys, given)
        with running(now):
            if target is not None:
                with one_line(bool(given.get("debug"))):
                    write_options(target, now)
            run(**grouped(written, given))

    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    added = [
        inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for word, annotation in zip(_FILES, (_config(read), _WriteConfig), strict=True)
    ]
    # typer asks both of these
    told.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    told.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
    del told.__wrapped__  # whose annotations are other ones
    return told


def spread(signature: inspect.Signature) -> inspect.Signature:
    """The signature with the fields of shared options in their places."""
    spread: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if not is_dataclass(kind):
            spread.append(parameter)
            continue
        hints = get_type_hints(kind, include_extras=True)
        spread += [
            parameter.replace(
                name=field.name,
                default=getattr(parameter.default, field.name),
                annotation=hints[field.name],
            )
            for field in fields(kind)
        ]
    return signature.replace(parameters=spread)


def grouped(signature: inspect.Signature, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a function is called with: shared options together again."""
    found: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        kind = parameter.annotation
        if isinstance(kind, type) and is_dataclass(kind):
            found[name] = kind(**{field.name: given[field.name] for field in fields(kind)})
        else:
            found[name] = given[name]
    return found


def _config(read: Callable[..., Path | None]) -> Any:
    return Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Take options from this command's table in a file. What the command line gives "
            "wins.",
            show_default=False,
            is_eager=True,
            callback=read,
            rich_help_panel=_PANEL,
        ),
    ]


_WriteConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.toml",
        help="Write all options in effect to such a table; other tables in the file stay.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
