"""What users may write: patterns, specs, overrides; and the errors for what they may not."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchprune
from torchprune import NM, Block, MagnitudeSpec, SparseGPTSpec, Unstructured, WandaSpec
from torchprune.errors import SpecError, TorchpruneError
from torchprune.specs.goals import Goal
from torchprune.specs.patterns import Pattern, check_shape, parse_pattern, prune_count
from torchprune.specs.spec import Spec

SPECS = [MagnitudeSpec, WandaSpec, SparseGPTSpec]
each_spec = pytest.mark.parametrize("kind", SPECS)


# -- patterns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Unstructured()),
        (" Unstructured ", Unstructured()),
        ("2:4", NM(2, 4)),
        ("1:16", NM(1, 16)),
        ("block:4x8", Block(4, 8)),
        ("BLOCK:1x1", Block(1, 1)),
    ],
)
def test_strings_name_patterns(text: str, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern
    assert parse_pattern(pattern) is pattern


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_patterns_name_reads_back(one: int, other: int) -> None:
    for pattern in (Unstructured(), Block(one, other), NM(min(one, other), max(one, other) + 1)):
        assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "bad", ["", "2-4", "2:4:8", "block:4", "block:4,4", "half", 4, None, (2, 4)]
)
def test_what_is_no_pattern_is_told_the_accepted_forms(bad: Any) -> None:
    with pytest.raises(SpecError) as error:
        parse_pattern(bad)
    for form in (repr(bad), '"unstructured"', '"2:4"', "keeps n of every m", '"block:4x4"'):
        assert form in str(error.value)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 4), (0, 0)])
def test_a_group_keeps_some_and_prunes_some(n: int, m: int) -> None:
    with pytest.raises(SpecError, match="0 < n < m"):
        NM(n, m)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (-1, 1)])
def test_a_block_has_an_extent(shape: tuple[int, int]) -> None:
    with pytest.raises(SpecError, match="at least 1"):
        Block(*shape)


def test_patterns_are_values() -> None:
    assert len({NM(2, 4), NM(2, 4), NM(4, 8), Block(2, 2), Unstructured(), Unstructured()}) == 4
    assert NM(1, 3).sparsity == Fraction(2, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        NM(2, 4).n = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("pattern", "rows", "cols", "words"),
    [
        (NM(2, 4), 3, 6, ("up: ", "2:4", "divisible by 4", "got 6", "3 x 6")),
        (Block(4, 2), 6, 8, ("up: ", "block:4x2", "rows divisible by 4", "6 x 8")),
        (Block(2, 3), 6, 8, ("up: ", "columns by 3", "6 x 8")),
    ],
)
def test_shapes_a_pattern_does_not_fit(
    pattern: Pattern, rows: int, cols: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(SpecError) as error:
        check_shape(pattern, rows, cols, "up")
    for word in words:
        assert word in str(error.value)


# -- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "sparsity", "count"),
    [
        (100, 0.29, 29),  # int(100 * 0.29) is 28
        (100, 0.57, 57),
        (100, 0.58, 58),
        (10, 0.7, 7),
        (3, 0.5, 1),
        (7, 1 / 3, 2),
        (9, 1 / 3, 2),  # 0.3333333333333333 is less than a third
        (9, Fraction(1, 3), 3),
        (10**12, 1e-12, 1),
        (5, 0.0, 0),
        (5, 0.999, 4),
    ],
)
def test_counts_follow_the_written_decimal(total: int, sparsity: float, count: int) -> None:
    assert prune_count(total, sparsity) == count


@given(st.integers(0, 10**6), st.integers(0, 99))
def test_whole_percents_are_exact(total: int, percent: int) -> None:
    assert prune_count(total, percent / 100) == total * percent // 100


# -- specs ----------------------------------------------------------------------------------------


@each_spec
def test_defaults(kind: type[Spec]) -> None:
    spec = kind()
    assert spec.goal == Goal(Unstructured(), 0.5)
    assert spec.scope == kind.scopes[0]
    assert kind(pattern="1:4").goal == Goal(NM(1, 4), 0.75)
    assert kind(pattern="block:2x2").goal == Goal(Block(2, 2), 0.5)
    assert kind(0.7).sparsity == 0.7


def test_default_scopes_are_the_papers() -> None:
    assert [kind().scope for kind in SPECS] == ["layer", "row", "layer"]
    assert WandaSpec(scope="global").sequential == "none"


@each_spec
def test_specs_are_frozen_values(kind: type[Spec]) -> None:
    assert kind() == kind(0.5) == kind(pattern=Unstructured(), sparsity=0.5)
    assert kind() != kind(0.6)
    assert len({kind(), kind(0.5), kind(0.6)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().sparsity = 0.9  # type: ignore[misc]
    assert dataclasses.replace(kind(), sparsity=0.25).goal.sparsity == 0.25


def test_a_specs_overrides_are_its_own() -> None:
    overrides: dict[str, Any] = {"a": 0.5}
    spec = MagnitudeSpec(overrides=overrides)
    overrides["b"] = 0.9
    assert list(spec.overrides) == ["a"]


@each_spec
@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, 50, float("nan"), float("inf")])
def test_sparsity_is_a_share(kind: type[Spec], sparsity: float) -> None:
    with pytest.raises(SpecError, match="0 <= sparsity < 1"):
        kind(sparsity=sparsity)


@each_spec
@pytest.mark.parametrize("sparsity", ["0.5", True, [0.5]])
def test_sparsity_is_a_number(kind: type[Spec], sparsity: Any) -> None:
    with pytest.raises(SpecError, match="must be a number"):
        kind(sparsity=sparsity)


@each_spec
def test_a_sparsity_may_repeat_its_pattern_but_not_contradict_it(kind: type[Spec]) -> None:
    assert kind(0.5, "2:4") == kind(pattern="2:4")
    assert kind(1 / 3, "2:3").goal.pattern == NM(2, 3)
    with pytest.raises(SpecError, match=r"0\.6 contradicts pattern 2:4, which is 0\.5 by itself"):
        kind(0.6, "2:4")


@each_spec
def test_misspelt_options_are_refused_with_a_hint(kind: type[Spec]) -> None:
    with pytest.raises(SpecError, match=rf"{kind.__name__} has no option 'patern' .did you mean"):
        kind(patern="2:4")
    with pytest.raises(SpecError, match="it accepts sparsity, pattern, scope, targets"):
        kind(xyzzy=1)


def test_an_option_of_another_method_is_refused() -> None:
    with pytest.raises(SpecError, match="MagnitudeSpec has no option 'damping'"):
        MagnitudeSpec(damping=0.1)
    with pytest.raises(SpecError, match="WandaSpec has no option 'block_size'"):
        WandaSpec(block_size=64)


@each_spec
def test_unknown_scopes_are_told_the_known_ones(kind: type[Spec]) -> None:
    with pytest.raises(SpecError) as error:
        kind(scope="column")
    for scope in kind.scopes:
        assert repr(scope) in str(error.value)


def test_sparsegpt_has_no_global_scope() -> None:
    with pytest.raises(SpecError, match="'global' is not offered"):
        SparseGPTSpec(scope="global")


@pytest.mark.parametrize("kind", [WandaSpec, SparseGPTSpec])
def test_sequences_are_named(kind: type[WandaSpec]) -> None:
    for mode in ("layer", "block", "none"):
        assert kind(sequential=mode).sequential == mode
    with pytest.raises(SpecError, match='accepted: "layer", "block", "none"'):
        kind(sequential="blocks")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["layer", "block"])
def test_a_global_budget_needs_all_statistics_at_once(mode: Any) -> None:
    with pytest.raises(SpecError, match='needs sequential="none"'):
        WandaSpec(scope="global", sequential=mode)


@pytest.mark.parametrize("damping", [0, -1.0, float("inf"), float("nan"), "0.01", None])
def test_damping_is_above_zero(damping: Any) -> None:
    with pytest.raises(SpecError, match="damping must be above 0"):
        SparseGPTSpec(damping=damping)


@pytest.mark.parametrize("size", [0, -4, 1.5, "128", None])
def test_a_block_size_is_a_whole_number(size: Any) -> None:
    with pytest.raises(SpecError, match=r"block_size must be a .*whole number.*, got"):
        SparseGPTSpec(block_size=size)


def test_errors_are_value_errors_too() -> None:
    assert issubclass(SpecError, TorchpruneError)
    assert issubclass(SpecError, ValueError)


# -- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "goal"),
    [
        (0.75, Goal(Unstructured(), 0.75)),
        (0, Goal(Unstructured(), 0.0)),
        ("2:4", Goal(NM(2, 4), 0.5)),
        (NM(1, 4), Goal(NM(1, 4), 0.75)),
        ("block:2x2", Goal(Block(2, 2), 0.6)),
        (("block:2x2", 0.25), Goal(Block(2, 2), 0.25)),
        ((NM(2, 4), 0.5), Goal(NM(2, 4), 0.5)),
        ("dense", None),
        (" Dense ", None),
    ],
)
def test_overrides_take_a_sparsity_a_pattern_both_or_dense(value: Any, goal: Goal | None) -> None:
    assert MagnitudeSpec(0.6, overrides={"x": value}).override_goal("x") == goal


def test_an_unstructured_override_of_a_group_pattern_is_half() -> None:
    spec = MagnitudeSpec(pattern="1:4", overrides={"x": "unstructured"})
    assert spec.override_goal("x") == Goal(Unstructured(), 0.5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2-4", r"pattern '2-4' is not understood"),
        (1.5, r"overrides\['x'\]: sparsity is the share of zeros"),
        (True, r"overrides\['x'\]: True is neither"),
        (None, r"overrides\['x'\]: None is not understood"),
        (("2:4", 0.7), r"overrides\['x'\]: sparsity 0\.7 contradicts pattern 2:4"),
        (("2:4", 0.5, 1), "is not understood"),
        ({}, "is not understood"),
    ],
)
def test_overrides_that_make_no_sense(value: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MagnitudeSpec(overrides={"x": value})


def test_a_bare_sparsity_contradicts_a_group_pattern() -> None:
    with pytest.raises(SpecError, match=r"overrides\['x'\].*contradicts pattern 2:4"):
        MagnitudeSpec(pattern="2:4", overrides={"x": 0.7})


def test_overrides_are_a_mapping() -> None:
    with pytest.raises(SpecError, match="overrides must map selector strings to values, got list"):
        MagnitudeSpec(overrides=[("x", 0.5)])  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["wanda", None, WandaSpec, 0.5])
def test_sparsify_wants_a_spec(bad: Any) -> None:
    with pytest.raises(SpecError, match="spec must be a MagnitudeSpec, WandaSpec,"):
        torchprune.sparsify(nn.Linear(4, 4), bad)


def test_a_shape_error_names_the_layer_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SpecError, match=r"^1: .*width divisible by 4, got 6"):
        torchprune.sparsify(model, MagnitudeSpec(pattern="2:4", targets=["0", "1"]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torchprune.masks(model)
