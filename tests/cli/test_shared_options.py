"""Options that commands share: one value in Python, options one by one for a shell and a file."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from torchprune.cli import registry
from torchprune.cli.app import app
from torchprune.cli.registry import grouped, options_of_command, spread


@dataclass(frozen=True)
class Shared:
    size: Annotated[int, typer.Option(min=1)] = 3
    words: Annotated[list[str] | None, typer.Option("--word")] = None


def one(first: int, shared: Shared = Shared(size=7), last: int = 0) -> None:
    """A command."""


def test_a_shared_value_is_options_in_its_place_with_the_commands_own_defaults():
    written = inspect.signature(one, eval_str=True)
    told = spread(written)
    assert [(p.name, p.default) for p in told.parameters.values()] == [
        ("first", inspect.Parameter.empty),
        ("size", 7),
        ("words", None),
        ("last", 0),
    ]
    options = registry.options_of(told)
    assert options["words"].key == "word"
    assert options["words"].many
    given = {"first": 1, "size": 2, "words": ["a"], "last": 5}
    assert grouped(written, given) == {"first": 1, "shared": Shared(2, ["a"]), "last": 5}


def test_a_command_may_have_another_default():
    assert options_of_command("recover")["samples"].default == 256
    assert options_of_command("prune")["samples"].default == 32


@pytest.mark.parametrize("name", [c.name for c in app.registered_commands])
def test_every_command_can_speak_in_every_way(name):
    assert {"as_json", "quiet", "debug"} <= set(options_of_command(name))
