"""The bitmask product against float64, in every form of the kernels that runs here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchprune.errors import LoweringError
from torchprune.lowering.bitmask import SLACK, WORD, Bitmask
from torchprune.lowering.kernels import operators as kernels
from torchprune.lowering.kernels.build import BuildError, library

FORMS = ["AVX-512 BF16", "AVX-512", "AVX2", "portable"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPS = torch.ops.torchprune


def runs_here(form: str) -> bool:
    try:
        kernels.use_form(form)
    except ValueError:
        return False
    return True


@pytest.fixture(autouse=True)
def best_form_afterwards() -> Iterator[None]:
    best = kernels.native().form
    yield
    if best is not None:
        kernels.use_form(best)


def use(form: str) -> None:
    if not runs_here(form):
        pytest.skip(f"{form} does not run on this processor")


def sparse(rows: int, cols: int, share: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Random weights of which about so large a share is zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    weight = torch.where(torch.rand(rows, cols, generator=generator) < share, 0.0, weight)
    return weight.to(dtype)


def product(x: Tensor, packed: Bitmask, bias: Tensor | None = None) -> Tensor:
    found: Tensor = OPS.bitmask_linear(
        x, packed.bits, packed.values, packed.starts, packed.scales, bias, packed.cols
    )
    return found


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in float64."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def assert_product(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Within what float32 sums and one rounding to the output's dtype may cost."""
    expected = exact(x, weight, bias)
    size = x.double().abs() @ weight.double().abs().T
    size = size if bias is None else size + bias.double().abs()
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    unit = torch.finfo(found.dtype).eps
    allowed = expected.abs() * unit + size * 4e-7 * 4 + torch.finfo(found.dtype).smallest_normal
    worst = ((found.double() - expected).abs() - allowed).max() if found.numel() else 0.0
    assert worst <= 0, f"beyond what rounding allows by {worst}"


cases = st.tuples(
    st.integers(1, 40),
    st.integers(1, 200),
    st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 19, 64]),
    st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    st.integers(0, 2**31),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_equal_float64(form: str, dtype: torch.dtype) -> None:
    use(form)

    @settings(max_examples=40)
    @given(cases, st.sampled_from(DTYPES), st.booleans())
    def check(case: tuple[int, int, int, float, int], wide: torch.dtype, biased: bool) -> None:
        rows, cols, batch, share, seed = case
        weight = sparse(rows, cols, share, dtype, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(batch, cols, generator=generator).to(wide)
        bias = torch.randn(rows, generator=generator).to(wide) if biased else None
        found = product(x, Bitmask.pack(weight), bias)
        if form == "portable" and batch > 8:  # torch's product of tiles, rounded as torch does
            like = torch.nn.functional.linear(x, weight.to(wide), bias)
            unit = torch.finfo(wide).eps
            torch.testing.assert_close(found, like, rtol=16 * unit, atol=64 * unit)
        else:
            assert_product(found, x, weight, bias)

    check()


@pytest.mark.parametrize("form", FORMS[:-1])
@pytest.mark.parametrize("kind", [*DTYPES, torch.int8], ids=str)
def test_many_rows_go_by_blocks_of_columns(form: str, kind: torch.dtype) -> None:
    use(form)
    for rows, cols, batch, wide in (
        (6, 513, 300, torch.float32),  # more than a pass of rows, and a block of one word
        (5, 1100, 256, torch.bfloat16),
        (9, 2113, 65, torch.float16),
        (1, 4200, 129, torch.float32),
    ):
        weight = sparse(rows, cols, 0.5, torch.float32, cols)
        x = torch.randn(batch, cols, generator=torch.Generator().manual_seed(batch)).to(wide)
        if kind is torch.int8:
            codes, scales = (20 * weight).round().clamp(-127, 127), torch.rand(rows) + 0.1
            dense = codes.double() * scales.double()[:, None]
            assert_product(product(x, Bitmask.pack(codes.to(kind), scales)), x, dense)
        else:
            assert_product(product(x, Bitmask.pack(weight.to(kind))), x, weight.to(kind))


@pytest.mark.parametrize("form", FORMS)
def test_int8_products_equal_float64(form: str) -> None:
    use(form)

    @settings(max_examples=40)
    @given(cases, st.sampled_from(DTYPES))
    def check(case: tuple[int, int, int, float, int], wide: torch.dtype) -> None:
        rows, cols, batch, share, seed = case
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randint(-127, 128, (rows, cols), generator=generator).to(torch.int8)
        weight[torch.rand(rows, cols, generator=generator) < share] = 0
        scales = torch.rand(rows, generator=generator) + 0.1
        x = torch.randn(batch, cols, generator=generator).to(wide)
        found = product(x, Bitmask.pack(weight, scales))
        dense = weight.double() * scales.double()[:, None]
        if form == "portable" and batch > 8 and wide != torch.float32:
            torch.testing.assert_close(found, exact(x, dense).to(wide), rtol=0.05, atol=1.0)
        else:
            assert_product(found, x, dense)

    check()


INPUTS = {
    "outlier": lambda x: x.index_fill(1, torch.tensor([3]), 3000.0),
    "positive": lambda x: x.abs() + 5.0,
    "spread": lambda x: x * 10.0 ** torch.linspace(-4, 4, x.shape[1]),
    "zero": lambda x: x * 0.0,
    "small": lambda x: x * 6e-5,
    "large": lambda x: x.clamp(-3, 3) * 2e4,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("wide", DTYPES, ids=str)
def test_int8_products_of_one_row_that_is_hard(form: str, kind: str, wide: torch.dtype) -> None:
    """Some forms take 16-bit inputs in fixed point: within 2^-22 of the largest of them."""
    use(form)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (9, 700), generator=generator).to(torch.int8)
    weight[torch.rand(9, 700, generator=generator) < 0.5] = 0
    weight[:4, 3] = 0  # the outlier meets a zero
    weight[8] = 0
    scales = torch.rand(9, generator=generator) / 3000
    x = INPUTS[kind](torch.randn(1, 700, generator=generator)).to(wide)
    found = product(x, Bitmask.pack(weight, scales)).double()
    dense = weight.double() * scales.double()[:, None]
    expected, size = exact(x, dense), dense.abs().sum(1) * float(x.abs().max())
    room = expected.abs() * torch.finfo(wide).eps + size * 2.0**-22 + torch.finfo(wide).tiny
    assert bool(((found - expected).abs() <= room).all())
    assert not found[:, 8].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_an_input_that_is_not_finite_shows(form: str, bad: float) -> None:
    use(form)
    weight = torch.full((2, 70), 3, dtype=torch.int8)
    weight[:, 10:60] = 0
    packed = Bitmask.pack(weight, torch.ones(2))
    for dtype in DTYPES:
        x = torch.ones(1, 70, dtype=dtype)
        x[0, 65] = bad
        assert not product(x, packed).isfinite().any()


@pytest.mark.parametrize("form", FORMS)
def test_int8_rows_of_any_length(form: str) -> None:
    use(form)
    weight = torch.full((1, 3 << 20), 127, dtype=torch.int8)  # too long for sums of 32 bits
    x = torch.full((1, weight.shape[1]), 1 + 2**-6, dtype=torch.bfloat16)
    for cols in (1 << 20, weight.shape[1]):
        found = product(x[:, :cols], Bitmask.pack(weight[:, :cols], torch.ones(1)))
        few_sums = form == "portable"  # millions of terms in each
        assert float(found) == pytest.approx(127.0 * 1.015625 * cols, rel=0.1 if few_sums else 4e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_unpacking_is_exact(form: str, dtype: torch.dtype) -> None:
    use(form)

    @settings(max_examples=60)
    @given(cases)
    def check(case: tuple[int, int, int, float, int]) -> None:
        rows, cols, _, share, seed = case
        if dtype == torch.int8:
            weight = (sparse(rows, cols, share, torch.float32, seed) * 40).to(torch.int8)
            packed = Bitmask.pack(weight, torch.ones(rows))
        else:
            weight = sparse(rows, cols, share, dtype, seed)
            packed = Bitmask.pack(weight)
        packed.check("it", rows=rows)
        found = OPS.bitmask_unpack(packed.bits, packed.values, packed.starts, cols)
        assert found.dtype == dtype
        assert torch.equal(found, weight)

    check()


@given(cases, st.sampled_from(DTYPES))
def test_packing_follows_its_format(
    case: tuple[int, int, int, float, int], dtype: torch.dtype
) -> None:
    rows, cols, _, share, seed = case
    weight = sparse(rows, cols, share, dtype, seed)
    packed = Bitmask.pack(weight)
    words = packed.bits.tolist()
    for r in range(rows):
        for c in range(cols):
            assert bool(words[r][c // WORD] >> (c % WORD) & 1) == bool(weight[r, c] != 0)
    nonzero = weight[weight != 0]
    assert torch.equal(packed.values[: len(nonzero)], nonzero)
    assert packed.values[len(nonzero) :].tolist() == [0] * SLACK
    assert packed.starts.tolist() == [0, *(weight != 0).sum(1).cumsum(0).tolist()]
    assert packed.nbytes == sum(
        t.numel() * t.element_size() for t in (packed.bits, packed.values, packed.starts)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormals_and_extremes_survive(form: str, dtype: torch.dtype) -> None:
    use(form)
    info = torch.finfo(dtype)
    tiny = torch.tensor([info.smallest_normal / 2, -info.smallest_normal / 4], dtype=dtype)
    weight = torch.zeros(3, 70, dtype=dtype)
    weight[0, 3], weight[1, 65], weight[2, 69] = tiny[0], tiny[1], info.max
    packed = Bitmask.pack(weight)
    back = OPS.bitmask_unpack(packed.bits, packed.values, packed.starts, 70)
    assert torch.equal(back, weight)
    x = torch.zeros(1, 70)
    x[0, [3, 65, 69]] = torch.tensor([2.0**20, 2.0**20, 0.5])
    torch.testing.assert_close(product(x, packed).double(), exact(x, weight), rtol=1e-6, atol=0)


def test_negative_zero_is_zero() -> None:
    weight = torch.tensor([[-0.0, 1.0, 0.0]])
    packed = Bitmask.pack(weight)
    assert packed.starts.tolist() == [0, 1]
    assert not packed.unpack().signbit().any()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(LoweringError, match="inf or NaN"):
        Bitmask.pack(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(LoweringError, match=str(dtype)):
        Bitmask.pack(torch.ones(2, 2, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
def test_every_output_is_written_and_nothing_beyond(form: str) -> None:
    """Outputs come from a poisoned pool; neighbours of the values are poison too."""
    use(form)
    for rows, cols, batch in [(1, 1, 1), (5, 63, 3), (7, 65, 8), (3, 130, 1)]:
        weight = sparse(rows, cols, 0.5, torch.float32, 1)
        packed = Bitmask.pack(weight)
        # NaN behind the slack and in it: it may be read, and must not be used.
        packed.values[int(packed.starts[-1]) :] = torch.nan
        x = torch.randn(batch, cols)
        poison = [torch.full((batch, rows), torch.nan) for _ in range(8)]
        del poison
        assert_product(product(x, packed), x, weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_do_not_change_a_bit(form: str, threads: int) -> None:
    use(form)
    packed = Bitmask.pack(sparse(1030, 513, 0.5, torch.bfloat16, 2))
    x = torch.randn(3, 513)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = product(x, packed)
        torch.set_num_threads(threads)
        assert torch.equal(product(x, packed), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_input_does_not_know_of_others(form: str) -> None:
    use(form)
    weight = sparse(33, 150, 0.5, torch.float32, 3)
    packed, x = Bitmask.pack(weight), torch.randn(8, 150)
    for batch in range(1, 9):
        for row, y in zip(x[:batch], product(x[:batch], packed), strict=True):
            torch.testing.assert_close(y, product(row, packed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(150,), (0, 150), (2, 3, 150), (3, 4, 1, 150)])
def test_leading_shapes_are_kept(shape: tuple[int, ...]) -> None:
    weight = sparse(20, 150, 0.5, torch.float32, 4)
    x = torch.randn(shape)
    found = product(x, Bitmask.pack(weight))
    assert found.shape == (*shape[:-1], 20)
    torch.testing.assert_close(found, x @ weight.T, rtol=1e-5, atol=1e-5)


def test_strides_of_the_input_do_not_matter() -> None:
    weight = sparse(20, 64, 0.5, torch.float32, 5)
    packed, x = Bitmask.pack(weight), torch.randn(64, 6)
    torch.testing.assert_close(product(x.T, packed), x.T @ weight.T, rtol=1e-5, atol=1e-5)
    every_other = torch.randn(3, 128)[:, ::2]
    torch.testing.assert_close(
        product(every_other, packed), every_other @ weight.T, rtol=1e-5, atol=1e-5
    )
    one = torch.randn(1, 1).expand(4, 64)
    torch.testing.assert_close(product(one, packed), one @ weight.T, rtol=1e-5, atol=1e-5)


# -- what is wrong is refused ---------------------------------------------------------------------


def test_parts_that_do_not_fit_are_refused() -> None:
    if kernels.native().form is None:
        pytest.skip("the kernels were not compiled")
    packed = Bitmask.pack(sparse(4, 70, 0.5, torch.float32, 6))
    bits, values, starts = packed.bits, packed.values, packed.starts
    x = torch.randn(2, 70)
    for wrong, match in [
        ((torch.randn(2, 71), bits, values, starts, None, None, 70), "last size must be 70"),
        ((x, bits[:, :1], values, starts, None, None, 70), "bits must be"),
        ((x, bits.int(), values, starts, None, None, 70), "bits must be"),
        ((x, bits, values, starts.long(), None, None, 70), "starts must be"),
        ((x, bits, values, starts[1:], None, None, 70), "starts must be"),
        ((x, bits, values[:-SLACK], starts, None, None, 70), "beyond the last nonzero"),
        ((x, bits, values.double(), starts, None, None, 70), "values must be"),
        ((x.double(), bits, values, starts, None, None, 70), "input must be"),
        ((x, bits, values, starts, torch.ones(3), None, 70), "scales must be"),
        ((x, bits, values, starts, None, torch.ones(5), 70), "bias must be"),
    ]:
        with pytest.raises(RuntimeError, match=match):
            OPS.bitmask_linear(*wrong)


@pytest.mark.parametrize("part", ["bits", "values", "starts"])
def test_a_bitmask_that_contradicts_itself_is_seen(part: str) -> None:
    packed = Bitmask.pack(sparse(4, 70, 0.5, torch.float32, 7))
    packed.check("it", rows=4)
    if part == "bits":
        packed.bits[1, 0] ^= 1
    elif part == "starts":
        packed.starts[2] += 1
    else:
        packed = Bitmask(packed.bits, packed.values[:-1], packed.starts, None, 70)
    with pytest.raises(LoweringError, match="contradict"):
        packed.check("it", rows=4)


def test_bits_beyond_the_last_column_are_seen() -> None:
    packed = Bitmask.pack(torch.ones(2, 3))
    packed.bits[0, 0] = 0b1011
    with pytest.raises(LoweringError, match="contradict"):
        packed.check("it", rows=2)


# -- torch sees through ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 8, 20])
def test_opcheck(dtype: torch.dtype, batch: int) -> None:
    packed = Bitmask.pack(sparse(12, 70, 0.5, dtype, 8))
    parts = (packed.bits, packed.values, packed.starts)
    x = torch.randn(batch, 70).to(dtype)
    bias = torch.randn(12).to(dtype)
    torch.library.opcheck(OPS.bitmask_linear.default, (x, *parts, None, bias, 70))
    torch.library.opcheck(OPS.bitmask_linear.default, (x, *parts, torch.ones(12), None, 70))
    torch.library.opcheck(OPS.bitmask_unpack.default, (*parts, 70))


def test_autocast_casts_the_input_as_for_a_linear_layer() -> None:
    weight = sparse(12, 70, 0.5, torch.float32, 9)
    packed, x = Bitmask.pack(weight), torch.randn(2, 70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = product(x, packed)
        like = torch.nn.functional.linear(x, weight)
    assert found.dtype == like.dtype == torch.bfloat16
    torch.testing.assert_close(found, like, rtol=0.02, atol=0.05)


# -- building -------------------------------------------------------------------------------------


def test_the_kernels_were_compiled_here() -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler here: the kernels run in torch, which other tests check")
    assert kernels.native().form in FORMS, str(kernels.native())


def test_the_cache_is_used_again() -> None:
    first = library()
    assert library() == first
    assert first.exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CXX": "no-such-compiler"}, "no-such-compiler"),
        ({"CXX": "false"}, "compiler failed"),
        ({"TORCHPRUNE_CXXFLAGS": "-no-such-flag"}, "no-such-flag"),
    ],
)
def test_a_failing_build_says_why(
    environment: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHPRUNE_KERNELS", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BuildError, match=words):
        library()
    assert not list(tmp_path.iterdir())


WITHOUT = """
import torch, torchprune
from torchprune.lowering.kernels import operators as kernels
from torchprune.lowering.bitmask import Bitmask
torch.manual_seed(0)
weight = torch.randn(20, 70) * (torch.rand(20, 70) < 0.5)
packed, x = Bitmask.pack(weight), torch.randn(3, 70)
y = torch.ops.torchprune.bitmask_linear(
    x, packed.bits, packed.values, packed.starts, None, torch.ones(20), 70)
torch.testing.assert_close(y, x @ weight.T + 1)
assert torch.equal(packed.unpack(), weight)
print(kernels.native())
"""


def test_without_a_compiler_all_is_correct_and_said(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHPRUNE_KERNELS": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "slower, in torch, because CXX names 'no-such-compiler'" in run.stdout
