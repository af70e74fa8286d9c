"""Statistics of inputs: exact sums, and tokens that count for less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune import ADMMSpec, MagnitudeSpec, SparseGPTSpec, WandaSpec
from torchprune.calibration.moments import Moments
from torchprune.errors import SpecError
from torchprune.specs.spec import Spec


@pytest.mark.parametrize("cols", [1, 63, 64, 65, 200, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_are_the_sums_of_all_rows(cols: int, dtype: torch.dtype) -> None:
    batches = [torch.randn(rows, cols).to(dtype) for rows in (7, 0, 300)]
    exact = sum(x.double().T @ x.double() for x in batches)
    for gram in (True, False):
        moments = Moments.empty(1, cols, torch.device("cpu"), gram=gram)
        for x in batches:
            moments.add([x])
        moments.finish()
        moments.finish()  # once is enough
        torch.testing.assert_close(moments.square[0].double(), exact.diag(), rtol=1e-5, atol=1e-5)
        assert (moments.rows, moments.batches) == ([307], 3)
        if moments.gram is not None:
            torch.testing.assert_close(moments.gram[0].double(), exact, rtol=1e-4, atol=1e-3)
            assert torch.equal(moments.gram[0], moments.gram[0].T)


def test_moments_of_more_rows_than_are_taken_at_once() -> None:
    x = torch.randint(-2, 3, (20_000, 5)).float()
    for gram in (True, False):
        moments = Moments.empty(1, 5, torch.device("cpu"), gram=gram)
        moments.add([x])
        moments.finish()
        assert torch.equal(moments.square[0], x.square().sum(0))


# -- long tokens ----------------------------------------------------------------------------------


def shortened(x: Tensor, cap: float) -> Tensor:
    """Rows cut to `cap` times the middle one's length, row by row in float64."""
    x = x.double()
    lengths = [float(row @ row) ** 0.5 for row in x]
    limit = cap * sorted(lengths)[(len(x) - 1) // 2]
    rows = [
        row * (limit / length if 0 < limit < length else 1.0)
        for row, length in zip(x, lengths, strict=True)
    ]
    return torch.stack(rows)


def tokens(seed: int, rows: int, cols: int) -> Tensor:
    """Rows of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    return x * torch.randn(rows, 1, generator=generator).mul(2).exp()


@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    cols=st.integers(1, 6),
    cap=st.floats(0.2, 5),
    seed=st.integers(0, 1000),
    gram=st.booleans(),
)
def test_capped_sums_are_those_of_shortened_rows(
    rows: list[int], cols: int, cap: float, seed: int, gram: bool
) -> None:
    batches = [tokens(seed + i, count, cols) for i, count in enumerate(rows)]
    dense = [tokens(seed + 99 + i, count, cols) for i, count in enumerate(rows)]
    device = torch.device("cpu")
    moments = Moments.empty(1, cols, device, gram=gram, total=True, cross=True, cap=cap)
    for x, other in zip(batches, dense, strict=True):
        moments.add([x], dense=[other])
    moments.finish()
    short = [shortened(x, cap) for x in batches]
    exact = sum(x.T @ x for x in short)
    assert isinstance(exact, Tensor)
    torch.testing.assert_close(moments.square[0].double(), exact.diag(), rtol=1e-4, atol=1e-6)
    assert moments.total is not None
    assert moments.cross is not None
    scale = float(exact.diag().max()) ** 0.5 + 1e-6
    total = torch.cat(short).sum(0)
    torch.testing.assert_close(moments.total[0].double(), total, rtol=1e-4, atol=1e-4 * scale)
    shares = [s.norm(dim=1) / x.double().norm(dim=1) for s, x in zip(short, batches, strict=True)]
    pairs = zip(dense, shares, short, strict=True)
    cross = sum((d.double() * share[:, None]).T @ s for d, share, s in pairs)
    torch.testing.assert_close(
        moments.cross[0].double(), cross, rtol=1e-3, atol=1e-3 * float(torch.cat(dense).norm())
    )
    if moments.gram is not None:
        torch.testing.assert_close(
            moments.gram[0].double(), exact, rtol=1e-3, atol=1e-5 * float(exact.diag().max())
        )


def test_where_the_median_row_is_zero_nothing_is_capped() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    moments = Moments.empty(1, 2, torch.device("cpu"), gram=False, cap=1.0)
    moments.add([x])
    assert moments.square.tolist() == [[9.0, 16.0]]


CAPPED: dict[str, Spec] = {
    "wanda": WandaSpec(token_cap=2.0),
    "sparsegpt": SparseGPTSpec(token_cap=2.0),
    "admm": ADMMSpec(token_cap=2.0),
    "swaps": WandaSpec(refine="swaps", token_cap=2.0),
}


@pytest.mark.parametrize("name", CAPPED)
def test_a_long_token_decides_as_a_shortened_one(name: str) -> None:
    capped, free = CAPPED[name], replace(CAPPED[name], token_cap=None)
    x = tokens(1, 40, 16)

    def pruned(spec: Spec, data: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(16, 8)
        torchprune.sparsify(layer, spec, [data], progress=False)
        return [torchprune.masks(layer)["weight"], layer.weight.detach()]

    found = pruned(capped, x)
    for one, other in zip(found, pruned(free, shortened(x, 2.0).float()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert not torch.equal(found[0], pruned(free, x)[0])


class MLP(nn.Module):
    """Its neurons can be put in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.relu(self.up(x)))
        return result


@pytest.mark.parametrize("way", ["module", "program", "allocation", "permute"])
def test_all_statistics_of_a_run_are_capped(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, caps, empty = [torch.randn(5, 8) for _ in range(2)], list[Any](), Moments.empty

    def watched(*args: Any, **kwargs: Any) -> Moments:
        made = empty(*args, **kwargs)
        caps.append(made.cap)
        return made

    monkeypatch.setattr(Moments, "empty", watched)
    model: Any = MLP()
    spec: Spec = WandaSpec(token_cap=3.0)
    if way == "program":
        model = torch.export.export(model, (data[0],))
    elif way == "allocation":
        spec = replace(spec, allocation="owl")
    elif way == "permute":
        spec = WandaSpec(pattern="2:4", permute=True, token_cap=3.0)
    torchprune.sparsify(model, spec, data, progress=False)
    assert len(caps) >= (2 if way in ("module", "program") else 3)
    assert set(caps) == {3.0}


@pytest.mark.parametrize("cap", [0, -1.0, float("nan"), float("inf"), "2", True])
def test_other_caps_are_refused(cap: Any) -> None:
    with pytest.raises(SpecError, match="WandaSpec: token_cap must be above 0"):
        WandaSpec(token_cap=cap)


def test_a_cap_where_nothing_is_calibrated_is_refused() -> None:
    with pytest.raises(SpecError, match=r"MagnitudeSpec: token_cap=2.0 says how calibration goes"):
        MagnitudeSpec(token_cap=2.0)
    assert MagnitudeSpec(refine="pcg", token_cap=2.0).needs_data
