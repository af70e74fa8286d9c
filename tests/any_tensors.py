"""A hypothesis strategy for tensors of any dtype, shape, layout and bits."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int8,
    torch.uint16,
    torch.bool,
]
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.integers(0, 70).map(lambda n: (n,))


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> Tensor:
    """Any bits at all (NaN payloads, -0.0, inf and subnormals among them), in any layout."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(SHAPES)
    count = math.prod(shape)
    seed, zeros = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.0, 0.3, 0.95, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(high, (count, dtype.itemsize), dtype=torch.uint8, generator=generator)
    raw[torch.rand(count, generator=generator) < zeros] = 0
    return _relaid(raw.view(dtype).reshape(shape), draw(st.sampled_from(["plain", "t", "step"])))


def _relaid(tensor: Tensor, layout: str) -> Tensor:
    """The same elements at other strides."""
    if layout == "t" and tensor.dim() >= 2:
        return tensor.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if layout == "step":
        wide = torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)
        return wide[..., 0]
    return tensor
