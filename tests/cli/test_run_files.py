"""One vocabulary for all commands, and their options in TOML: read, written, and written back."""

from __future__ import annotations

import inspect
import json
import shlex
import tomllib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import call, complaint, make_home, worked
from hypothesis import given, settings
from hypothesis import strategies as st

import torchprune
from torchprune.cli.app import app
from torchprune.cli.registry import options_of_command
from torchprune.cli.run_files import Option, commands_of, spoken, write_options
from torchprune.cli.this_run import Run

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("files"))


# -- one vocabulary --------------------------------------------------------------------------------


def described() -> Iterator[tuple[str, str, tuple[object, ...]]]:
    """Each option of each command: its name, the command's, and all that a user meets of it."""
    for command, click in COMMANDS.items():
        options = options_of_command(command)
        for parameter in click.params:
            if parameter.name not in options:
                continue
            option = options[parameter.name]
            told = (option.kind, option.many, option.flags, parameter.help, parameter.metavar)
            yield option.key, command, told


def clashes(found: Iterator[tuple[str, str, tuple[object, ...]]]) -> list[str]:
    seen: dict[str, tuple[str, tuple[object, ...]]] = {}
    bad = []
    for key, command, told in found:
        first, what = seen.setdefault(key, (command, told))
        if what != told:
            bad.append(f"--{key}: {first} has {what}, {command} has {told}")
    return bad


def test_a_name_means_the_same_everywhere():
    found = list(described())
    assert len({key for key, _, _ in found}) > 30
    assert clashes(iter(found)) == []


def test_another_meaning_would_be_found():
    text, number = (str, False, ("--seed",), "Help", None), (int, False, ("--seed",), "Help", None)
    (said,) = clashes(iter([("seed", "prune", text), ("seed", "eval", number)]))
    assert said.startswith("--seed: prune has")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_what_all_have(name):
    flags = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
    assert {"--json", "--debug", "--config", "--write-config"} <= flags
    said = worked(name, "--help")
    assert f"torchprune {name}" in said.partition("Examples")[2]


def test_help_lists_the_commands_in_the_order_of_work():
    said = worked("--help")
    places = [said.index(f"│ {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert "130" in said


# -- options -> TOML -> options --------------------------------------------------------------------


def values_of(option: Option, least: float | None) -> st.SearchStrategy[Any]:
    """What a parameter may be."""
    plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    kinds: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(int(least or 0) + 1, 10**9),
        float: st.floats(0.001, 0.999),
        str: plain,
        Path: plain.filter(lambda text: "\0" not in text).map(Path),  # no path holds that
    }
    one = (
        st.sampled_from(list(option.kind)) if issubclass(option.kind, Enum) else kinds[option.kind]
    )
    if option.many:
        return st.lists(one, min_size=1, max_size=3)
    return one


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """A command with all that it needs, and some of what it may have."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    options = options_of_command(command)
    least = {p.name: getattr(p, "min", None) for p in COMMANDS[command].params}
    given_ = {}
    for name, option in options.items():
        if option.default is inspect.Parameter.empty or draw(st.booleans()):
            given_[name] = draw(values_of(option, least[name]))
        else:
            given_[name] = option.default
    return Run(command, {name: option.key for name, option in options.items()}, given_)


def parsed(command: str, *arguments: object) -> dict[str, Any]:
    """What a command line gives, lists as lists and none of them empty."""
    found = dict(COMMANDS[command].make_context(command, [str(a) for a in arguments]).params)
    return {
        name: (list(found[name] or ()) or None) if option.many else found[name]
        for name, option in options_of_command(command).items()
    }


@given(run=runs())
@settings(max_examples=150)
def test_options_come_back_from_a_file_as_they_were(run, tmp_path_factory):
    file = tmp_path_factory.mktemp("round") / "run.toml"
    write_options(file, run)
    assert parsed(run.command, "--config", file) == run.options


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_defaults_come_back_too(name, tmp_path):
    """As a command line gives them, and not as this test imagines them."""
    needed = {"prune": ["m"], "shrink": ["m"], "recover": ["m"], "inspect": ["m"]}
    needed |= {"compare": ["m", "--text", "t", "--spec", "wanda"], "eval": ["m", "--text", "t"]}
    needed |= {"export": ["m", "--to", "hf", "--output", "o"]}
    if name not in needed:
        pytest.skip("another file tests its options")
    before = parsed(name, *needed[name])
    keys = {parameter: option.key for parameter, option in options_of_command(name).items()}
    write_options(tmp_path / "run.toml", Run(name, keys, before))
    assert parsed(name, "--config", tmp_path / "run.toml") == before


@given(run=runs())
@settings(max_examples=150)
def test_the_spoken_command_is_the_command(run):
    options = options_of_command(run.command)
    program, name, *words = shlex.split(spoken(run, options))
    assert (program, name) == ("torchprune", run.command)
    speech = {"as_json", "quiet", "debug", "resume"} & set(options)
    silent = run.options | {word: options[word].default for word in speech}
    assert parsed(name, *words) == silent


def test_defaults_are_not_spoken():
    options = options_of_command("prune")
    keys = {parameter: option.key for parameter, option in options.items()}
    run = Run("prune", keys, parsed("prune", "my model", "--no-chat", "--data", "a.txt=0.5"))
    assert spoken(run, options) == "torchprune prune 'my model' --data a.txt=0.5 --no-chat"


# -- what a file does ------------------------------------------------------------------------------


def test_one_file_drives_all_stages(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("project.toml").write_text(
        f"""
[prune]
model = "{home / "model"}"
method = "magnitude"
pattern = "2:4"
output = "half"

[eval]
model = "half"
text = "{home / "text.txt"}"
seqlen = 16
json = true

[inspect]
directory = "half"
""",
        "utf-8",
    )
    worked("prune", "--config", "project.toml")
    assert json.loads(worked("eval", "--config", "project.toml"))["seqlen"] == 16
    assert "made by:\n  torchprune prune " in worked("inspect", "--config", "project.toml")
    total = json.loads(worked("inspect", "--config", "project.toml", "--json"))["total"]
    assert total["sparsity"] == 0.5
    again = ("--config", "project.toml", "--pattern", "unstructured", "--sparsity", "0.25")
    worked("prune", *again)  # what the command line gives wins
    assert torchprune.report(torchprune.load("half")).sparsity == 0.25


def test_a_saved_directory_tells_how_to_do_it_again(home, tmp_path):
    one, two, three = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    base = ("prune", home / "model", "--method", "magnitude")
    worked(*base, "--sparsity", "0.3", "--output", one, "--hf", tmp_path / "hf", "--quiet")
    worked("prune", one, "--method", "magnitude", "--sparsity", "0.6", "--output", two)
    first, second = commands_of(two)
    assert commands_of(one) == commands_of(tmp_path / "hf") == [first]
    assert first.startswith(f"torchprune prune {home / 'model'} --method magnitude --sparsity 0.3")
    assert second.startswith(f"torchprune prune {one} ")
    table = tomllib.loads((two / "run.toml").read_text("utf-8"))["prune"]
    assert (table["sparsity"], table["samples"]) == (0.6, 32)
    assert not {"quiet", "json", "debug"} & set(table)
    worked("prune", "--config", two / "run.toml", "--output", three)
    before, after = (torchprune.masks(torchprune.load(d)) for d in (two, three))
    assert all(bool((before[k] == after[k]).all()) for k in before)


def test_writing_keeps_other_tables(home, tmp_path):
    file = tmp_path / "project.toml"
    file.write_text('[inspect]\ndirectory = "half"\n', "utf-8")
    worked("eval", home / "model", "--text", home / "text.txt", "--write-config", file)
    data = tomllib.loads(file.read_text("utf-8"))
    assert data["inspect"] == {"directory": "half"}
    assert data["eval"]["text"] == str(home / "text.txt")
    assert data["eval"]["seed"] == 0


# -- what is wrong with a file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[prune]\nmodel = "m"\n\nsparsty = 0.5', "line 4: [prune] has no option 'sparsty' (did"),
        ("[prune]\nsparsity = '0.5'", "line 2: sparsity: expected a number, got '0.5'"),
        ("[prune]\nsamples = 3.0", "line 2: samples: expected a whole number, got 3.0"),
        ("[prune]\nsamples = true", "samples: expected a whole number, got True"),
        ("[prune]\npermute = 1", "permute: expected true or false, got 1"),
        ('[prune]\nmethod = "wandaa"', "method: 'wandaa' is none of 'magnitude', 'wanda'"),
        ("[prune]\ndata = [1]", "data: expected a string, got 1"),
        ("[prun]\nseed = 1", "line 1: [prun] is no command of torchprune (did you mean 'prune'?"),
        ("seed = 1", "line 1: 'seed' stands outside of a table such as [prune]"),
        ("[eval]\nseqlen = 4", "has no table [prune]; it has [eval]"),
        ("", "has no table [prune]; it has no table at all"),
        ("[prune\n", "is no TOML"),
    ],
)
def test_a_wrong_file_is_wrong_usage(tmp_path, content, message):
    (tmp_path / "run.toml").write_text(content, "utf-8")
    result = call("prune", "m", "--config", tmp_path / "run.toml")
    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("│", " ").split())
    assert message.replace(" ", "") in said.replace(" ", ""), said


def test_a_file_that_is_not_there():
    result = call("prune", "m", "--config", "absent.toml")
    assert result.exit_code == 2
    assert "cannot read absent.toml" in result.stderr


def test_a_file_that_cannot_be_written(home, tmp_path):
    (tmp_path / "bad.toml").write_text("[", "utf-8")
    text = ("--text", home / "text.txt")
    for file in (tmp_path / "bad.toml", tmp_path):
        said = complaint("eval", home / "model", *text, "--write-config", file)
        assert str(file) in said


# -- JSON ------------------------------------------------------------------------------------------


def test_an_error_is_an_object_too():
    result = call("inspect", "absent", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "error": "no such directory: absent",
        "kind": "InputError",
    }
    assert result.stderr == "error: no such directory: absent\n"
    assert call("inspect", "absent").stdout == ""


def test_prune_prints_one_object_and_talks_beside_it(home, tmp_path):
    result = call(
        *("prune", home / "model", "--method", "magnitude", "--json"),
        *("--output", tmp_path / "out"),
    )
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["total"]["sparsity"] == 0.5
    assert found["output"] == str(tmp_path / "out")
    assert "pruning by magnitude" in result.stderr
