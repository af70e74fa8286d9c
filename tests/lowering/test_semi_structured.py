"""2:4 weights as semi-structured tensors, as far as a CPU can tell: packing, operator, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from by_hand import assert_as_it_was, fingerprint
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import LoweringError
from torchprune.lowering import few_rows, lower
from torchprune.lowering import semi_structured as two_of_four

CUTLASS = SparseSemiStructuredTensorCUTLASS
DTYPES = [torch.float16, torch.bfloat16]


def weights(rows: int, cols: int, dtype: torch.dtype, seed: int, share: float = 0.0) -> Tensor:
    """A random 2:4 matrix, of which a further share of groups is emptier still."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    order = torch.rand(rows, cols // 4, 4, generator=generator).argsort(-1)
    weight.view(rows, -1, 4).scatter_(-1, order[..., :2], 0.0)
    weight[torch.rand(rows, cols, generator=generator) < share] = -0.0
    return weight.to(dtype)


given_weights = given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 2**31),
)
"""What `weights` may be asked for: tiles of rows and columns, dtype, share, seed."""


@given_weights
def test_packing_loses_no_bit(
    rows: int, cols: int, dtype: torch.dtype, share: float, seed: int
) -> None:
    weight = weights(32 * rows, 64 * cols, dtype, seed, share)
    assert two_of_four.obstacle(weight, CUTLASS) is None
    packed = two_of_four.compress(weight, CUTLASS)
    assert isinstance(packed, CUTLASS)
    assert packed.packed.shape == (32 * rows, 32 * cols)
    assert packed.packed.nbytes + packed.meta.nbytes == two_of_four.compressed_bytes(weight)
    back = two_of_four.decompress(packed)
    assert back.dtype == dtype
    assert torch.equal(back, weight)
    assert not back[weight == 0].signbit().any()


@given(st.integers(0, 31), st.integers(0, 15), st.sampled_from([3, 4]), st.integers(0, 2**31))
def test_one_crowded_group_is_seen(row: int, group: int, nonzeros: int, seed: int) -> None:
    weight = weights(32, 64, torch.float16, seed)
    weight.view(32, 16, 4)[row, group, :nonzeros] = 1.0
    weight.view(32, 16, 4)[row, group, nonzeros:] = 0.0
    why = two_of_four.obstacle(weight, CUTLASS)
    assert why is not None
    assert why.startswith("it is not 2:4: 1 groups of four")
    assert why.endswith(f"in row {row} at column {4 * group}")


@pytest.mark.parametrize(
    ("weight", "kind", "words"),
    [
        (torch.zeros(32, 64), CUTLASS, "float32"),
        (torch.zeros(32, 32).half(), CUTLASS, "no multiple of 32x64, which CUTLASS needs"),
        (
            torch.zeros(8, 16).half(),
            SparseSemiStructuredTensorCUSPARSELT,
            "16x16, which CUSPARSELT",
        ),
        (torch.full((32, 64), torch.inf).half(), CUTLASS, "inf or NaN"),
    ],
)
def test_what_cannot_be_compressed_says_why(weight: Tensor, kind: Any, words: str) -> None:
    assert words in (two_of_four.obstacle(weight, kind) or "")


# -- the operator, with a kernel of our own in place of the GPU's --------------------------------


@pytest.fixture
def reference_kernel() -> Iterator[None]:
    """`semi_structured::cutlass_mm` on the CPU: unpack, multiply, lay out as the GPU's does."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass
    from torch.sparse.semi_structured import _ensure_cutlass_mm_registered

    _ensure_cutlass_mm_registered()
    library = torch.library.Library("semi_structured", "IMPL")

    def multiply(
        dense: Tensor, packed: Tensor, meta: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        weight = sparse_semi_structured_to_dense_cutlass(packed, meta)
        transposed = rest[-1]
        y = weight @ (dense.t() if transposed else dense)
        y = y if bias is None else y + bias.unsqueeze(-1)
        return y.t().contiguous() if transposed else y

    library.impl("cutlass_mm", multiply, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower CPU models as if they were on a GPU without cuSPARSELt."""
    asked = lower._hindrance

    def on_this_device(layer: Any, ties: Any, _: str, **options: Any) -> str | None:
        return asked(layer, ties, "bitmask", **options)

    monkeypatch.setattr(lower, "_hindrance", on_this_device)
    monkeypatch.setattr(two_of_four, "backend", lambda: CUTLASS)


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False), nn.Linear(32, 10)
    )
    model[2].weight.requires_grad_(False)
    return torchprune.sparsify(model.half(), MagnitudeSpec(pattern="2:4"), progress=False)


@pytest.mark.usefixtures("on_cpu", "reference_kernel")
def test_lowered_layers_compute_the_same_and_come_back() -> None:
    model = pruned()
    folded = torchprune.fold(copy.deepcopy(model))
    plan = torchprune.plan_lowering(model, "semi_structured")
    assert [y.name for y in plan.layers] == ["0"]
    assert plan.layers[0].after == round(0.5625 * plan.layers[0].before)
    assert "no multiple of 32x64" in plan.left["2"]
    torchprune.lower(model, "semi_structured")
    assert isinstance(model[0], nn.Linear)
    assert two_of_four.is_semi_structured(model[0].weight)
    assert not model[0].weight.requires_grad
    assert not torchprune.masks(model)
    x = torch.randn(8, 64).half()
    with torch.no_grad():
        torch.testing.assert_close(model(x), folded(x), rtol=1e-2, atol=1e-2)
    other = copy.deepcopy(model)
    torchprune.lift(model)
    for name, tensor in folded.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in folded.parameters()
    ]
    assert torch.equal(torchprune.lift(other)[0].weight, folded[0].weight)


# -- few rows of input, by the bitmask kernels -----------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's bitmask kernels in the place of Triton's."""
    monkeypatch.setattr(few_rows, "has_kernels", lambda _: True)


@given_weights
def test_bits_over_a_weights_own_values_are_the_weight(
    rows: int, cols: int, dtype: torch.dtype, share: float, seed: int
) -> None:
    weight = weights(32 * rows, 64 * cols, dtype, seed, share)
    packed = two_of_four.compress(weight, CUTLASS)
    found = few_rows.parts_of(packed)
    assert found is not None
    assert torch.equal(found.unpack(), weight)
    assert torch.equal(found.values[: packed.packed.numel()], packed.packed.flatten())
    found.check("it", rows=len(weight))
    own = found.nbytes - found.values.nbytes
    assert own == few_rows.bytes_of(weight)


def test_values_that_lie_otherwise_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = two_of_four.compress(weights(32, 64, torch.float16, 1), CUTLASS)
    monkeypatch.setattr(CUTLASS, "values", lambda it: it.packed.flip(0))
    assert few_rows.parts_of(packed) is None
    monkeypatch.setattr(CUTLASS, "values", lambda it: it.packed[1:])
    assert few_rows.parts_of(packed) is None


def lowered_for_few() -> tuple[nn.Sequential, nn.Sequential]:
    model = pruned()
    folded = torchprune.fold(copy.deepcopy(model))
    plan = torchprune.plan_lowering(model, "semi_structured")
    assert "up to 15 rows of input by the bitmask kernels" in str(plan)
    assert 0.625 < plan.layers[0].after / plan.layers[0].before < 0.68
    return torchprune.lower(model, "semi_structured"), folded


@pytest.mark.usefixtures("on_cpu", "reference_kernel", "few")
@pytest.mark.parametrize("shape", [(), (1,), (15,), (3, 5), (16,), (2, 8), (40,), (0,)], ids=str)
def test_rows_choose_the_kernel(shape: tuple[int, ...]) -> None:
    model, folded = lowered_for_few()
    assert isinstance(model[0], few_rows.SemiStructuredLinear)
    x = torch.randn(*shape, 64).half().requires_grad_()
    y = x.detach().clone().requires_grad_()
    with torch.profiler.profile() as profile:
        found = model[0](x)
    ran = [event.name for event in profile.events() if "::" in event.name]
    few = torch.Size(shape).numel() < 16
    assert ("torchprune::bitmask_linear" in ran) is few
    wanted = folded[0](y)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    if few:
        found.sum().backward()
        wanted.sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("on_cpu", "reference_kernel", "few")
def test_what_has_two_ways_is_copied_compiled_and_lifted() -> None:
    model, folded = lowered_for_few()
    x = torch.randn(4, 64).half()
    other = copy.deepcopy(model)
    assert other[0].weight is not model[0].weight
    assert other[0].weight is other[0].__dict__["_torchprune_few_of"]
    assert set(model.state_dict()) == set(folded.state_dict())
    with torch.no_grad():
        expected = folded(x)
        torch.testing.assert_close(other(x), expected, rtol=1e-2, atol=1e-2)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-2, atol=1e-2)
    torchprune.lift(model)
    assert type(model[0]) is nn.Linear
    assert not dict(model.named_buffers())
    for name, tensor in folded.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.usefixtures("on_cpu", "reference_kernel", "few")
def test_another_weight_is_not_read_by_the_bits_of_the_first() -> None:
    model, folded = lowered_for_few()
    fresh = two_of_four.compress(weights(96, 64, torch.float16, 5), CUTLASS)
    model[0]._parameters["weight"] = nn.Parameter(fresh, requires_grad=False)
    x = torch.randn(2, 64).half()
    wanted = nn.functional.linear(x, two_of_four.decompress(fresh), folded[0].bias)
    torch.testing.assert_close(model[0](x), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("on_cpu")
def test_a_weight_that_is_not_2_of_4_is_refused_and_stays() -> None:
    model = torchprune.sparsify(
        nn.Sequential(nn.Linear(64, 32).half()), MagnitudeSpec(), progress=False
    )
    before = fingerprint(model)
    with pytest.raises(LoweringError, match="it is not 2:4"):
        torchprune.lower(model, "semi_structured")
    assert_as_it_was(model, before)


def test_on_a_cpu_it_is_refused_with_the_reason() -> None:
    model = FAMILIES["llama"].make(torch.float16)
    before = fingerprint(model)
    with pytest.raises(LoweringError, match="it is on cpu, and the product is for CUDA devices"):
        torchprune.lower(model, "semi_structured")
    with pytest.raises(LoweringError, match="keeps each weight's dtype"):
        torchprune.lower(model, "semi_structured", dtype=torch.int8)
    assert_as_it_was(model, before)


def test_a_conv1d_of_transformers_is_left() -> None:
    plan = torchprune.plan_lowering(FAMILIES["gpt2"].make(torch.float16), "semi_structured")
    assert any("the other way round" in why for why in plan.left.values())


def test_shapes_on_a_fake_gpu() -> None:
    """What torch would launch on a GPU, traced without one."""
    packed = two_of_four.compress(weights(64, 128, torch.float16, 1), CUTLASS)
    with FakeTensorMode():
        values = torch.empty(packed.packed.shape, dtype=torch.float16, device="cuda")
        meta = torch.empty(packed.meta.shape, dtype=torch.int16, device="cuda")
        fake = CUTLASS(
            torch.Size([64, 128]),
            packed=values,
            meta=meta,
            packed_t=None,
            meta_t=None,
            compressed_swizzled_bitmask=None,
        )
        x = torch.empty(3, 5, 128, dtype=torch.float16, device="cuda")
        y = torch.nn.functional.linear(x, fake)
        assert (y.shape, y.dtype, y.device.type) == ((3, 5, 64), torch.float16, "cuda")


def test_torchs_own_switch_chooses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert two_of_four.backend() is SparseSemiStructuredTensorCUSPARSELT
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    assert two_of_four.backend() is CUTLASS
