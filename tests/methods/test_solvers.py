"""The quadratic problem, its refit and ADMM, against float64 brute force."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from by_hand import moments_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune import PCG, ADMMSpec, BestSpec, MagnitudeSpec, RIASpec, SparseGPTSpec, WandaSpec
from torchprune.errors import SpecError
from torchprune.masking.projection import BARRED, project, project_partly
from torchprune.methods.factor import factorise
from torchprune.methods.problem import problem_of
from torchprune.methods.refit import refit
from torchprune.methods.ria import ria_score
from torchprune.methods.solve import Solver
from torchprune.methods.sparsegpt import sparsegpt
from torchprune.specs.patterns import NM, Block, Pattern, Unstructured, prune_count

RIDGE = 0.1
GOALS = [
    (Unstructured(), 0.5, "row"),
    (Unstructured(), 0.5, "layer"),
    (Unstructured(), 0.7, "row"),
    (NM(2, 4), 0.5, "row"),
    (NM(1, 4), 0.75, "row"),
    (NM(4, 8), 0.5, "row"),
    (Block(2, 4), 0.5, "layer"),
]


def correlated(seed: int, tokens: int, cols: int, dead: tuple[int, ...] = ()) -> Tensor:
    """Inputs like a model's: few strong directions, columns of very different size."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(tokens, max(1, cols // 3), generator=generator)
    x = low @ torch.randn(low.shape[1], cols, generator=generator)
    x += 0.3 * torch.randn(tokens, cols, generator=generator)
    x *= torch.randn(cols, generator=generator).exp()
    x[:, list(dead)] = 0
    return x


def weights(seed: int, rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed + 1000))


def error(w: Tensor, new: Tensor, x: Tensor) -> float:
    """||X (W - W')^T||^2 in float64."""
    return float((x.double() @ (w.double() - new.double()).T).square().sum())


def value(new: Tensor, w: Tensor, x: Tensor, target: Tensor) -> float:
    """What the refit minimises, in float64, from its definition: the error against the outputs
    wanted, and the ridge on weights in units of their input's length."""
    length = x.double().square().sum(0).sqrt()
    missed = x.double() @ new.double().T - target.double()
    return float(missed.square().sum() + RIDGE * ((new - w).double() * length).square().sum())


def exact(w: Tensor, keep: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """The minimum of `value` over weights that are zero off the mask, row by row, in float64."""
    x, w, target = x.double(), w.double(), target.double()
    length = x.square().sum(0)
    new = torch.zeros_like(w)
    for row in range(len(w)):
        at = (keep[row] & (length > 0)).nonzero().flatten()
        matrix = x[:, at].T @ x[:, at] + RIDGE * torch.diag(length[at])
        right = x[:, at].T @ target[:, row] + RIDGE * length[at] * w[row, at]
        new[row, at] = torch.linalg.solve(matrix, right)
        idle = (keep[row] & (length == 0)).nonzero().flatten()
        new[row, idle] = w[row, idle]
    return new


# -- the refit -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    cols=st.integers(2, 12),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    dead=st.sampled_from([(), (0,), (0, 1)]),
)
def test_the_refit_is_the_restricted_least_squares(
    seed: int, rows: int, cols: int, share: float, alpha: float, dead: tuple[int, ...]
) -> None:
    x, w = correlated(seed, 40, cols, dead), weights(seed, rows, cols)
    dense = x + 0.3 * correlated(seed + 1, 40, cols, dead)
    moments = moments_of(x, dense if alpha else None)
    keep = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) > share
    spec = WandaSpec(refine=PCG(4 * cols, RIDGE), alpha=alpha)
    new = Solver(spec, moments, "x").solve(0, [w], spec.goal, [None], [keep])[0].weight
    target = ((1 - alpha) * x.double() + alpha * dense.double()) @ w.double().T
    best = exact(w, keep, x, target)
    assert not new[~keep].any()
    scale = float((x.double() @ w.double().T).square().sum()) + 1e-12
    assert value(new, w, x, target) <= value(best, w, x, target) + 1e-4 * scale
    assert torch.equal(new[:, list(dead)], w.where(keep, 0)[:, list(dead)])


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), cols=st.integers(2, 24), steps=st.integers(1, 30))
def test_a_refit_never_raises_the_error_of_a_mask(seed: int, cols: int, steps: int) -> None:
    x, w = correlated(seed, 50, cols), weights(seed, 5, cols)
    keep = torch.rand(5, cols, generator=torch.Generator().manual_seed(seed)) > 0.5
    spec = MagnitudeSpec(refine=PCG(steps, RIDGE))
    solved = Solver(spec, moments_of(x), "x").solve(0, [w], spec.goal, [None], [keep])[0]
    before = error(w, w.where(keep, 0), x)
    after = error(w, solved.weight, x)
    assert after <= before * (1 + 1e-4) + 1e-6
    assert solved.squared == pytest.approx(after, rel=1e-2, abs=1e-3 * before + 1e-6)


def test_every_step_of_a_refit_lowers_its_value() -> None:
    x, w = correlated(3, 60, 20), weights(3, 4, 20)
    problem = problem_of(moments_of(x).gram[0], RIDGE)  # type: ignore[index]
    keep = torch.rand(4, 20, generator=torch.Generator().manual_seed(3)) > 0.5
    dense = problem.scaled(w)
    linear = dense @ problem.pull
    target = x @ w.T
    values = []
    for steps in range(12):
        scaled = refit(linear, dense.where(keep, 0), keep, problem, steps)
        values.append(value(problem.unscaled(scaled, w).where(keep, 0), w, x, target))
    assert all(later < earlier for earlier, later in itertools.pairwise(values[:9]))
    assert max(values[9:]) < values[8] * (1 + 1e-6)  # what is left is float32's rounding


def test_outlying_inputs_do_not_set_the_ridge_of_others() -> None:
    """Scaling an input by c and its weights by 1/c changes nothing but rounding."""
    x, w = correlated(5, 60, 12), weights(5, 4, 12)
    keep = torch.rand(4, 12, generator=torch.Generator().manual_seed(5)) > 0.5
    spec = MagnitudeSpec(refine=PCG(50, RIDGE))
    factor = torch.ones(12)
    factor[2] = 2.0**8

    def fitted(x: Tensor, w: Tensor) -> Tensor:
        return Solver(spec, moments_of(x), "x").solve(0, [w], spec.goal, [None], [keep])[0].weight

    torch.testing.assert_close(
        fitted(x * factor, w / factor) * factor, fitted(x, w), rtol=1e-3, atol=1e-4
    )


# -- ADMM ------------------------------------------------------------------------------------------


def solved_by(
    spec: torchprune.specs.Spec, w: Tensor, x: Tensor, barred: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    solved = Solver(spec, moments_of(x), "x").solve(0, [w], spec.goal, [barred], [None])[0]
    return solved.weight, solved.keep


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), goal=st.sampled_from(GOALS), fours=st.integers(2, 5))
def test_admm_prunes_exactly_what_the_pattern_says(
    seed: int, goal: tuple[Pattern, float, str], fours: int
) -> None:
    pattern, sparsity, scope = goal
    rows, cols = 6, 8 * fours
    x, w = correlated(seed, 50, cols), weights(seed, rows, cols)
    spec = ADMMSpec(None if isinstance(pattern, NM) else sparsity, pattern, scope)
    new, keep = solved_by(spec, w, x)
    assert not new[~keep].any()
    assert new.isfinite().all()
    if isinstance(pattern, NM):
        assert (keep.view(rows, -1, pattern.m).sum(-1) == pattern.n).all()
    elif scope == "row":
        assert (keep.sum(1) == cols - prune_count(cols, sparsity)).all()
    else:
        assert int((~keep).sum()) == prune_count(rows * cols, sparsity)


@pytest.mark.parametrize(("pattern", "sparsity", "scope"), GOALS, ids=str)
def test_admm_loses_less_than_sparsegpt(pattern: Pattern, sparsity: float, scope: str) -> None:
    """Never much worse on a layer, better by far on average; both measured in float64."""
    ratios = []
    for seed in range(12):
        x, w = correlated(seed, 200, 32), weights(seed, 16, 32)
        share = None if isinstance(pattern, NM) else sparsity
        new, _ = solved_by(ADMMSpec(share, pattern, scope), w, x)
        gram = moments_of(x).gram
        assert gram is not None
        factor = factorise(gram[0], len(x), 0.01, "x")
        other = sparsegpt([w], factor, pattern, sparsity, scope)[0].weight
        ratios.append(error(w, new, x) / error(w, other, x))
    assert max(ratios) < 1.1
    assert statistics.mean(ratios) < 0.9


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
def test_admm_comes_near_the_best_of_all_masks(pattern: Pattern) -> None:
    """Of all masks of one row of eight weights, each with its exact least squares."""
    ratios = []
    for seed in range(12):
        x, w = correlated(seed, 60, 8), weights(seed, 1, 8)
        best = min(
            error(w, exact(w, keep, x, x @ w.T), x)
            for chosen in itertools.combinations(range(8), 4)
            if (keep := torch.zeros(1, 8, dtype=torch.bool)).index_fill_(
                1, torch.tensor(chosen), True
            )
            is not None
            and (isinstance(pattern, Unstructured) or int(keep[0, :4].sum()) == 2)
        )
        share = None if isinstance(pattern, NM) else 0.5
        new, _ = solved_by(ADMMSpec(share, pattern, ridge=RIDGE, refine=PCG(30, RIDGE)), w, x)
        ratios.append(error(w, new, x) / best)
    assert min(ratios) > 0.999  # no mask can do better than all masks
    assert statistics.median(ratios) < 1.35


def test_admm_on_uncorrelated_inputs_keeps_the_largest() -> None:
    """Where inputs do not correlate the best mask is Wanda's, and the best weights the dense."""
    w = weights(0, 6, 16)
    x = torch.eye(16).repeat(4, 1) * torch.linspace(0.5, 2, 16)
    new, keep = solved_by(ADMMSpec(0.5, refine=PCG(30, 1e-6), ridge=1e-6), w, x)
    order = (w.abs() * x.square().sum(0).sqrt()).argsort(1)
    expected = torch.ones_like(keep).scatter_(1, order[:, :8], False)
    assert torch.equal(keep, expected)
    torch.testing.assert_close(new, w.where(keep, 0), rtol=1e-4, atol=1e-5)


def test_barred_weights_stay_pruned() -> None:
    """And count, though the first input could stand in for eight others and would be chosen."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(60, 16, generator=generator)).Q
    x[:, 0] = x[:, 1:9].sum(1)
    w = torch.ones(1, 16)
    w[:, 0], w[:, 9:] = 0, 1.3
    new, keep = solved_by(ADMMSpec(0.5), w, x)
    assert keep[0, 0], "it would be chosen"
    barred = torch.zeros(1, 16, dtype=torch.bool)
    barred[:, 0] = True
    new, keep = solved_by(ADMMSpec(0.5), w, x, barred)
    assert not keep[0, 0]
    assert new[0, 0] == 0
    assert int(keep.sum()) == 8


def test_matrices_solved_together_are_those_solved_alone() -> None:
    x = correlated(2, 60, 16)
    several = [weights(seed, rows, 16) for seed, rows in ((1, 3), (2, 8), (3, 3))]
    for spec in (ADMMSpec(0.5), ADMMSpec(0.5, scope="layer"), SparseGPTSpec(refine="pcg")):
        together = Solver(spec, moments_of(x), "x").solve(
            0, several, spec.goal, [None] * 3, [None] * 3
        )
        for w, one in zip(several, together, strict=True):
            alone, keep = solved_by(spec, w, x)
            assert torch.equal(one.keep, keep)
            torch.testing.assert_close(one.weight, alone, rtol=1e-3, atol=1e-4)


# -- what is asked on the way ----------------------------------------------------------------------


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    goal=st.sampled_from(GOALS),
    share=st.floats(0, 1),
    ties=st.booleans(),
)
def test_a_part_of_the_way_prunes_a_part_of_the_end(
    seed: int, goal: tuple[Pattern, float, str], share: float, ties: bool
) -> None:
    pattern, sparsity, scope = goal
    score = torch.rand(6, 16, generator=torch.Generator().manual_seed(seed))
    if ties:
        score = (score * 4).round()
    whole = project(score, pattern, sparsity, scope)
    part = project_partly(score, pattern, sparsity, scope, share)
    assert (part | ~whole).logical_or(~part).all()
    assert not (whole & ~part).any(), "something goes early that the end would keep"
    unit = pattern.rows * pattern.cols if isinstance(pattern, Block) else 1
    gone, end = int((~part).sum()) // unit, int((~whole).sum()) // unit
    if scope == "row" and not isinstance(pattern, NM):
        assert gone == len(score) * int(share * (end // len(score)))
    else:
        assert gone == int(share * end)
    if share == 1:
        assert torch.equal(part, whole)


def test_what_is_barred_goes_first() -> None:
    score = torch.arange(16.0).view(1, 16)
    score[0, 15] = BARRED
    keep = project_partly(score, Unstructured(), 0.5, "row", 0.125)
    assert (~keep).nonzero().tolist() == [[0, 15]]


# -- scores ----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), power=st.sampled_from([0.5, 1.0]))
def test_ria_is_the_papers_score(seed: int, power: float) -> None:
    w, x = weights(seed, 5, 8), correlated(seed, 30, 8)
    score = ria_score(w, x.square().sum(0), power)
    for i, j in itertools.product(range(5), range(8)):
        size = abs(float(w[i, j]))
        relative = size / float(w[i].abs().sum()) + size / float(w[:, j].abs().sum())
        length = float(x[:, j].double().square().sum()) ** 0.5
        assert float(score[i, j]) == pytest.approx(relative * length**power, rel=1e-4)


def test_ria_of_all_zero_rows_and_columns_is_zero() -> None:
    w = torch.zeros(3, 4)
    w[0, 0] = 1.0
    score = ria_score(w, torch.ones(4))
    assert score.isfinite().all()
    assert score.count_nonzero() == 1


# -- alpha -----------------------------------------------------------------------------------------


def test_alpha_one_reaches_for_the_dense_models_outputs() -> None:
    """A pruned layer's error is made up for by the next one, as least squares says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12, bias=False), nn.Linear(12, 6, bias=False))
    x = correlated(0, 400, 16)
    dense = x @ model[0].weight.detach().T
    first, last = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    spec = MagnitudeSpec(0.5, refine=PCG(200, 1e-6), alpha=1.0, overrides={"1": 0.0})
    torchprune.sparsify(model, spec, list(x.split(100)), progress=False)
    assert not torch.equal(model[0].weight, first.where(torchprune.masks(model)["0.weight"], 0))
    hidden = (x @ model[0].weight.detach().T).double()
    best = torch.linalg.lstsq(hidden, dense.double() @ last.double().T).solution.T
    torch.testing.assert_close(model[1].weight.detach().double(), best, rtol=1e-2, atol=1e-3)


def test_sparsegpt_takes_alpha_too() -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(16, 12, bias=False), nn.Linear(12, 6, bias=False)
    x = correlated(0, 400, 16)
    target = x @ first.weight.detach().T @ last.weight.detach().T
    missed = {}
    for alpha in (0.0, 1.0):
        model = nn.Sequential(nn.Linear(16, 12, bias=False), nn.Linear(12, 6, bias=False))
        model[0].weight.data, model[1].weight.data = (
            first.weight.data.clone(),
            last.weight.data.clone(),
        )
        spec = SparseGPTSpec(0.5, alpha=alpha, damping=1e-4)
        torchprune.sparsify(model, spec, list(x.split(100)), progress=False)
        missed[alpha] = float((model(x).detach() - target).square().sum())
    assert missed[1.0] < 0.95 * missed[0.0]


# -- specs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WandaSpec(refine="cg"), "refine must be"),
        (lambda: WandaSpec(refine=PCG), "refine must be"),
        (lambda: WandaSpec(alpha=0.5), 'use refine="pcg"'),
        (lambda: ADMMSpec(alpha=1.5), "alpha must be from 0 to 1"),
        (lambda: ADMMSpec(alpha=0.5, sequential="block"), 'needs sequential="layer"'),
        (lambda: WandaSpec(scope="global", refine="pcg", alpha=0.5), 'needs sequential="layer"'),
        (lambda: SparseGPTSpec(reconstruct=True, sequential="none"), 'needs sequential="layer"'),
        (lambda: ADMMSpec(steps=5, ramp=6), "ramp 6 is longer"),
        (lambda: ADMMSpec(ridge=0), "ridge must be above 0"),
        (lambda: PCG(steps=0), "steps must be a whole number above 0"),
        (lambda: PCG(ridge=float("nan")), "ridge must be above 0"),
        (lambda: RIASpec(power=0), "power must be above 0"),
        (lambda: RIASpec(scope="global"), "scope 'global' is not offered"),
        (lambda: WandaSpec(reconstruct="yes"), "reconstruct must be"),
        (lambda: torchprune.Reconstruct(epochs=0), "epochs must be a whole number"),
        (lambda: torchprune.Reconstruct(held_out=2), "held_out must be from 0 to 1"),
        (lambda: torchprune.Reconstruct(step=1), "has no option 'step'"),
        (lambda: MagnitudeSpec(sequential="block"), "this spec needs none"),
    ],
)
def test_contradictions_are_refused(make: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()  # type: ignore[operator]


def test_defaults_follow_what_is_asked() -> None:
    assert SparseGPTSpec(pattern="2:4").sequential == "block"
    assert SparseGPTSpec(pattern="2:4", alpha=0.5).sequential == "layer"
    assert SparseGPTSpec(pattern="2:4", reconstruct=True).sequential == "layer"
    assert not MagnitudeSpec().needs_data
    assert MagnitudeSpec(refine="pcg").needs_data
    assert MagnitudeSpec(scope="global", refine="pcg").sequential == "layer"
    assert WandaSpec(scope="global").sequential == "none"
    assert ADMMSpec().refine == PCG(15)
    assert ADMMSpec(refine=None).refine is None


def test_magnitude_masks_are_the_same_with_and_without_the_refit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6))
    data = [correlated(0, 50, 16)]
    for scope in ("layer", "row", "global"):
        a, b = (nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in "ab")
        for one in (a, b):
            one.load_state_dict(model.state_dict())
        torchprune.sparsify(a, MagnitudeSpec(scope=scope), progress=False)
        torchprune.sparsify(b, MagnitudeSpec(scope=scope, refine="pcg"), data, progress=False)
        for name, mask in torchprune.masks(a).items():
            assert torch.equal(torchprune.masks(b)[name], mask), (scope, name)
        assert not torch.equal(b[0].weight, a[0].weight)


def test_problems_leave_dead_inputs_alone() -> None:
    x = correlated(0, 30, 6, dead=(4,))
    gram = moments_of(x).gram
    assert gram is not None
    problem = problem_of(gram[0], RIDGE)
    assert problem.dead.tolist() == [False] * 4 + [True, False]
    assert problem.matrix.isfinite().all()
    assert bool((torch.linalg.eigvalsh(problem.matrix.double()) > 0.9 * RIDGE).all())


# -- the recommended combination -------------------------------------------------------------------


def test_effort_says_what_the_recommended_combination_is() -> None:
    fast, balanced = BestSpec(pattern="2:4", effort="fast"), BestSpec(0.6)
    assert (fast.alpha, fast.reconstruct, fast.refine) == (0.25, False, PCG(15))
    assert (balanced.alpha, balanced.reconstruct) == (0.0, torchprune.Reconstruct())
    assert BestSpec(effort="max").alpha == 0.25
    assert (BestSpec(effort="max").windows, BestSpec().windows) == (128, 0)
    assert BestSpec(effort="max").reconstruct == torchprune.Reconstruct()
    assert BestSpec(effort="max", reconstruct=torchprune.Reconstruct(2)).reconstruct.epochs == 2
    assert BestSpec(alpha=0.5).alpha == 0.5
    with pytest.raises(SpecError, match="effort 'more' is not understood"):
        BestSpec(effort="more")  # type: ignore[arg-type]


def test_the_recommended_combination_is_what_its_parts_are() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    second = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    second.load_state_dict(first.state_dict())
    data = list(correlated(0, 80, 16).split(20))
    parts = ADMMSpec(0.5, reconstruct=torchprune.Reconstruct())
    torchprune.sparsify(first, BestSpec(0.5), data, progress=False)
    torchprune.sparsify(second, parts, data, progress=False)
    for key, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], tensor), key
