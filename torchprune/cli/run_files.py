"""Options in TOML: a table for each command, as `--config` reads and `--write-config` writes it.

A file of a whole project may drive all stages, each command reading its own table:

    [prune]
    model = "HuggingFaceTB/SmolLM2-135M"
    pattern = "2:4"

    [eval]
    model = "smol-2of4"
    text = "held-out.txt"

`run.toml` in a saved directory is such a file, with the tables of the commands that led to it.
"""

from __future__ import annotations

import inspect
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from torchprune.checkpoint.whole_files import write_whole
from torchprune.cli.places import check_place
from torchprune.cli.this_run import Run
from torchprune.errors import InputError, MissingExtraError, did_you_mean

RUN_FILE = "run.toml"
"""What a saved directory remembers of the commands that made it."""

COMMANDS = "commands"
"""The key of those commands as one would type them; reading passes it over."""

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a string",
}


@dataclass(frozen=True)
class Option:
    """A parameter of a command, as a file and a shell name it.

    Attributes:
        key: its name in files.
        kind: bool, int, float, str, Path or an enumeration of strings.
        many: whether it may be repeated; a list in files.
        flags: how a shell has it: on, and where there is one, off; none for what has a place.
        default: where nothing is given; `inspect.Parameter.empty` where something must be.
    """

    parameter: str
    key: str
    kind: type[Any]
    many: bool
    flags: tuple[str, ...]
    default: Any

    def check(self, value: object) -> Any:
        """What a file says, as the parameter takes it.

        Raises:
            InputError: it is something else.
        """
        if not self.many:
            return self._one(value)
        return [self._one(item) for item in (value if isinstance(value, list) else [value])]

    def _one(self, value: object) -> Any:
        if isinstance(value, dict) and "method" in value and self.kind is str:
            rest = {k: v for k, v in value.items() if k != "method"}
            return ",".join([str(value["method"]), *(f"{k}={_word(v)}" for k, v in rest.items())])
        if issubclass(self.kind, Enum):
            known = [member.value for member in self.kind]
            if value not in known:
                accepted = ", ".join(map(repr, known))
                raise InputError(
                    f"{value!r} is none of {accepted}{did_you_mean(str(value), known)}"
                )
            return value
        accepted_types = {float: (int, float), Path: (str,)}.get(self.kind, (self.kind,))
        if not isinstance(value, accepted_types) or (
            isinstance(value, bool) and self.kind is not bool
        ):
            raise InputError(f"expected {_NAMES[self.kind]}, got {value!r}")
        return float(value) if self.kind is float else value

    def words(self, value: Any) -> list[str]:
        """How to say it in a shell."""
        if self.kind is bool:
            on, *off = self.flags
            return [on] if value else off
        values = value if self.many else [value]
        flag = [flag for flag in self.flags if flag.startswith("--")][:1]
        return [word for item in values for word in (*flag, str(_plain(item)))]


def options_of(signature: inspect.Signature) -> dict[str, Option]:
    """The parameters of a command (annotations resolved), by their names."""
    return {name: _option(parameter) for name, parameter in signature.parameters.items()}


def _option(parameter: inspect.Parameter) -> Option:
    kind, told = parameter.annotation, list[Any]()
    if get_origin(kind) is Annotated:
        kind, *told = get_args(kind)
    if get_origin(kind) in (UnionType, Union):
        (kind,) = [part for part in get_args(kind) if part is not NoneType]
    many = get_origin(kind) is list
    if many:
        (kind,) = get_args(kind)
    info = told[0] if told else None
    if type(info).__name__ == "ArgumentInfo":
        return Option(parameter.name, parameter.name, kind, many, (), parameter.default)
    spelt = [getattr(info, "default", None), *(getattr(info, "param_decls", None) or ())]
    flags = [flag for flag in spelt if isinstance(flag, str)] or [
        "--" + parameter.name.replace("_", "-")
    ]
    on, _, off = flags[0].partition("/")
    both = (on, off) if off else (*[f for f in flags if f.startswith("--")][:1],)
    return Option(parameter.name, both[0].removeprefix("--"), kind, many, both, parameter.default)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    """A value as TOML has it; what is no text (a file's name in another encoding) is replaced."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path | str):
        return str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return value


# -- reading ---------------------------------------------------------------------------------------


def read_options(
    path: Path, command: str, options: Iterable[Option], commands: Iterable[str]
) -> dict[str, Any]:
    """A command's table in a file: parameter -> value.

    Args:
        commands: the names that tables may have.

    Raises:
        InputError: no such file, or no such table in it; an unknown key, or a value of another
            type, with its line.
    """
    text, data = _read(path)
    for key, value in data.items():
        if key == COMMANDS:
            continue
        where = f"{path}{_line(text, None, key)}"
        if not isinstance(value, dict):
            raise InputError(f"{where}: {key!r} stands outside of a table such as [{command}]")
        if key not in commands:
            hint = did_you_mean(key, commands)
            raise InputError(f"{where}: [{key}] is no command of torchprune{hint}")
    if command not in data:
        there = ", ".join(f"[{key}]" for key in data if key != COMMANDS) or "no table at all"
        raise InputError(f"{path} has no table [{command}]; it has {there}")
    known = {option.key: option for option in options}
    found = {}
    for key, value in data[command].items():
        where = f"{path}{_line(text, command, key)}: "
        option = known.get(key.replace("_", "-"), known.get(key))
        if option is None:
            raise InputError(f"{where}[{command}] has no option {key!r}{did_you_mean(key, known)}")
        try:
            found[option.parameter] = option.check(value)
        except InputError as error:
            raise InputError(f"{where}{key}: {error}") from None
    return found


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.expanduser().read_text("utf-8")
        return text, tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is no TOML: {error}") from None


def _line(text: str, table: str | None, key: str) -> str:
    """Where a key of a table stands, or a table itself: ", line 3"; nothing if it is not found."""
    inside: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        head = re.match(r"\s*\[\s*[\"']?([^\"'\].]+?)[\"']?\s*[\].]", line)
        inside = head[1] if head else inside
        named = re.match(r"\s*[\"']?([^\"'=\s]+)[\"']?\s*[=.]", line)
        if (head and table is None and inside == key) or (
            named and not head and inside == table and named[1] == key
        ):
            return f", line {number}"
    return ""


# -- writing ---------------------------------------------------------------------------------------


def write_options(path: Path, run: Run) -> None:
    """Write the options of a command into its table of a file; the file's other tables stay.

    Raises:
        InputError: the file is there and is no TOML, or it cannot be written.
    """
    path = path.expanduser()
    check_place(path)
    others = _read(path)[1] if path.exists() else {}
    write_whole(path, _dump({**others, run.command: run.table()}))


def remembered(run: Run, options: Mapping[str, Option], earlier: Path | None) -> str:
    """The text of the file that a saved directory remembers a command by.

    Args:
        earlier: the directory that the command began from, whose own commands come first.
    """
    before = earlier_of(earlier)
    data = {
        COMMANDS: [*before.pop(COMMANDS, []), spoken(run, options)],
        **{name: table for name, table in before.items() if name != run.command},
        run.command: run.table(speech=False),
    }
    return _dump(data)


def earlier_of(directory: Path | None) -> dict[str, Any]:
    """What a directory remembers; nothing where it remembers nothing that can be read."""
    return {} if directory is None else earlier_of_file(directory / RUN_FILE)


def earlier_of_file(path: Path) -> dict[str, Any]:
    """What such a file remembers; nothing where it is none that can be read."""
    try:
        found = _read(path)[1]
    except InputError:
        return {}
    said = found.get(COMMANDS, [])
    sound = isinstance(said, list) and all(isinstance(line, str) for line in said)
    return found if sound else {}


def commands_of(directory: Path) -> list[str]:
    """The commands that made a saved directory, in their order; none where it does not say."""
    return list(earlier_of(directory).get(COMMANDS, []))


def spoken(run: Run, options: Mapping[str, Option]) -> str:
    """A command as one would type it, defaults left out."""
    wanted = run.table(speech=False)
    places, flags = list[str](), list[str]()
    for option in options.values():
        value = run.options.get(option.parameter)
        if option.key in wanted and value != option.default:
            (flags if option.flags else places).extend(option.words(value))
    if any(word.startswith("-") for word in places):
        return shlex.join(["torchprune", run.command, *flags, "--", *places])
    return shlex.join(["torchprune", run.command, *places, *flags])


def toml_writer() -> Any:
    """The module that writes TOML.

    Raises:
        MissingExtraError: it is absent.
    """
    try:
        import tomli_w
    except ImportError:
        raise MissingExtraError("tomli-w", "cli", "writing TOML") from None
    return tomli_w


def _dump(data: Mapping[str, Any]) -> str:
    whole = {k: _tabled(v) if isinstance(v, dict) else _plain(v) for k, v in data.items()}
    return str(toml_writer().dumps(whole))


def _tabled(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in table.items()}
