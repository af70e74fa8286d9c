"""The paired tests against enumeration in plain floats and fractions, and what they must find."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import product
from statistics import stdev

import pytest

from torchprune.study.tasks import paired
from torchprune.study.tasks.paired import (
    holm,
    mcnemar,
    paired_test,
    sign_flips,
    stderr_of,
    tango_interval,
    value_of,
)


def swaps_by_hand(own, other):
    """Every way to swap two models' scores: how often the sums differ as much as these do."""
    seen = abs(sum(map(Fraction, own)) - sum(map(Fraction, other)))
    ways = list(product((False, True), repeat=len(own)))
    hits = 0
    for way in ways:
        pairs = [(b, a) if swap else (a, b) for a, b, swap in zip(own, other, way, strict=True)]
        hits += abs(sum(Fraction(a) - Fraction(b) for a, b in pairs)) >= seen
    return Fraction(hits, len(ways))


@pytest.mark.parametrize("seed", range(6))
def test_mcnemar_and_the_permutation_test_are_enumeration(seed):
    draw = random.Random(seed)
    own = [float(draw.random() < 0.7) for _ in range(9)]
    other = [float(draw.random() < 0.5) for _ in range(9)]
    expected = float(swaps_by_hand(own, other))
    changes = [a - b for a, b in zip(own, other, strict=True)]
    assert mcnemar(changes.count(1), changes.count(-1)) == pytest.approx(expected, abs=1e-15)
    assert sign_flips(changes, 0) == pytest.approx(expected, abs=1e-15)  # and of 0/1 it is the same


@pytest.mark.parametrize("seed", range(4))
def test_the_permutation_test_of_other_scores_is_enumeration(seed):
    draw = random.Random(seed)
    own = [draw.gauss(0.3, 1) for _ in range(10)]
    other = [draw.gauss(0, 1) for _ in range(9)] + [own[-1]]  # one example does not change
    changes = [a - b for a, b in zip(own, other, strict=True)]
    assert sign_flips(changes, 0) == pytest.approx(float(swaps_by_hand(own, other)), abs=1e-15)


def test_ties_count_however_they_round():
    changes = [0.1, 0.2, 0.3, 0.1, 0.2, 0.3]
    assert sign_flips(changes, 0) == 2 / 64


def test_drawn_permutations_come_near_all_of_them_and_are_the_same_again():
    draw = random.Random(3)
    changes = [draw.gauss(0.2, 1) for _ in range(14)]
    signs = product((1, -1), repeat=14)
    seen = abs(sum(changes))
    exact = sum(
        abs(sum(s * c for s, c in zip(way, changes, strict=True))) >= seen - 1e-9 for way in signs
    ) / (2**14)
    assert 0.02 < exact < 0.6
    assert sign_flips(changes, 5) == sign_flips(changes, 5)
    spread = math.sqrt(exact * (1 - exact) / 20_000)
    assert abs(sign_flips(changes, 5) - exact) < 4 * spread
    assert sign_flips(changes, 5) != sign_flips(changes, 6)


def test_drawn_permutations_never_say_that_chance_is_impossible():
    assert sign_flips([1.0 + i / 100 for i in range(60)], 0, draws=99) == 1 / 100


@pytest.mark.parametrize(
    ("gained", "lost", "size"), [(0, 0, 30), (3, 8, 40), (0, 5, 20), (9, 2, 11)]
)
def test_tangos_interval_ends_where_the_likeliest_model_is_refused(gained, lost, size):
    """The likelihood maximised over a grid in place of the closed form."""
    low, high = tango_interval(gained, lost, size, 0.95)
    assert -1 <= low <= (gained - lost) / size <= high <= 1

    def score(delta):
        best, share = -math.inf, 0.0
        for i in range(20_001):
            lose = i / 20_000
            gain = lose + delta
            same = 1 - lose - gain
            counts = ((gained, gain), (lost, lose), (size - gained - lost, same))
            if min(gain, lose, same) < 0 or any(n and not q > 0 for n, q in counts):
                continue
            fit = sum(n * math.log(q) for n, q in counts if n)
            if fit > best:
                best, share = fit, lose
        variance = size * (2 * share + delta * (1 - delta))
        return (gained - lost - size * delta) / math.sqrt(variance)

    for end in (low, high):
        if abs(end) < 1:
            assert abs(score(end)) == pytest.approx(1.96, abs=0.02)


def test_tangos_interval_of_swapped_models_is_mirrored():
    low, high = tango_interval(4, 11, 60, 0.9)
    assert tango_interval(11, 4, 60, 0.9) == pytest.approx((-high, -low))
    assert tango_interval(40, 110, 600, 0.9)[1] - tango_interval(40, 110, 600, 0.9)[0] < high - low


def test_holm_is_the_closed_test():
    """A hypothesis falls where every set of hypotheses that holds it does, each by Bonferroni."""
    draw = random.Random(0)
    for _ in range(50):
        ps = [draw.random() ** 3 for _ in range(4)]
        sets = [s for s in product((0, 1), repeat=4) if any(s)]
        closed = [
            max(
                min(1, sum(s) * min(p for p, k in zip(ps, s, strict=True) if k))
                for s in sets
                if s[i]
            )
            for i in range(4)
        ]
        assert holm(ps) == pytest.approx(closed)
    assert holm([]) == []


def test_values_and_standard_errors_of_every_link():
    losses, words = [3.0, 5.0, 2.5], [2.0, 4.0, 1.0]
    rate = 10.5 / 7
    assert value_of(losses, words, "mean") == rate
    assert value_of(losses, words, "exp") == pytest.approx(math.exp(rate))
    assert value_of(losses, words, "bits") == pytest.approx(rate / math.log(2))
    assert value_of([1e4], [1.0], "exp") == math.inf
    ones = [1.0] * 3
    assert stderr_of(losses, ones, "mean") == pytest.approx(stdev(losses) / math.sqrt(3))
    assert math.isnan(stderr_of([1.0], [1.0], "mean"))


@pytest.mark.parametrize("link", ["mean", "exp", "bits"])
def test_standard_errors_are_those_of_draws(link):
    """Of the metric itself over many draws of examples, and of the paired difference."""
    draw = random.Random(1)

    def sample():
        words = [float(draw.randint(5, 15)) for _ in range(80)]
        dense = [w * draw.gauss(1.0, 0.2) for w in words]
        own = [d + w * draw.gauss(0.05, 0.05) for d, w in zip(dense, words, strict=True)]
        return own, dense, words

    drawn = [sample() for _ in range(250)]
    values = [value_of(own, words, link) for own, _, words in drawn]
    told = [stderr_of(own, words, link) for own, _, words in drawn]
    assert sum(told) / 250 == pytest.approx(stdev(values), rel=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paired, "sign_flips", lambda *_: 1.0)  # which is slow and not asked for
        tests = [paired_test(own, dense, words, link) for own, dense, words in drawn]
    assert sum(t.stderr for t in tests) / 250 == pytest.approx(
        stdev([t.difference for t in tests]), rel=0.2
    )
    true = {"mean": 0.05, "bits": 0.05 / math.log(2), "exp": math.exp(1.05) - math.exp(1)}[link]
    held = sum(t.low <= true <= t.high for t in tests) / 250
    assert 0.9 <= held <= 0.99


def test_paired_differences_are_surer_than_unpaired_ones():
    draw = random.Random(2)
    dense = [draw.gauss(3, 1) for _ in range(50)]
    own = [x + draw.gauss(0.05, 0.05) for x in dense]
    found = paired_test(own, dense, [1.0] * 50, "mean")
    assert found.stderr < stderr_of(own, [1.0] * 50, "mean") / 5
    assert found.p < 0.001
    assert found.low > 0
    assert found.method == "paired permutation"


def test_a_difference_of_the_size_that_shows_is_found_four_times_of_five():
    draw = random.Random(4)
    size, lose, gain = 400, 0.12, 0.06

    def sample(gain):
        own, dense = [], []
        for _ in range(size):
            x = draw.random()
            pair = (0.0, 1.0) if x < lose else (1.0, 0.0) if x < lose + gain else (1.0, 1.0)
            own.append(pair[0])
            dense.append(pair[1])
        return paired_test(own, dense, [1.0] * size, "mean", level=0.05)

    found = [sample(gain) for _ in range(300)]
    typical = sum(t.shows for t in found) / 300
    assert typical == pytest.approx(0.058, abs=0.006)  # just this difference of 6 points
    assert 0.68 < sum(t.p < 0.05 for t in found) / 300 < 0.86  # the exact test is a little strict
    none = [sample(lose) for _ in range(300)]
    assert sum(t.p < 0.05 for t in none) / 300 <= 0.07


def test_models_that_agree_on_every_example():
    same = [1.0, 0.0] * 100
    found = paired_test(same, same, [1.0] * 200, "mean")
    assert (found.difference, found.p) == (0.0, 1.0)
    assert found.shows == 6 / 200  # six changed examples, all one way, would be p = 0.031
    assert paired_test(same, same, [1.0] * 200, "mean", tests=4).shows == 8 / 200
    losses = [0.5, 1.5, 2.5]
    found = paired_test(losses, losses, [1.0] * 3, "exp")
    assert (found.difference, found.p, found.low, found.high) == (0.0, 1.0, 0.0, 0.0)


def test_one_example_says_nothing():
    found = paired_test([2.0], [1.0], [1.0], "exp")
    assert (found.low, found.high, found.p) == (-math.inf, math.inf, 1.0)
