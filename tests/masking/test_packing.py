"""Packing: every dtype, every shape, every bit pattern comes back as it was."""

from __future__ import annotations

import pytest
import torch
from any_tensors import tensors
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchprune.masking.packing import (
    as_words,
    can_pack,
    clear,
    cleared,
    masked,
    nonzero_bits,
    pack_bits,
    pack_values,
    packed_size,
    padding_is_zero,
    put_values,
    traced_bits,
    unpack_bits,
    unpack_values,
)


def bits_of(tensor: Tensor) -> list[int]:
    return as_words(tensor).tolist()


@given(tensors([torch.bool]))
def test_bits_are_where_the_format_says(mask: Tensor) -> None:
    flat = [bool(x) for x in mask.reshape(-1).tolist()]
    expected = [
        sum(bit << i for i, bit in enumerate(flat[at : at + 8])) for at in range(0, len(flat), 8)
    ]
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    assert len(expected) == packed_size(len(flat))


@given(tensors([torch.bool]))
def test_masks_come_back(mask: Tensor) -> None:
    packed = pack_bits(mask)
    back = unpack_bits(packed, mask.shape)
    assert back.dtype == torch.bool
    assert back.shape == mask.shape
    assert back.is_contiguous()
    assert torch.equal(back, mask)
    assert int(back.view(torch.uint8).amax() if back.numel() else 0) <= 1
    assert padding_is_zero(packed, mask.numel())


@given(tensors(), st.randoms(use_true_random=False))
def test_values_come_back_on_the_mask(tensor: Tensor, random: object) -> None:
    seed = random.getrandbits(32)  # type: ignore[attr-defined]
    mask = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    values = pack_values(tensor, mask)
    assert values.dtype == tensor.dtype
    assert values.shape == (int(mask.sum()),)
    back = unpack_values(values, mask)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    kept = mask.reshape(-1).tolist()
    expected = [word if keep else 0 for word, keep in zip(bits_of(tensor), kept, strict=True)]
    assert bits_of(back) == expected


@given(tensors(), st.randoms(use_true_random=False))
def test_masking_keeps_bits_and_leaves_plain_zeros(tensor: Tensor, random: object) -> None:
    seed = random.getrandbits(32)  # type: ignore[attr-defined]
    mask = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    before = bits_of(tensor)
    found = masked(tensor, mask)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    kept = mask.reshape(-1).tolist()
    assert bits_of(found) == [word if keep else 0 for word, keep in zip(before, kept, strict=True)]
    assert bits_of(tensor) == before


@given(tensors())
def test_nonzero_packing_loses_no_bit(tensor: Tensor) -> None:
    mask = nonzero_bits(tensor)
    assert mask.reshape(-1).tolist() == [word != 0 for word in bits_of(tensor)]
    bits, values = pack_bits(mask), pack_values(tensor, mask)
    back = unpack_values(values, unpack_bits(bits, tensor.shape))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bits_of(back) == bits_of(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_negative_zero_and_nan_payloads_survive(dtype: torch.dtype) -> None:
    quiet = torch.tensor([float("nan")], dtype=dtype)
    payload = (as_words(quiet) | 5).view(dtype)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1.0], dtype=dtype)
    tensor = torch.cat([special, payload, -payload, torch.zeros(9, dtype=dtype)])
    mask = nonzero_bits(tensor)
    assert mask.tolist() == [False, True, True, True, True, True, True] + [False] * 9
    back = unpack_values(pack_values(tensor, mask), mask)
    assert bits_of(back) == bits_of(tensor)
    assert bool(torch.signbit(back[1]))


def test_values_across_chunks_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(1000, dtype=torch.float32)
    mask = torch.rand(1000) < 0.5
    whole = pack_values(tensor, mask)
    monkeypatch.setattr("torchprune.masking.packing._CHUNK", 7)
    assert torch.equal(pack_values(tensor, mask), whole)
    assert torch.equal(whole, tensor[mask])


def test_gradients_are_not_followed() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 4))
    mask = nonzero_bits(weight)
    assert not pack_values(weight, mask).requires_grad


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        (torch.zeros(2, dtype=torch.uint8), (17,)),
        (torch.zeros(3, dtype=torch.uint8), (16,)),
        (torch.zeros(2, dtype=torch.int8), (16,)),
        (torch.zeros(1, 2, dtype=torch.uint8), (16,)),
        (torch.zeros(1, dtype=torch.uint8), (10**9, 10**9)),
    ],
)
def test_wrong_bits_are_refused(bits: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="bits are uint8"):
        unpack_bits(bits, shape)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_wrong_number_of_values_is_refused(count: int) -> None:
    mask = torch.tensor([True, False, True, True])
    with pytest.raises(ValueError, match="3 places"):
        unpack_values(torch.zeros(count), mask)


def test_padding_is_seen() -> None:
    assert padding_is_zero(torch.tensor([0b111], dtype=torch.uint8), 3)
    assert not padding_is_zero(torch.tensor([0b1000], dtype=torch.uint8), 3)
    assert padding_is_zero(torch.tensor([255], dtype=torch.uint8), 8)
    assert padding_is_zero(torch.tensor([], dtype=torch.uint8), 0)


def test_what_cannot_be_packed_says_so() -> None:
    assert can_pack(torch.bfloat16)
    assert not can_pack(torch.complex128)


@given(tensors(), st.randoms(use_true_random=False), st.sampled_from(["as it is", "odd", "turned"]))
def test_clearing_is_masking(tensor: Tensor, random: object, layout: str) -> None:
    seed = random.getrandbits(32)  # type: ignore[attr-defined]
    mask = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    if layout == "odd":  # not where eight bytes begin
        flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        tensor = flat[1:].view(tensor.shape).copy_(tensor)
    elif layout == "turned":
        tensor = tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    before, expected = bits_of(tensor), bits_of(torch.where(mask, tensor, torch.zeros_like(tensor)))
    assert bits_of(cleared(tensor, pack_bits(mask))) == expected
    assert bits_of(tensor) == before
    hidden = pack_values(tensor, ~mask)
    clear(tensor, pack_bits(mask))
    assert bits_of(tensor) == expected
    put_values(tensor, ~mask, hidden)
    assert bits_of(tensor) == before


@given(tensors([torch.bool]))
def test_a_compiler_unpacks_the_same(mask: Tensor) -> None:
    assert torch.equal(traced_bits(pack_bits(mask), mask.shape), mask)
