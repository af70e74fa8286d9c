"""`torchprune profile` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import complaint, make_home, worked

from torchprune.study.speed.profile_results import Profile

FAST = ("--seconds", "0.001", "--no-prospects", "--forms", "eager,bitmask")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_home(tmp_path_factory.mktemp("profile"))
    worked(
        *("prune", home / "model", "--method", "magnitude", "--pattern", "2:4"),
        *("--output", home / "pruned", "--quiet"),
    )
    return home


def test_a_table_and_a_file(home, tmp_path):
    out = tmp_path / "profile.json"
    said = worked(
        *("profile", home / "pruned", "--against", home / "model", "--rows", "1,64"),
        *("--output", out, *FAST),
    )
    assert "times dense" in said
    assert "bitmask" in said
    found = Profile.from_json(out.read_text("utf-8"))
    assert [c.name for c in found.contenders] == ["dense", "eager", "bitmask"]
    assert found.rows == [1, 64]
    assert found.unit == "token"
    assert all(cell.latency for cell in found.cells)


def test_json_is_all_that_is_printed(home):
    said = worked("profile", home / "pruned", "--rows", "2", "--json", "--per-layer", *FAST)
    found = json.loads(said)
    assert found["base"] == "eager"
    assert {y["contender"] for y in found["layers"]} == {"eager", "bitmask"}


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--rows", "1,x"), 2, "--rows '1,x' is not N,N,... such as 1,8,64"),
        (("--rows", "0"), 2, "--rows '0' is not"),
        (("--forms", "bitmsk"), 1, "there is no form 'bitmsk' (did you mean 'bitmask'"),
        (("--output", "it.txt"), 1, "it.txt: a profile is saved as one of .html"),
        (("--against", "./absent"), 1, "no such directory: ./absent"),
        (("--rows", "33"), 1, "33 tokens are no whole texts of the model's context, 32"),
    ],
)
def test_mistakes_are_one_line(home, options, code, says):
    assert says in complaint("profile", home / "model", *FAST, *options, code=code)
