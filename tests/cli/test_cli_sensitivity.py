"""`torchprune sensitivity`: costs before anything is pruned."""

import ast
import json

import pytest
from commands import call, make_home, worked


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("sensitivity"))


def test_costs_and_overrides_to_paste(home, tmp_path):
    page = tmp_path / "costs.html"
    said = worked(
        *("sensitivity", home / "model", "--data", home / "text.txt", "--samples", 3),
        *("--length", 32, "--levels", "0.3,0.7", "--overrides", 0.5, "--output", page),
    )
    assert "overrides = {" in said
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_exact_goes_on_where_it_was(home, tmp_path):
    found = tmp_path / "heads.json"
    asked = ("sensitivity", home / "model", "--data", home / "text.txt", "--what", "heads")
    options = ("--samples", 2, "--length", 16, "--mode", "exact", "--output", found, "-q", "--json")
    first = json.loads(worked(*asked, *options))
    assert first["units"] == "heads"
    result = call(*asked, *options[:-2])
    assert (result.exit_code, "--resume" in result.stderr) == (1, True)
    again = json.loads(worked(*asked, *options, "--resume"))
    assert again["rows"] == first["rows"]


@pytest.mark.parametrize(
    ("options", "says", "code"),
    [
        (("--what", "wandaa"), "--what: 'wandaa'", 2),
        (("--levels", "0.5,2:9x"), "2:9x", 1),
        (("--levels", "1.5"), "0 <= sparsity < 1", 1),
        (("--what", "heads", "--levels", "0.5"), "heads go one by one", 1),
        (("--output", "x.txt"), "saved as one of", 1),
        (("--resume",), "--output", 2),
    ],
)
def test_what_cannot_be_is_said(home, tmp_path, monkeypatch, options, says, code):
    monkeypatch.chdir(tmp_path)
    result = call("sensitivity", home / "model", "--data", home / "text.txt", *options)
    assert says in result.stderr
    assert result.exit_code == code
    assert result.stdout == ""  # before anything is loaded


def test_overrides_are_a_layer_a_line_and_python(home):
    said = worked(
        *("sensitivity", home / "model", "--samples", 2, "--length", 8, "--levels", "0.3,0.7"),
        *("--overrides", 0.5),
    )
    text = said[said.index("overrides = {") :]
    found = ast.literal_eval(text.removeprefix("overrides = "))
    assert len(found) == 14
    assert max(map(len, text.splitlines())) <= 80


def test_all_zeros_are_no_overrides(home):
    result = call("sensitivity", home / "model", "--overrides", "1.0")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "0 <= x < 1, got 1" in result.stderr


def test_levels_that_no_layer_can_hold_are_named(home):
    asked = ("--samples", 2, "--length", 8, "--levels", "7:13")
    result = call("sensitivity", home / "model", *asked)
    assert result.exit_code == 1
    assert "cannot hold 7:13" in result.stderr
