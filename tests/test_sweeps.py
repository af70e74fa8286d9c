"""A sample of a sweep: the rest is marked, nothing is lost, and a wrong name is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES
from sweeps import kept, sample, share


def test_a_sample_keeps_the_named_and_marks_the_others() -> None:
    cases = sample(FAMILIES.values(), "mlp", "t5")
    assert [str(case) for case in kept(cases)] == ["t5", "mlp"]
    rest = [case for case in cases if case not in kept(cases)]
    assert all([mark.name for mark in case.marks] == ["sweep"] for case in rest)
    values = [case.values[0] if hasattr(case, "values") else case for case in cases]
    assert values == list(FAMILIES.values())


def test_laws_that_take_turns_run_every_case() -> None:
    shares = [kept(share(FAMILIES, index, 3)) for index in range(3)]
    assert sorted(name for part in shares for name in part) == sorted(FAMILIES)
    assert all(len(set(part)) == len(part) > 3 for part in shares)


@pytest.mark.parametrize("keep", [["lama"], ["mlp", "nope"], []])
def test_names_that_are_not_there_are_refused(keep: list[str]) -> None:
    with pytest.raises(ValueError, match="expected some of"):
        sample(FAMILIES, *keep)


@pytest.mark.parametrize(("index", "count"), [(3, 3), (-1, 2), (20, 30), (0, 0)])
def test_an_empty_share_is_refused(index: int, count: int) -> None:
    with pytest.raises(ValueError, match="is empty"):
        share(FAMILIES, index, count)


def test_make_test_leaves_the_mark_out_and_make_test_all_does_not() -> None:
    recipes = (Path(__file__).parents[1] / "Makefile").read_text("utf-8").split("\n\n")
    (some,) = [recipe for recipe in recipes if "\nrun-test:" in f"\n{recipe}"]
    (whole,) = [recipe for recipe in recipes if "\nrun-test-all:" in f"\n{recipe}"]
    assert "-m 'not sweep and not family'" in some
    assert "pytest" in whole
    assert "sweep" not in whole.split("run-test-all:")[1]
