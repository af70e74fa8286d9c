"""What settings may become without some blocks: pure proposals."""

from __future__ import annotations

from typing import Any

import pytest

from torchprune.structure.block_proposals import any_number, changed, fewer, leaves, parted

LISTS = {"layers": (6, {1, 4})}


@pytest.mark.parametrize(
    ("value", "new"),
    [
        (6, 4),  # all blocks
        (2, 1),  # the first two, of which one goes
        (1, 1),
        (list("abcdef"), list("acdf")),
        ([0, 1, 1, 0, 1, 0], [0, 1, 0, 0]),
        ([0, 1, 5], [0, 3]),  # places
        ([2, 4], [1, 3]),  # how many blocks stand before
        ([1, 6, 3], [1, 4, 3]),  # stages
        (["stem", "stage2", "stage6"], ["stem", "stage1", "stage4"]),
        ([[["global", "local"], 3]], [[["global", "global", "local", "local"], 1]]),
        ({"0": 7, "4": 8, "5": 9}, {"0": 7, "3": 9}),
    ],
    ids=str,
)
def test_what_a_setting_may_become(value: Any, new: Any) -> None:
    found = fewer(value, LISTS)
    assert value not in found
    assert new in found or new == value


@pytest.mark.parametrize(
    "value", [7, True, None, 2.0, "6", [1, 2, 9], ["a", "b"], {"7": 1}, [[["x"], 4]]], ids=str
)
def test_what_says_nothing_of_blocks_stays(value: Any) -> None:
    assert fewer(value, LISTS) == []


def test_settings_inside_settings_are_found_and_changed() -> None:
    settings = {"depth": 6, "text": {"kinds": ["a", "b"], "one": {"0": "x"}}}
    assert dict(leaves(settings)) == {
        ("depth",): 6,
        ("text", "kinds"): ["a", "b"],
        ("text", "one"): {"0": "x"},
    }
    new = changed(settings, {("depth",): 5, ("text", "kinds"): ["a"]})
    assert new == {"depth": 5, "text": {"kinds": ["a"], "one": {"0": "x"}}}
    assert settings["depth"] == 6


def test_numbers_near_by_come_first() -> None:
    assert any_number(2, 4) == [1, 3, 0, 4]
    assert any_number(True, 4) == any_number(5, 4) == any_number([1], 4) == []


def test_tensors_with_a_part_for_each_block() -> None:
    assert parted((9, 12), (9, 8), LISTS) == (1, 2, [0, 2, 3, 5])
    assert parted((9, 12), (9, 9), LISTS) is None
    assert parted((12, 12), (8, 8), LISTS) is None
