"""The methods against independent literal implementations, and against brute force."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from by_hand import second_moment
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune.errors import CalibrationError, SpecError
from torchprune.masking.matrices import input_rows, view_of
from torchprune.methods.factor import Factor, factorise
from torchprune.methods.magnitude import magnitude_score
from torchprune.methods.sparsegpt import sparsegpt
from torchprune.methods.wanda import wanda_score
from torchprune.specs.patterns import NM, Block, Pattern, Unstructured

# -- oracles --------------------------------------------------------------------------------------


def wanda_by_the_paper(
    weight: Tensor, x: Tensor, pattern: Pattern, sparsity: float
) -> tuple[Tensor, bool]:
    """|W| * ||X||, a stable sort of every row or of every group of m.

    Written from the paper: the squared norms are means over the batch, summed in float32.

    Returns:
        the mask, True = kept, and whether no two scores at the border are so close that the
        rounding of a sum could decide.
    """
    scaler = torch.zeros(weight.shape[1])
    for count, sequence in enumerate(x):
        scaler *= count / (count + 1)
        scaler += sequence.norm(p=2, dim=0) ** 2 / (count + 1)
    metric = weight.abs() * scaler.sqrt().reshape(1, -1)
    prune = torch.zeros_like(weight, dtype=torch.bool)
    if isinstance(pattern, NM):
        clear = True
        for at in range(0, metric.shape[1], pattern.m):
            group = metric[:, at : at + pattern.m]
            index = at + group.argsort(dim=1, stable=True)[:, : pattern.m - pattern.n]
            prune.scatter_(1, index, True)
            clear = clear and clear_cut(group, pattern.m - pattern.n)
        return ~prune, clear
    count = int(metric.shape[1] * sparsity)
    prune.scatter_(1, metric.sort(dim=-1, stable=True).indices[:, :count], True)
    return ~prune, clear_cut(metric, count)


def clear_cut(metric: Tensor, count: int) -> bool:
    ranked = metric.sort(dim=1).values
    return not 0 < count < metric.shape[1] or bool(
        (ranked[:, count] > ranked[:, count - 1] * (1 + 1e-5)).all()
    )


class SlowSparseGPT:
    """The column sweep in float64, one column after the other, with the whole remainder updated.

    Weights on dead inputs take no part: as many as are asked for go before the sweep begins.

    `closest` is the smallest relative distance between a score that was just pruned and one that
    was just kept: below it, another precision may rightly choose otherwise.
    """

    def __init__(
        self,
        weight: Tensor,
        gram: Tensor,
        rows_seen: int,
        pattern: Pattern,
        sparsity: float,
        scope: str = "layer",
        block_size: int = 128,
        damping: float = 0.01,
    ) -> None:
        hessian = gram.double() * 2 / rows_seen
        dead = hessian.diag() == 0
        live = ~dead
        mean = float(hessian.diag()[live].mean()) if live.any() else 1.0
        hessian[dead, dead] = mean
        hessian += damping * mean * torch.eye(len(hessian), dtype=torch.float64)
        self.upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        self.pattern, self.scope, self.share = pattern, scope, Fraction(str(sparsity))
        self.closest = float("inf")
        self.weight = weight.double().clone()
        self.weight[:, dead] = 0.0
        self.keep = torch.ones_like(weight, dtype=torch.bool)
        self.tall, self.wide = 1, 1
        if isinstance(pattern, Block):
            self.tall, self.wide = pattern.rows, pattern.cols
        self.idle = dead.unflatten(0, (-1, self.wide)).all(1)  # of tiles
        self.first = self._first()
        unit = pattern.m if isinstance(pattern, NM) else self.wide
        self._sweep(-(-block_size // unit) * unit)
        self.weight[:, dead] = (weight.double() * self.keep)[:, dead]

    def _first(self) -> Tensor:
        """Which tiles of dead inputs go: of each row, or of the whole matrix in reading order."""
        rows, cols = len(self.weight) // self.tall, len(self.idle)
        gone = torch.zeros(rows, cols, dtype=torch.bool)
        left = [int(cols * self.share)] * rows
        if self.scope == "layer":
            left = [int(rows * cols * self.share)]
        for row, col in itertools.product(range(rows), range(cols)):
            pool = min(row, len(left) - 1)
            if self.idle[col] and left[pool]:
                gone[row, col], left[pool] = True, left[pool] - 1
        return gone

    def _sweep(self, width: int) -> None:
        cols = self.weight.shape[1]
        for j in range(cols):
            if isinstance(self.pattern, NM):
                if j % self.pattern.m == 0:
                    self._choose_groups(j)
            elif j % width == 0:
                self._choose_block(j, min(j + width, cols))
            pruned = ~self.keep[:, j]
            error = torch.where(pruned, self.weight[:, j], 0) / self.upper[j, j]
            self.weight[:, j:] -= error[:, None] * self.upper[j, j:]
            self.weight[pruned, j] = 0.0

    def _cost(self, start: int, stop: int) -> Tensor:
        diagonal = self.upper.diag()[start:stop]
        return self.weight[:, start:stop] ** 2 / diagonal**2

    def _choose_groups(self, start: int) -> None:
        stop = start + self.pattern.m
        cost = self._cost(start, stop).masked_fill(self.idle[start:stop], -1.0)
        drop = self._lowest(cost, self.pattern.m - self.pattern.n)
        self.keep[:, start:stop] = ~drop

    def _choose_block(self, start: int, stop: int) -> None:
        tall, wide = self.tall, self.wide
        cost = self._cost(start, stop)
        cost = cost.unflatten(1, (-1, wide)).sum(2).unflatten(0, (-1, tall)).sum(1)
        per = 1 if self.scope == "row" else len(cost)
        here = slice(start // wide, stop // wide)
        count = self._until(here.stop, per) - self._until(here.start, per)
        chosen = ~self.idle[here]
        flat = cost[:, chosen] if self.scope == "row" else cost[:, chosen].reshape(1, -1)
        drop = self.first[:, here].clone()
        drop[:, chosen] = self._lowest(flat, count).reshape(len(cost), -1)
        self.keep[:, start:stop] = ~drop.repeat_interleave(tall, 0).repeat_interleave(wide, 1)

    def _until(self, stop: int, per: int) -> int:
        """How many live tiles go before a column: an even share of them, less what dead ones save.

        Of a row, or of the whole matrix.
        """
        usual, every = (
            int(per * int((~self.idle[:at]).sum()) * self.share) for at in (stop, len(self.idle))
        )
        missing = int(per * len(self.idle) * self.share) - int(self.first[:per].sum())
        return usual - (usual * (every - missing) // every if every else 0)

    def _lowest(self, cost: Tensor, count: int) -> Tensor:
        order = cost.argsort(dim=1, stable=True)
        if 0 < count < cost.shape[1]:
            ranked = cost.gather(1, order)
            ranked = ranked[ranked[:, count] >= 0]  # among the dead place decides
            if not len(ranked):
                return torch.zeros_like(cost, dtype=torch.bool).scatter_(1, order[:, :count], True)
            gap = (ranked[:, count] - ranked[:, count - 1]) / ranked[:, count].clamp_min(1e-30)
            self.closest = min(self.closest, float(gap.min()))
        return torch.zeros_like(cost, dtype=torch.bool).scatter_(1, order[:, :count], True)


def layer_error(weight: Tensor, pruned: Tensor, x: Tensor) -> float:
    """||X (W - W')^T||^2 in float64."""
    return float((x.double() @ (weight.double() - pruned.double()).T).square().sum())


def inputs(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Correlated inputs with channels of unlike size."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.eye(cols) + torch.randn(cols, cols, generator=g) / cols**0.5
    scale = torch.exp(0.5 * torch.randn(cols, generator=g))
    return torch.randn(rows, cols, generator=g) @ mixing * scale


def natural_inputs(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Inputs whose spectrum decays like a power, as hidden states do."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(cols, cols, generator=g)).Q
    decay = torch.arange(1.0, cols + 1) ** -1.0
    return torch.randn(rows, cols, generator=g) * decay @ basis


def linear(rows: int, cols: int, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(cols, rows)
    g = torch.Generator().manual_seed(100 + seed)
    layer.weight.data = torch.randn(rows, cols, generator=g)
    return layer


# -- magnitude ------------------------------------------------------------------------------------


def test_magnitude_ranks_by_absolute_value() -> None:
    weight = torch.tensor([[-3.0, 1.0, -2.0, 0.5]])
    assert magnitude_score(weight).tolist() == [[3.0, 1.0, 2.0, 0.5]]
    assert magnitude_score(weight.bfloat16()).dtype == torch.float32


# -- wanda ----------------------------------------------------------------------------------------

WANDA = st.sampled_from(
    [
        (Unstructured(), 0.5),
        (Unstructured(), 0.7),
        (Unstructured(), 0.25),
        (NM(2, 4), 0.5),
        (NM(4, 8), 0.5),
        (NM(1, 4), 0.75),
        (NM(3, 4), 0.25),
    ]
)


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 4), WANDA)
def test_wanda_is_the_papers_rule(
    seed: int, rows: int, eights: int, goal: tuple[Pattern, float]
) -> None:
    pattern, sparsity = goal
    cols = 8 * eights
    x = inputs(24, cols, seed).reshape(4, 6, cols)
    layer = linear(rows, cols, seed)
    oracle, clear = wanda_by_the_paper(layer.weight.detach(), x, pattern, sparsity)
    assume(clear)
    spec = torchprune.WandaSpec(
        pattern=pattern, sparsity=None if isinstance(pattern, NM) else sparsity
    )
    torchprune.sparsify(layer, spec, list(x.split(1)), progress=False)
    assert torch.equal(torchprune.masks(layer)["weight"], oracle)


def test_wanda_is_neither_the_mean_nor_the_square() -> None:
    # Column 0 is rare and large, column 1 common and small: only the L2 norm prefers column 0.
    x = torch.zeros(100, 2)
    x[0, 0], x[:, 1] = 8.0, 0.5  # norms 8 and 5, means 0.08 and 0.5
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[1.0, 1.0]])
    spec = torchprune.WandaSpec(sparsity=0.5)
    torchprune.sparsify(layer, spec, [x], progress=False)
    assert torchprune.masks(layer)["weight"].tolist() == [[True, False]]
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[1.0, 2.0]])  # 8 * 1 < 5 * 2, but 64 * 1 > 25 * 2
    torchprune.sparsify(layer, spec, [x], progress=False)
    assert torchprune.masks(layer)["weight"].tolist() == [[False, True]]


@given(st.integers(0, 10**6), st.sampled_from(["unstructured", "2:4"]), st.integers(-6, 6))
def test_wanda_does_not_see_a_channels_scale(seed: int, pattern: str, power: int) -> None:
    # Powers of two, so that the scaling itself is exact.
    x, layer = inputs(32, 16, seed), linear(6, 16, seed)
    scaled = copy.deepcopy(layer)
    channel = seed % 16
    scaled.weight.data[:, channel] /= 2.0**power
    y = x.clone()
    y[:, channel] *= 2.0**power
    spec = torchprune.WandaSpec(pattern=pattern)
    torchprune.sparsify(layer, spec, [x], progress=False)
    torchprune.sparsify(scaled, spec, [y], progress=False)
    assert torch.equal(torchprune.masks(layer)["weight"], torchprune.masks(scaled)["weight"])


@given(st.integers(0, 10**6), st.sampled_from(["wanda", "sparsegpt", "magnitude"]))
def test_permuting_outputs_permutes_the_pruning(seed: int, method: str) -> None:
    x, layer = inputs(40, 16, seed), linear(8, 16, seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    permuted = copy.deepcopy(layer)
    permuted.weight.data = layer.weight.data[order]
    spec: torchprune.specs.Spec = {
        "wanda": torchprune.WandaSpec(),
        "sparsegpt": torchprune.SparseGPTSpec(scope="row"),
        "magnitude": torchprune.MagnitudeSpec(scope="row"),
    }[method]
    torchprune.sparsify(layer, spec, [x], progress=False)
    torchprune.sparsify(permuted, spec, [x], progress=False)
    mask = torchprune.masks(layer)["weight"]
    assert torch.equal(torchprune.masks(permuted)["weight"], mask[order])
    torch.testing.assert_close(permuted.weight, layer.weight[order], rtol=1e-5, atol=1e-6)


def test_wanda_scores_in_float32_whatever_the_dtype() -> None:
    square = torch.tensor([70000.0**2, 1.0])  # beyond float16
    score = wanda_score(torch.tensor([[1.0, 1.0]], dtype=torch.float16), square)
    assert score.dtype == torch.float32
    assert score.tolist() == [[70000.0, 1.0]]


def test_wanda_in_float16_does_not_overflow_its_squares() -> None:
    layer = linear(4, 8).half()
    dense = layer.weight.detach().float()
    x = (inputs(16, 8) * 300).half()
    x[0, 0] = 6e4
    torchprune.sparsify(layer, torchprune.WandaSpec(), [x], progress=False)
    oracle, clear = wanda_by_the_paper(dense, x.float()[None], Unstructured(), 0.5)
    assert clear
    assert torch.equal(torchprune.masks(layer)["weight"], oracle)


# -- how a layer multiplies -----------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution of any geometry with an input that fits."""
    space = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    several = st.tuples(*[st.integers(1, 3)] * space)
    kernel, dilation = draw(several), draw(st.tuples(*[st.integers(1, 2)] * space))
    padding: object = draw(
        st.one_of(st.just("same"), st.just("valid"), st.tuples(*[st.integers(0, 2)] * space))
    )
    stride = (1,) * space if padding == "same" else draw(several)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1]
    mode = draw(st.sampled_from(["zeros", "replicate"]))
    conv = kind(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=False,
    )
    size = [draw(st.integers(5, 7)) for _ in range(space)]
    lead = draw(st.sampled_from([(), (2,)]))
    seed = draw(st.integers(0, 10**6))
    return conv, torch.randn(
        *lead, conv.in_channels, *size, generator=torch.Generator().manual_seed(seed)
    )


@given(convolutions())
def test_convolutions_read_as_the_matrices_they_multiply_by(case: tuple[nn.Module, Tensor]) -> None:
    conv, x = case
    view = view_of(conv, conv.weight.shape)
    matrix = view.to_matrix(conv.weight)
    assert torch.equal(view.from_matrix(matrix, conv.weight.shape), conv.weight)
    rows = input_rows(conv, x)
    assert [tuple(r.shape[1:]) for r in rows] == [(view.cols,)] * view.groups
    y = torch.stack([r @ m.T for r, m in zip(rows, matrix, strict=True)])  # (groups, places, rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*padding='same' with even kernel")
        expected = conv(x if x.dim() == conv.weight.dim() else x[None])
    batch = expected.shape[0]
    y = y.reshape(view.groups, batch, -1, view.rows).permute(1, 0, 3, 2)
    torch.testing.assert_close(y.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_linear_and_transposed_layers_read_as_the_matrices_they_multiply_by() -> None:
    from transformers.pytorch_utils import Conv1D

    x = torch.randn(2, 3, 6)
    for layer in (nn.Linear(6, 4), Conv1D(4, 6)):
        nn.init.normal_(layer.bias)
        view = view_of(layer, layer.weight.shape)
        (rows,) = input_rows(layer, x)
        (matrix,) = view.to_matrix(layer.weight)
        torch.testing.assert_close((rows @ matrix.T + layer.bias).reshape(2, 3, 4), layer(x))
        assert torch.equal(view.from_matrix(matrix[None], layer.weight.shape), layer.weight)


def test_groups_of_a_convolution_run_along_its_input_channels() -> None:
    conv = nn.Conv2d(16, 6, 3, groups=2)
    x = torch.randn(2, 16, 6, 6)
    torchprune.sparsify(conv, torchprune.WandaSpec(pattern="2:4"), [x], progress=False)
    mask = torchprune.masks(conv)["weight"]  # (6, 8, 3, 3)
    assert set(mask.unflatten(1, (2, 4)).sum(2).flatten().tolist()) == {2}
    energy = F.unfold(x, 3).square().sum((0, 2)).reshape(2, 1, 8, 3, 3).expand(2, 3, 8, 3, 3)
    score = conv.parametrizations.weight.original.detach().abs() * energy.reshape(6, 8, 3, 3).sqrt()
    kept = score.unflatten(1, (2, 4)).argsort(dim=2, stable=True).argsort(dim=2) >= 2
    assert torch.equal(mask, kept.flatten(1, 2))


# -- sparsegpt ------------------------------------------------------------------------------------

GOALS = [
    (Unstructured(), 0.5, "layer"),
    (Unstructured(), 0.7, "layer"),
    (Unstructured(), 0.29, "row"),
    (Unstructured(), 0.5, "row"),
    (NM(2, 4), 0.5, "layer"),
    (NM(4, 8), 0.5, "row"),
    (NM(1, 4), 0.75, "layer"),
    (Block(4, 4), 0.5, "layer"),
    (Block(2, 4), 0.5, "row"),
    (Block(4, 1), 0.7, "layer"),
]


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    fours=st.integers(1, 4),
    cols=st.sampled_from([8, 24, 40, 72, 136]),
    goal=st.sampled_from(GOALS),
    block_size=st.sampled_from([128, 64, 16, 7, 1]),
    dead=st.sampled_from([(), (0,), (1, 5), (0, 1, 2, 3, 4), range(3, 8), range(7), range(8)]),
)
@example(seed=0, fours=2, cols=136, goal=GOALS[0], block_size=128, dead=())
@example(seed=1, fours=2, cols=136, goal=GOALS[4], block_size=128, dead=())
@example(seed=2, fours=2, cols=72, goal=GOALS[5], block_size=7, dead=(1, 5))
@example(seed=3, fours=4, cols=136, goal=GOALS[7], block_size=128, dead=())
@example(seed=4, fours=3, cols=72, goal=GOALS[1], block_size=64, dead=(0, 1, 2, 3, 4))
@example(seed=5, fours=3, cols=72, goal=GOALS[0], block_size=16, dead=range(16, 32))
@example(seed=6, fours=3, cols=72, goal=GOALS[7], block_size=16, dead=range(60))
@example(seed=7, fours=3, cols=72, goal=GOALS[2], block_size=16, dead=range(8, 70, 2))
def test_sparsegpt_is_the_column_sweep(
    seed: int,
    fours: int,
    cols: int,
    goal: tuple[Pattern, float, str],
    block_size: int,
    dead: Sequence[int],
) -> None:
    pattern, sparsity, scope = goal
    x = inputs(2 * cols, cols, seed)
    x[:, list(dead)] = 0.0
    weight = linear(4 * fours, cols, seed).weight.detach()
    gram = second_moment(x)
    oracle = SlowSparseGPT(weight, gram, len(x), pattern, sparsity, scope, block_size)
    assume(oracle.closest > 1e-4)
    factor = factorise(gram, len(x), 0.01, "layer")
    (solved,) = sparsegpt([weight], factor, pattern, sparsity, scope, block_size)
    new, keep, squared = solved.weight, solved.keep, solved.squared
    assert torch.equal(keep, oracle.keep)
    assert new.dtype == torch.float32
    scale = float(weight.abs().max())
    torch.testing.assert_close(new.double(), oracle.weight, rtol=0, atol=2e-4 * scale)
    assert not new[~keep].any()
    lost = layer_error(weight, new, x) * 2 / len(x)
    assert squared == pytest.approx(lost, rel=1e-3, abs=1e-4 * scale**2)


@pytest.mark.parametrize("cols", [5, 37, 129, 131])
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_sparsegpt_on_widths_no_block_divides(cols: int, scope: str) -> None:
    x, weight = inputs(3 * cols, cols, 5), linear(7, cols, 5).weight.detach()
    gram = second_moment(x)
    oracle = SlowSparseGPT(weight, gram, len(x), Unstructured(), 0.6, scope, 32)
    assert oracle.closest > 1e-4, "choose another seed"
    factor = factorise(gram, len(x), 0.01, "layer")
    (solved,) = sparsegpt([weight], factor, Unstructured(), 0.6, scope, 32)
    new, keep = solved.weight, solved.keep
    assert torch.equal(keep, oracle.keep)
    torch.testing.assert_close(new.double(), oracle.weight, rtol=0, atol=1e-3)
    count = 7 * cols * 3 // 5 if scope == "layer" else 7 * (cols * 3 // 5)
    assert int((~keep).sum()) == count


@pytest.mark.parametrize(("pattern", "sparsity", "scope"), GOALS[:8])
def test_sparsegpt_through_sparsify(pattern: Pattern, sparsity: float, scope: str) -> None:
    x, layer = inputs(96, 24, 9), linear(8, 24, 9)
    weight = layer.weight.detach().clone()
    spec = torchprune.SparseGPTSpec(
        pattern=pattern,
        sparsity=None if isinstance(pattern, NM) else sparsity,
        scope=scope,
        block_size=16,
    )
    torchprune.sparsify(layer, spec, list(x.split(32)), progress=False)
    oracle = SlowSparseGPT(weight, second_moment(x), len(x), pattern, sparsity, scope, 16)
    assert oracle.closest > 1e-4, "choose another seed"
    assert torch.equal(torchprune.masks(layer)["weight"], oracle.keep)
    torch.testing.assert_close(layer.weight.double(), oracle.weight, rtol=0, atol=1e-3)
    lost = layer_error(weight, oracle.weight, x) / layer_error(weight, torch.zeros(8, 24), x)
    assert torchprune.report(layer).layers[0].error == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize(("pattern", "sparsity", "scope"), GOALS)
@pytest.mark.parametrize("barring", [False, True])
def test_matrices_solved_together_are_those_solved_alone(
    pattern: Pattern, sparsity: float, scope: str, barring: bool
) -> None:
    x = inputs(96, 24, 2)
    x[:, 5] = 0.0
    weights = [linear(rows, 24, rows).weight.detach() for rows in (8, 4, 12)]
    barred: list[Tensor | None] = [None, None, None]
    if barring:
        barred[1] = torch.zeros(4, 24, dtype=torch.bool)
        barred[1][:, [0, 17]] = True
    factor = factorise(second_moment(x), len(x), 0.01, "layer")
    together = sparsegpt(weights, factor, pattern, sparsity, scope, 16, barred)
    for weight, bar, found in zip(weights, barred, together, strict=True):
        (alone,) = sparsegpt([weight], factor, pattern, sparsity, scope, 16, [bar])
        assert torch.equal(found.keep, alone.keep)
        torch.testing.assert_close(found.weight, alone.weight)
        assert found.squared == pytest.approx(alone.squared, rel=1e-4)


def test_barred_weights_are_pruned_and_their_error_is_spread() -> None:
    x, weight = inputs(64, 12, 3), linear(5, 12, 3).weight.detach()
    barred = torch.zeros(5, 12, dtype=torch.bool)
    barred[:, [2, 3, 9]] = True
    factor = factorise(second_moment(x), len(x), 0.01, "layer")
    for scope in ("layer", "row"):
        keep = sparsegpt([weight], factor, Unstructured(), 0.5, scope, 128, [barred])[0].keep
        assert not (keep & barred).any()
        assert int((~keep).sum()) == 30


# -- brute force on tiny layers -------------------------------------------------------------------


def damped(x: Tensor, damping: float = 0.01) -> Tensor:
    hessian = 2 / len(x) * second_moment(x).double()
    return hessian + damping * hessian.diag().mean() * torch.eye(len(hessian)).double()


def optimum(weight: Tensor, hessian: Tensor, kept: list[int], fixed: list[int]) -> Tensor:
    """The best row with free weights `kept`, `fixed` ones as they were and zeros elsewhere."""
    base = torch.zeros_like(weight)
    base[fixed] = weight[fixed]
    wrong = hessian @ (weight - base)
    base[kept] = torch.linalg.solve(hessian[kept][:, kept], wrong[kept])
    return base


def cost(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    return float((weight - other) @ hessian @ (weight - other))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("prefix", [1, 2, 4])
def test_pruning_a_prefix_of_columns_leaves_the_exact_least_squares_solution(
    seed: int, prefix: int
) -> None:
    # Everything kept lies to the right of everything pruned, so the sweep is the full solution.
    cols = 8
    x, weight = inputs(30, cols, seed), linear(3, cols, seed).weight.detach()
    barred = torch.zeros(3, cols, dtype=torch.bool)
    barred[:, :prefix] = True
    factor = factorise(second_moment(x), len(x), 0.01, "layer")
    (solved,) = sparsegpt([weight], factor, Unstructured(), prefix / cols, "row", 128, [barred])
    new, keep = solved.weight, solved.keep
    assert torch.equal(keep, ~barred)
    hessian = damped(x)
    for before, after in zip(weight.double(), new.double(), strict=True):
        best = optimum(before, hessian, list(range(prefix, cols)), [])
        torch.testing.assert_close(after, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_one_weight_is_pruned_where_the_columns_to_its_right_can_best_make_up(seed: int) -> None:
    cols = 6
    x, weight = inputs(30, cols, seed), linear(1, cols, seed).weight.detach()
    factor = factorise(second_moment(x), len(x), 0.01, "layer")
    new = sparsegpt([weight], factor, Unstructured(), 1 / cols + 1e-9, "row")[0].weight
    row, hessian = weight[0].double(), damped(x)
    rivals = [optimum(row, hessian, list(range(j + 1, cols)), list(range(j))) for j in range(cols)]
    best = min(rivals, key=lambda rival: cost(row, rival, hessian))
    torch.testing.assert_close(new[0].double(), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("method", [torchprune.WandaSpec, torchprune.SparseGPTSpec])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_on_uncorrelated_inputs_no_other_mask_is_better(
    seed: int, method: type[torchprune.WandaSpec], pattern: str
) -> None:
    cols = 8
    g = torch.Generator().manual_seed(seed)
    x = torch.diag(torch.rand(cols, generator=g) * 3 + 0.1)
    layer = linear(2, cols, seed)
    weight = layer.weight.detach().clone()
    torchprune.sparsify(layer, method(pattern=pattern, scope="row"), [x], progress=False)
    for row, mask in zip(weight, torchprune.masks(layer)["weight"], strict=True):
        found = layer_error(row[None], (row * mask)[None], x)
        for kept in itertools.combinations(range(cols), cols // 2):
            other = torch.zeros(cols, dtype=torch.bool)
            other[list(kept)] = True
            if pattern == "2:4" and other[:4].sum() != 2:
                continue
            assert found <= layer_error(row[None], (row * other)[None], x) * (1 + 1e-6)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)])
def test_sparsegpt_lies_between_the_best_refit_and_no_refit(pattern: Pattern) -> None:
    cols, refit, swept, plain = 12, 0.0, 0.0, 0.0
    for seed in range(10):
        x, weight = natural_inputs(60, cols, seed), linear(6, cols, seed).weight.detach()
        factor = factorise(second_moment(x), len(x), 0.01, "layer")
        (solved,) = sparsegpt([weight], factor, pattern, 0.5, "row")
        new, keep = solved.weight, solved.keep
        hessian = damped(x)
        for before, after, mask in zip(weight.double(), new.double(), keep, strict=True):
            best = optimum(before, hessian, mask.nonzero().flatten().tolist(), [])
            assert cost(before, after, hessian) >= cost(before, best, hessian) * (1 - 1e-4)
            refit += cost(before, best, hessian)
            swept += cost(before, after, hessian)
            plain += cost(before, before * mask, hessian)
    assert refit < swept < 0.8 * plain


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", None)]
)
def test_sparsegpt_loses_less_than_wanda(pattern: str, sparsity: float | None) -> None:
    ratios = []
    for seed in range(20):
        x, layer = natural_inputs(128, 32, seed), linear(16, 32, seed)
        dense = layer.weight.detach().clone()
        other = copy.deepcopy(layer)
        one = torchprune.SparseGPTSpec(pattern=pattern, sparsity=sparsity)
        two = torchprune.WandaSpec(pattern=pattern, sparsity=sparsity)
        torchprune.sparsify(layer, one, [x], progress=False)
        torchprune.sparsify(other, two, [x], progress=False)
        lost = layer_error(dense, layer.weight.detach(), x)
        ratios.append(lost / layer_error(dense, other.weight.detach(), x))
    assert sum(ratios) / len(ratios) < 0.8


# -- damping --------------------------------------------------------------------------------------


def degenerate(rows: int = 64, cols: int = 32) -> Tensor:
    """Inputs of rank one: their second moment is singular, in float32 not even semidefinite."""
    g = torch.Generator().manual_seed(4)
    return torch.randn(rows, 1, generator=g) @ torch.randn(1, cols, generator=g)


def inverse_error(factor: Factor, gram: Tensor, rows: int) -> float:
    hessian = gram.double() * 2 / rows
    hessian += factor.damping * hessian.diag().mean() * torch.eye(len(hessian)).double()
    upper = factor.upper.double()
    return float((upper @ hessian @ upper.T - torch.eye(len(hessian))).abs().max())


def test_the_factor_inverts_the_damped_hessian() -> None:
    x = inputs(100, 20)
    factor = factorise(second_moment(x), len(x), 0.01, "layer")
    assert factor.damping == 0.01
    assert torch.equal(factor.upper, factor.upper.triu())
    assert inverse_error(factor, second_moment(x), len(x)) < 1e-4


@pytest.mark.parametrize("cols", [1, 2, 9, 20, 300])
def test_a_factor_made_by_halves_is_the_same(cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = natural_inputs(2 * cols + 3, cols, 1)
    monkeypatch.setattr("torchprune.methods.factor._INVERT_DIRECTLY", 1 << 20)
    whole = factorise(second_moment(x), len(x), 0.01, "layer")
    monkeypatch.setattr("torchprune.methods.factor._INVERT_DIRECTLY", 2)
    halved = factorise(second_moment(x), len(x), 0.01, "layer")
    assert torch.equal(halved.upper, halved.upper.triu())
    torch.testing.assert_close(halved.upper, whole.upper)
    assert inverse_error(halved, second_moment(x), len(x)) < 1e-4


@pytest.mark.parametrize("leaf", [1, 192])
def test_every_part_of_a_factor_can_fail(leaf: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchprune.methods.factor._INVERT_DIRECTLY", leaf)
    for at in range(0, 6, 2):
        gram = torch.eye(6)
        gram[at, at + 1] = gram[at + 1, at] = 5.0  # not positive definite, whatever the damping
        with pytest.raises(CalibrationError, match="could not be factorised"):
            factorise(gram, 1, 0.01, "layer")


def test_a_singular_second_moment_raises_the_damping_and_is_never_the_identity() -> None:
    x = degenerate()
    gram = x.T @ x
    factor = factorise(gram, len(x), 1e-12, "layer")
    assert 1e-12 < factor.damping <= 1e-4
    assert factor.upper.triu(1).abs().max() > 0.01 * factor.upper.diagonal().abs().max()
    assert inverse_error(factor, gram, len(x)) < 1.0  # of the identity it would be about 1e2


def test_raised_damping_is_reported_and_still_solves_the_layer() -> None:
    x, layer = degenerate(), linear(8, 32)
    spec = torchprune.SparseGPTSpec(damping=1e-12)
    torchprune.sparsify(layer, spec, [x], progress=False)
    (found,) = torchprune.report(layer).layers
    assert "damping raised to" in found.note
    assert found.sparsity == 0.5
    assert found.error is not None
    assert found.error < 1e-3  # one direction of inputs: the other weights make up for all


def test_enough_damping_is_not_reported() -> None:
    layer = linear(8, 32)
    torchprune.sparsify(layer, torchprune.SparseGPTSpec(), [inputs(64, 32)], progress=False)
    assert torchprune.report(layer).layers[0].note == ""


def test_what_cannot_be_factorised_names_the_layer() -> None:
    gram = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    with pytest.raises(CalibrationError, match=r"blocks\.3\.up"):
        factorise(gram, 1, 0.01, "blocks.3.up")


def test_dead_inputs_lose_their_weights_and_disturb_nothing() -> None:
    x = inputs(64, 12, 8)
    x[:, [2, 7]] = 0.0
    layer = linear(4, 12, 8)
    torchprune.sparsify(layer, torchprune.SparseGPTSpec(), [x], progress=False)
    assert not layer.weight[:, [2, 7]].any()
    assert int((layer.weight == 0).sum()) == 24
    assert layer.weight.isfinite().all()
    assert int((~torchprune.masks(layer)["weight"]).sum()) == 24


@pytest.mark.parametrize("spec", [torchprune.WandaSpec(), torchprune.SparseGPTSpec()])
def test_all_dead_inputs_still_give_the_exact_count(spec: torchprune.specs.Spec) -> None:
    layer = linear(4, 12)
    torchprune.sparsify(layer, spec, [torch.zeros(5, 12)], progress=False)
    assert int((~torchprune.masks(layer)["weight"]).sum()) == 24


@pytest.mark.parametrize("spec", [torchprune.WandaSpec(), torchprune.SparseGPTSpec()])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
def test_statistics_that_are_not_finite_are_refused(
    spec: torchprune.specs.Spec, bad: float
) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4))
    x = inputs(8, 12)
    x[3, 5] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=r"^0: .*inf or NaN"):
        torchprune.sparsify(model, spec, [x], progress=False)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[2, 2] = float("nan")
    for spec in (torchprune.MagnitudeSpec(), torchprune.WandaSpec(), torchprune.SparseGPTSpec()):
        with pytest.raises(SpecError, match=r"^1: .*1 of 16"):
            torchprune.sparsify(model, spec, [torch.randn(4, 4)], progress=False)
    model[1].weight.data[2, 2] = float("inf")
    with pytest.raises(SpecError, match=r"^1: "):
        torchprune.sparsify(model, torchprune.SparseGPTSpec(), [torch.randn(4, 4)], progress=False)


# -- the order and size of batches ----------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([torchprune.WandaSpec, torchprune.SparseGPTSpec]))
def test_neither_order_nor_size_of_batches_matters(
    seed: int, method: type[torchprune.WandaSpec]
) -> None:
    # Small whole inputs: their sums are exact in float32 whatever the order.
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (24, 16), generator=g).float()
    layer = linear(6, 16, seed)
    results = []
    for batches in ([x], list(x.split(5)), list(x.flip(0).split(8)), list(x[:, None].split(1))):
        other = copy.deepcopy(layer)
        torchprune.sparsify(other, method(), batches, progress=False)
        results.append((torchprune.masks(other)["weight"], other.weight.detach()))
    for mask, weight in results[1:]:
        assert torch.equal(mask, results[0][0])
        assert torch.equal(weight, results[0][1])


@pytest.mark.parametrize(
    "spec",
    [
        torchprune.MagnitudeSpec(scope="global"),
        torchprune.WandaSpec(scope="global"),
        torchprune.WandaSpec(sparsity=0.3, scope="layer"),
        torchprune.SparseGPTSpec(pattern="block:2x4"),
    ],
)
def test_the_same_call_gives_the_same_bits(spec: torchprune.specs.Spec) -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    data = list(inputs(30, 16).split(10))
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    torchprune.sparsify(one, spec, data, progress=False)
    torchprune.sparsify(two, spec, data, progress=False)
    assert list(one.state_dict()) == list(two.state_dict())
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key
