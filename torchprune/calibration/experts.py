"""Fused mixture-of-experts weights (transformers): watch what each expert reads.

transformers stacks the experts' weights in 3-D parameters and multiplies them in fused kernels that
no module hook can see. While observed, an experts module runs the same arithmetic expert by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Reach = Callable[[str, list[Tensor]], None]


@contextmanager
def observed(module: nn.Module, reach: Reach) -> Iterator[None]:
    """Call `reach(tensor, inputs)` before each stacked weight is read, while the context is open.

    Args:
        reach: gets the parameter's name and one (tokens, cols) matrix an expert.
    """

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _forward(module, hidden, top_k_index, top_k_weights, reach)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, reach: Reach) -> Tensor:
    count = module.down_proj.shape[0]
    first = "gate_up_proj" if module.has_gate else "up_proj"
    tokens, slots = zip(*(_routed(index, e) for e in range(count)), strict=True)
    inputs = [hidden[t] for t in tokens]
    reach(first, inputs)
    middle = _products(module, first, inputs)
    act = module._apply_gate if module.has_gate else module.act_fn
    middle = [act(x) for x in middle]
    reach("down_proj", middle)
    outputs = _products(module, "down_proj", middle)
    out = torch.zeros_like(hidden)
    for token, slot, y in zip(tokens, slots, outputs, strict=True):
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
    return out


def _routed(index: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Rows (tokens) and columns (slots) of the routing table that chose an expert."""
    token, slot = (index == expert).nonzero(as_tuple=True)
    return token, slot


def _products(module: Any, tensor: str, inputs: list[Tensor]) -> list[Tensor]:
    stacked = getattr(module, tensor)
    if module.is_transposed:
        stacked = stacked.transpose(1, 2)
    bias = getattr(module, f"{tensor}_bias") if module.has_bias else [None] * len(inputs)
    return [F.linear(x, w, b) for x, w, b in zip(inputs, stacked, bias, strict=True)]
