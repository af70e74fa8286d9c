"""The Triton kernels under Triton's interpreter, on CPU tensors; every address they touch is held
to lie within what they were given.

The interpreter must be chosen before triton is imported: `test_triton_kernels.py` runs this file in
a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contradictions import DAMAGES
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from torchprune.lowering.bitmask import Bitmask
from torchprune.lowering.kernels import launching, operators
from torchprune.lowering.kernels.launching import Tiles

WIDE = [torch.float32, torch.float16, torch.bfloat16]
KINDS = [*WIDE, torch.int8]

# numpy says of inf and NaN what devices do not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def _interpreter() -> Iterator[None]:
    """Kernels take CPU tensors, and the interpreter knows bfloat16 in products of blocks."""
    patch = pytest.MonkeyPatch()
    patch.setattr(launching, "why_not", lambda device: "")
    multiply = InterpreterBuilder.create_dot

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = tl.block_type(tl.float32, list(a.data.shape))
        halves = [
            self.create_fp_ext(t, wide) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)
        ]
        return multiply(self, *halves, *rest)

    patch.setattr(InterpreterBuilder, "create_dot", widened)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="module")
def _bounds(_interpreter: None) -> Iterator[list[int]]:
    """Every address that a kernel reads or writes; how many there were."""
    patch, allowed, seen = pytest.MonkeyPatch(), list[tuple[int, int]](), [0]
    run, load, store = (
        launching._run,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def watched_run(*given: Any, **fixed: Any) -> None:
        tensors = [part for part in given if isinstance(part, Tensor)]
        allowed[:] = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        run(*given, **fixed)

    def look(pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = np.asarray(pointers.data)[np.asarray(mask.data)].astype(np.int64)
        seen[0] += at.size
        inside = np.zeros(at.shape, dtype=bool)
        for begin, end in allowed:
            inside |= (at >= begin) & (at + size <= end)
        assert inside.all(), "a kernel reads or writes what is not its own"

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        look(pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        look(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    patch.setattr(launching, "_run", watched_run)
    patch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
    patch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
    yield seen
    assert seen[0] > 0
    patch.undo()


def sparse(rows: int, cols: int, share: float, dtype: torch.dtype, seed: int) -> Bitmask:
    """Random weights of which about so large a share is zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    weight[torch.rand(rows, cols, generator=generator) < share] = 0.0
    if dtype != torch.int8:
        return Bitmask.pack(weight.to(dtype))
    scales = torch.rand(rows, generator=generator) + 0.1
    return Bitmask.pack((weight * 40).clamp(-127, 127).to(torch.int8), scales)


def dense(it: Bitmask) -> Tensor:
    """The matrix in float64, bit by bit as the format is defined; NaN in rows that are broken."""
    made = torch.zeros(it.rows, it.cols, dtype=torch.float64)
    starts, size = it.starts.tolist(), len(it.values)
    for r, words in enumerate(it.bits.tolist()):
        on = [c for c in range(it.cols) if words[c // 64] >> (c % 64) & 1]
        begin, end = starts[r], starts[r + 1]
        if 0 <= begin <= end <= size and end - begin == len(on):
            made[r, on] = it.values[begin:end].double()
        else:
            made[r] = torch.nan
    return made if it.scales is None else made * it.scales.double()[:, None]


def product(x: Tensor, it: Bitmask, bias: Tensor | None = None, **how: Any) -> Tensor:
    given = (x, it.bits, it.values, it.starts, it.scales, bias, it.cols)
    return launching.product(*given, **how) if how else operators.linear_on_cuda(*given)


def assert_product(
    found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, rough: bool = False
) -> None:
    """Within what float32 sums and one rounding cost; `rough`: the weight was rounded, too."""
    expected, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    unit = torch.finfo(found.dtype).eps
    room = expected.abs() * unit + size * (2 * unit if rough else 2e-6)
    room += torch.finfo(found.dtype).smallest_normal
    assert (found.dtype, found.shape) == (x.dtype, expected.shape)
    lost = weight.isnan().any(1)
    assert found[..., lost].isnan().all()
    worst = ((found.double() - expected).abs() - room)[..., ~lost]
    assert not worst.numel() or float(worst.max()) <= 0


cases = st.tuples(
    st.sampled_from([1, 2, 3, 6, 18]),
    st.integers(1, 140),
    st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    st.sampled_from(KINDS),
    st.integers(0, 2**31),
)


@settings(max_examples=14)
@given(cases, st.integers(0, 17), st.sampled_from(WIDE), st.booleans())
def test_products_equal_float64(case: Any, batch: int, wide: torch.dtype, biased: bool) -> None:
    it, seed = sparse(*case), case[-1]
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, it.cols, generator=generator).to(wide)
    bias = torch.randn(it.rows, generator=generator).to(wide) if biased else None
    assert_product(product(x, it, bias), x, dense(it), bias, rough=batch > launching.MOST)


@settings(max_examples=6)
@given(
    cases,
    st.integers(1, 17),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.sampled_from([(4, 1), (2, 2), (8, 4), (4, 2)]),
    st.sampled_from([2, 4, 16]),
)
def test_any_tiles_give_the_same(
    case: Any, batch: int, wide: torch.dtype, tile: tuple[int, int], together: int
) -> None:
    it = sparse(*case)
    x = torch.randn(batch, it.cols).to(wide)
    blocks = together == 16 and it.values.dtype in (wide, torch.int8)
    rows = 16 if blocks else tile[0]
    steps = 1 + case[-1] % 3
    found = product(x, it, tiles=Tiles(rows, tile[1], 4, together, steps), blocks=blocks)
    assert_product(found, x, dense(it))
    parts = (it.bits, it.values, it.starts, it.cols)
    assert torch.equal(launching.unpacked(*parts, tiles=Tiles(*tile, 4)), Bitmask.unpack(it)) or (
        it.scales is not None
    )


@settings(max_examples=12)
@given(cases)
def test_unpacking_is_exact(case: Any) -> None:
    it = sparse(*case)
    parts = (it.bits, it.values, it.starts, it.cols)
    expected = operators.unpack_in_torch(*parts)
    for unpack in (operators.unpack_on_cuda, operators.unpack_unseen):
        found = unpack(*parts)
        assert found.dtype == it.values.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(100,), (0, 100), (2, 3, 100), (3, 4, 1, 100), (5, 0, 100)])
def test_leading_shapes_are_kept(shape: tuple[int, ...]) -> None:
    it = sparse(20, 100, 0.5, torch.float32, 4)
    x = torch.randn(shape)
    assert_product(product(x, it), x, dense(it))


def test_strides_do_not_matter() -> None:
    it = sparse(20, 64, 0.5, torch.bfloat16, 5)
    for x in (torch.randn(64, 6).T, torch.randn(3, 128)[:, ::2], torch.randn(1, 1).expand(4, 64)):
        assert_product(product(x.bfloat16(), it), x.bfloat16(), dense(it))
    apart = [torch.stack([part, part], -1)[..., 0] for part in (it.bits, it.values, it.starts)]
    spread = Bitmask(*apart, None, 64)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(product(x, spread), product(x, it))


def test_no_columns_give_the_bias() -> None:
    none = torch.zeros(3, 0, dtype=torch.int64), torch.zeros(64), torch.zeros(4).int()
    bias = torch.tensor([1.0, 2.0, 3.0])
    for batch in (1, 4, 20):
        found = operators.linear_on_cuda(torch.zeros(batch, 0), *none, None, bias, 0)
        assert torch.equal(found, bias.expand(batch, 3))
    assert operators.unpack_on_cuda(*none, 0).shape == (3, 0)


def test_an_input_that_is_not_finite_shows() -> None:
    it = sparse(4, 70, 0.5, torch.bfloat16, 6)
    x = torch.ones(1, 70, dtype=torch.bfloat16)
    x[0, 65] = torch.inf
    for batch in (1, 4, 20):
        assert not product(x.expand(batch, 70), it).isfinite().any()


def test_bits_just_beyond_the_last_column_are_nothing() -> None:
    whole = sparse(3, 321, 0.5, torch.bfloat16, 9)
    bits = whole.bits.clone()
    bits[1, -1] |= 2
    check_lost(Bitmask(bits, whole.values, whole.starts, None, 321), 1)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8], ids=str)
def test_damaged_rows_are_lost_and_no_others(damage: str, kind: torch.dtype) -> None:
    whole = sparse(7, 321, 0.5, kind, 8)
    parts = [p.clone() for p in DAMAGES[damage](whole.bits, whole.values, whole.starts)]
    for batch in (3, 17) if kind == torch.int8 else (1, 3):
        check_lost(Bitmask(*parts, whole.scales, 321), batch)


@pytest.mark.parametrize("damage", ["all bits", "no bits", "another bit", "a start next to it"])
def test_parts_of_the_columns_know_of_damage(damage: str) -> None:
    whole = sparse(7, 321, 0.5, torch.bfloat16, 8)
    parts = [p.clone() for p in DAMAGES[damage](whole.bits, whole.values, whole.starts)]
    it, x = Bitmask(*parts, None, 321), torch.randn(2, 321, dtype=torch.bfloat16)
    found = product(x, it, tiles=Tiles(16, 2, 4, 16, 2), blocks=True)  # three parts
    assert_product(found, x, dense(it))


@settings(max_examples=10)
@given(cases, st.data())
def test_random_damage_is_never_read_past(case: Any, data: Any) -> None:
    whole = sparse(*case)
    bits, starts = whole.bits.clone(), whole.starts.clone()
    values = whole.values[: data.draw(st.integers(1, len(whole.values)))].clone()
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(starts) - 1))
        starts[at] = data.draw(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 200))
        bits[at % len(bits), 0] = data.draw(st.integers(-(2**63), 2**63 - 1))
    batch = data.draw(st.sampled_from([1, 3, 17]))
    check_lost(Bitmask(bits, values, starts, whole.scales, whole.cols), batch)


def check_lost(it: Bitmask, batch: int) -> None:
    """Broken rows come out as NaN, the others as they are."""
    weight = dense(it)
    x = torch.randn(batch, it.cols, dtype=torch.bfloat16)
    assert_product(product(x, it), x, weight, rough=batch > launching.MOST)
    plain = Bitmask(it.bits, it.values, it.starts, None, it.cols)
    expected = dense(plain).nan_to_num() if it.scales is not None else dense(plain)
    for unpack in (operators.unpack_on_cuda, operators.unpack_unseen):
        found = unpack(it.bits, it.values, it.starts, it.cols).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
