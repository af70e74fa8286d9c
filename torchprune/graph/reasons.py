"""Operators that must freeze what they read, and why: no rule could do better."""

from __future__ import annotations

from typing import Any

import torch

_VALUES = "how much it gives depends on values, so labels cannot be followed"
_BACKWARD = "part of a backward pass, which a model's forward does not have"
_DRAWN = "what it draws depends on how many numbers it draws"
_FRESH = "it reads no tensor: what it makes has a fixed size"
_SIZE = "it gives a size and no tensor: sizes are constants of the exported graph"

_WHY: dict[str, tuple[str, ...]] = {
    _VALUES: ("nonzero", "nonzero_numpy", "unique", "_unique2", "unique_consecutive", "bincount"),
    "it makes one Python number of a tensor, on which the code may branch": (
        "_local_scalar_dense",
        "item",
    ),
    "the elements of its source are taken one after the other, whatever axes they lie on": (
        "masked_scatter",
        "take",
        "put",
    ),
    "it reads memory by strides, which are others when sizes are": ("as_strided",),
    "it reads every row with every other, over all of both": ("_pdist_forward", "pdist"),
    _DRAWN: (
        *("rand_like", "randn_like", "randint_like", "bernoulli", "normal", "multinomial"),
        *("poisson", "rrelu_with_noise_functional"),
    ),
    _FRESH: ("arange", "rand", "randn", "randint", "randperm", "scalar_tensor", "eye", "linspace"),
    _SIZE: ("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "sym_is_contiguous"),
    "it changes a tensor's memory to another size": ("resize_",),
    _BACKWARD: (
        "_adaptive_avg_pool2d_backward",
        "avg_pool2d_backward",
        "convolution_backward",
        "embedding_dense_backward",
        "max_pool2d_with_indices_backward",
        "native_group_norm_backward",
        "native_layer_norm_backward",
    ),
}

REASONS: dict[Any, str] = {
    getattr(torch.ops.aten, name): why
    for why, names in _WHY.items()
    for name in names
    if hasattr(torch.ops.aten, name)
}
"""Operator -> why what it reads stays."""


def reason_for(target: Any) -> str:
    """Why an operator freezes what it reads; empty if it is not among those that must."""
    return REASONS.get(getattr(target, "overloadpacket", None), "")
