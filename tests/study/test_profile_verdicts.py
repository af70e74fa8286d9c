"""Sentences that follow from numbers, on numbers made up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprune.study.speed.profile_records import (
    Cell,
    Contender,
    FlopCount,
    Inside,
    ProfileError,
    Prospect,
)
from torchprune.study.speed.profile_results import Profile
from torchprune.study.speed.speed_verdicts import ALIKE, growth_to, judged, standing, times_as
from torchprune.study.speed.spreads import Latency, Ratio

DENSE = Contender("dense", "eager", "dense", held=1000, read=1000)
EAGER = Contender("eager", "eager", "folded", held=1000, read=1000)
BITMASK = Contender("bitmask", "bitmask", "lowered", True, held=600, read=560)
INT8 = Contender("int8", "int8", "torchao", held=300, read=300)


def exact(value: float) -> Ratio:
    return Ratio(value, value, value)


def made(
    ratios: dict[str, dict[int, Ratio]],
    base: dict[int, float] | None = None,
    contenders: tuple[Contender, ...] = (DENSE, EAGER, BITMASK, INT8),
    **more,
) -> Profile:
    base = base or {1: 0.1, 64: 0.11}
    cells = [Cell("dense", rows, Latency(t, t, t, 9)) for rows, t in base.items()]
    for name, by_rows in ratios.items():
        for rows, ratio in by_rows.items():
            t = base[rows] * ratio.value
            cells.append(Cell(name, rows, Latency(t, t, t, 9), ratio))
    return judged(Profile("Net", "token", "dense", 100, 50, contenders, tuple(cells), **more))


def texts(profile: Profile, kind: str, contender: str = "") -> list[str]:
    return [v.text for v in profile.verdicts if v.kind == kind and v.contender == contender]


ratios = st.tuples(*[st.floats(0.05, 20)] * 3).map(sorted).map(lambda y: Ratio(y[1], y[0], y[2]))


@given(ratios)
def test_nothing_is_claimed_that_the_interval_does_not_hold(ratio):
    kind = standing(ratio)
    if ratio.low <= 1 <= ratio.high:
        assert kind in ("same", "unclear")
    if kind == "faster":
        assert ratio.high < 1
        assert ratio.value < 1 - ALIKE
    if kind == "slower":
        assert ratio.low > 1
        assert ratio.value > 1 + ALIKE
    if kind == "same":
        assert ratio.low >= 1 - ALIKE
        assert ratio.high <= 1 + ALIKE


@given(ratios)
def test_a_ratio_turned_round_is_the_opposite(ratio):
    """But for the margin, which is not symmetric to the last digit."""
    opposite = {"faster": "slower", "slower": "faster"}
    turned = Ratio(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    kinds = standing(ratio), standing(turned)
    assert kinds[1] != kinds[0] or kinds[0] in ("same", "unclear")
    if kinds[0] in opposite and abs(ratio.value - 1) > 2 * ALIKE:
        assert kinds[1] == opposite[kinds[0]]


@given(ratios)
def test_the_numbers_of_a_cell_are_in_its_sentence(ratio):
    found = made({"bitmask": {1: ratio}})
    (verdict,) = [v for v in found.verdicts if v.contender == "bitmask" and v.kind != "memory"]
    assert verdict.kind == standing(ratio)
    expected = times_as(ratio) if verdict.kind in ("faster", "slower") else str(ratio)
    assert expected in verdict.text


def test_faster_by_what_it_reads():
    found = made({"bitmask": {1: exact(0.5)}})
    assert texts(found, "faster", "bitmask") == [
        "at 1 token bitmask is 2.00 times as fast (2.00 to 2.00): it reads 0.56 of the bytes"
    ]
    assert texts(found, "memory", "bitmask") == ["bitmask holds 0.60 of dense's bytes of weights"]


@pytest.mark.parametrize("form", ["eager", "masked"])
def test_a_smaller_model_is_not_taken_for_noise(form):
    small = Contender(form, form, "folded", held=700, read=690)
    found = made({form: {1: exact(0.8)}}, contenders=(DENSE, small))
    (text,) = texts(found, "faster", form)
    assert text.endswith("the model is smaller: it reads 0.69 of the bytes")
    (text,) = texts(made({"eager": {1: exact(0.8)}}), "faster", "eager")
    assert "disturbs" in text


def test_a_form_is_not_credited_with_what_a_smaller_model_brings():
    small = Contender("eager", "eager", "folded", held=700, read=690)
    compiled = Contender("compile", "compile", "inductor", held=700, read=690)
    found = made({"compile": {1: exact(0.5)}}, contenders=(DENSE, small, compiled))
    (text,) = texts(found, "faster", "compile")
    assert "that is the form's doing, and the smaller model's (it reads 0.69 of the bytes)" in text
    (text,) = texts(made({"int8": {1: exact(0.5)}}), "faster", "int8")
    assert "smaller" not in text


def test_slower_where_time_grows_with_rows_is_bound_by_arithmetic():
    bound = made({"bitmask": {64: exact(1.3)}}, {1: 0.1, 64: 6.0})
    (text,) = texts(bound, "slower", "bitmask")
    assert "at 64 tokens bitmask is 1.30 times slower (1.30 to 1.30): dense's time grows" in text
    assert "bound by arithmetic" in text
    flat = made({"bitmask": {64: exact(1.3)}}, {1: 0.1, 64: 0.11})
    (text,) = texts(flat, "slower", "bitmask")
    assert "arithmetic" not in text


def test_growth_is_none_at_the_fewest_rows_and_one_in_proportion():
    found = made({}, {1: 0.1, 8: 0.1, 64: 0.8})
    assert growth_to(found, 1) is None
    assert growth_to(found, 8) == pytest.approx(0)
    assert growth_to(found, 64) == pytest.approx(1)


def test_what_cannot_be_faster_is_put_down_to_the_machine():
    found = made({"eager": {1: exact(0.5)}})
    (text,) = texts(found, "faster", "eager")
    assert text.endswith("take this for what disturbs the measurement here")


def test_what_a_form_brings_without_zeros_is_said_to_be_its_own():
    found = made({"int8": {1: exact(0.5)}})
    (text,) = texts(found, "faster", "int8")
    assert "that is the form's doing" in text
    assert "0.52" not in text
    both = (DENSE, EAGER, INT8, replace(INT8, name="dense int8"))
    found = made({"int8": {1: exact(0.5)}, "dense int8": {1: exact(0.52)}}, contenders=both)
    (text,) = texts(found, "faster", "int8")
    assert "gives the dense model 0.52 (0.52 to 0.52) of its time" in text


def test_one_sentence_for_all_rows_where_nothing_differs():
    found = made({"eager": {1: exact(1.0), 64: exact(1.01)}})
    (text,) = texts(found, "same", "eager")
    assert "1.00 (1.00 to 1.00) at 1, 1.01 (1.01 to 1.01) at 64 tokens" in text
    wide = made({"eager": {1: Ratio(1.0, 0.7, 1.4)}})
    (text,) = texts(wide, "unclear", "eager")
    assert "too wide: measure longer" in text


def test_zeros_that_bring_nothing_are_said_with_their_share():
    found = made({}, flops=(FlopCount(1, 200, 90), FlopCount(64, 12800, 5000)))
    (text,) = texts(found, "zeros")
    assert text == (
        "45% of the arithmetic is by zeros; eager and int8 compute it all the same, so that zeros "
        "bring nothing there"
    )
    missing = replace(INT8, missing="not installed")
    found = made({}, contenders=(DENSE, EAGER, missing), flops=(FlopCount(1, 200, 90),))
    assert "eager computes it all" in texts(found, "zeros")[0]
    none = made({}, flops=(FlopCount(1, 200, 0),))
    assert texts(none, "zeros") == ["no multiplication is by a zero of a weight: nothing to gain"]


@given(st.floats(0.01, 0.74))
def test_a_bound_is_what_is_left_when_layers_cost_nothing(share):
    found = made({}, inside=(Inside(1, share),))
    (text,) = texts(found, "bound")
    assert f"more than {1 / (1 - share):.1f} times as fast" in text
    assert not texts(made({}, inside=(Inside(1, 0.9),)), "bound")


def test_prospects_are_told_best_first_and_only_those_that_help():
    ahead = (
        Prospect(1, "bitmask 50 %", exact(0.8), 12, 0.56),
        Prospect(1, "bitmask 80 %", Ratio(0.6, 0.55, 0.65), 12, 0.26),
        Prospect(1, "bitmask 2:4", Ratio(0.9, 0.7, 1.1), 12, 0.56),
    )
    found = made({}, prospects=ahead)
    (text,) = texts(found, "prospect")
    order = [text.index("0.60 (0.55 to 0.65) bitmask 80 %"), text.index("0.80 (0.80 to 0.80)")]
    assert order == sorted(order)
    assert "2:4" not in text
    assert "shapes of 12 layers" in text
    assert not texts(found, "nothing")


def test_where_no_bitmask_helps_it_says_so_and_what_would():
    ahead = (
        Prospect(64, "bitmask 50 %", exact(1.2), 12, 0.56),
        Prospect(64, "bitmask 80 %", exact(1.1), 12, 0.26),
        Prospect(64, "half of the outputs removed", exact(0.6), 12, 0.5),
    )
    found = made({}, prospects=ahead)
    (text,) = texts(found, "nothing")
    assert (
        "at 64 tokens no bitmask brings anything, the best (bitmask 80 %) would take 1.10" in text
    )
    assert text.endswith(
        "; half of the outputs removed, as `shrink` does, would take 0.60 (0.60 to 0.60)"
    )
    assert "0.60 (0.60 to 0.60) half of the outputs removed" in texts(found, "prospect")[0]
    fewer = Prospect(1, "bitmask 50 %", exact(0.5), 12, 0.56)
    assert texts(made({}, prospects=(fewer, *ahead[:2])), "nothing")[0].endswith(
        "of the time; it does at 1 token"
    )
    assert texts(made({}, prospects=ahead[:2]), "nothing")[0].endswith("of the time")


# -- kept and shown --------------------------------------------------------------------------------


def full() -> Profile:
    return made(
        {"bitmask": {1: exact(0.5), 64: exact(1.3)}, "eager": {1: Ratio(1.0, 0.9, 1.1)}},
        flops=(FlopCount(1, 200, 90),),
        inside=(Inside(1, 0.4),),
        prospects=(Prospect(1, "bitmask 50 %", exact(0.8), 12, 0.56),),
        notes=("a note",),
        machine={"processor": "A processor", "threads": "2", "torch": "2.13"},
        peak_how="by looking",
    )


def test_json_gives_the_very_same_back_and_damage_is_named():
    found = full()
    assert Profile.from_json(found.to_json()) == found
    for damage, says in (
        (("torchprune profile 1", "another 1"), "expected the format"),
        (('"rows": 64', '"rows": "64"'), r"cells\[\d\].rows: expected int"),
        (('"unit"', '"unti"'), "it has no unti"),
        (('"median": 0.1,', '"median": null,'), "median: expected float, got None"),
    ):
        text = found.to_json()
        assert damage[0] in text
        with pytest.raises(ProfileError, match=says):
            Profile.from_json(text.replace(*damage))
    with pytest.raises(ProfileError, match="not JSON"):
        Profile.from_json(found.to_json()[:-9])
    with pytest.raises(ProfileError, match="got 'list'"):
        Profile.from_json("[]")


def test_the_table_has_every_cell_and_the_verdicts_follow():
    found = full()
    text = found.to_markdown()
    assert "| bitmask | 64 | 143 | 143 to 143 | 1.30 (1.30 to 1.30) | 447.6 |" in text
    assert "A processor, 2 threads, torch 2.13" in str(found)
    for verdict in found.verdicts:
        assert f"- {verdict.text}" in text
        assert f"- {verdict.text}" in str(found)


def test_a_page_of_it():
    page = full().page()
    assert page.lead == (
        "At best this Net is 2.00 times as fast as dense: as bitmask, with 1 token a call."
    )
    titles = [section.title for section in page.sections]
    assert titles == [
        "What the numbers say",
        "Speed",
        "All numbers",
        "What would bring more",
        "Measured on",
    ]
    grid = page.sections[2].pieces[0]
    assert [len(row) for row in grid.raw] == [len(grid.columns)] * len(grid.rows)
    assert all(len(row) == len(grid.columns) for row in grid.rows)
    lines, *bars = page.sections[1].pieces
    assert {line.name: [s.x for s in line.spots] for line in lines.lines}["bitmask"] == [1, 64]
    assert [[(b.name, b.value) for b in piece.bars] for piece in bars] == [
        [("bitmask", 0.5), ("eager", 1.0)],
        [("bitmask", 1.3)],
    ]
    assert page.data["format"] == "torchprune profile 1"
    slow = made({"bitmask": {1: exact(1.3)}}).page()
    assert slow.lead == "No form of this Net is faster than dense."


def test_saved_by_suffix(tmp_path):
    found = full()
    found.save(tmp_path / "it.json")
    assert Profile.from_json((tmp_path / "it.json").read_text("utf-8")) == found
    found.save(tmp_path / "it.md")
    assert "| bitmask |" in (tmp_path / "it.md").read_text("utf-8")
    found.save(tmp_path / "it.svg")
    assert (tmp_path / "it.svg").stat().st_size > 2000
    with pytest.raises(ProfileError, match=r"it\.txt: a profile is saved as one of \.html, "):
        found.save(tmp_path / "it.txt")
    with pytest.raises(ProfileError, match=r"saved as one of \.png"):
        found.figure(tmp_path / "it.json")


def test_a_cell_that_is_not_there_is_named():
    with pytest.raises(ProfileError, match="no cell of 'bitmsk' at 1 rows; contenders are 'dense'"):
        full().cell("bitmsk", 1)
