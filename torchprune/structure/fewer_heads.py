"""torch's own attention whose heads are not those that the width of its queries would make.

`nn.MultiheadAttention` computes the size of a head from the width of its queries and the number of
heads, and goes around its own weights where it is fast. Without some heads, or some features of
what it reads or makes, this does not hold, so it becomes a module of the class below: the same
parameters under the same names, the same arguments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune.structure.weight_shape import weight_shape

STATED = ("num_heads", "head_dim", "embed_dim", "kdim", "vdim")
"""Attributes of torch's own attention that its tensors tell."""


class FewerHeads(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` whose heads together are not as wide as `embed_dim`.

    Made by `with_its_heads` of one that lost some, or features; `num_heads` counts those that are
    left, and each is as wide as before; `embed_dim`, `kdim` and `vdim` are the widths of what
    queries, keys and values are made of. What it gives may have another width. Masks for single
    heads, (N * num_heads, L, S), are of these. Averaged attention weights are over these too.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`, in its shapes."""
        if query.is_nested:
            return self._nested(query, key, value, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which is missing")
        batched = query.dim() == 3
        inputs = [x if batched else x.unsqueeze(0) for x in (query, key, value)]
        if batched and not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if hint else self._mask(attn_mask, key_padding_mask, inputs[0])
        mixed, weights = self._attend(inputs, mask, need_weights, hint)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _attend(
        self, inputs: list[Tensor], mask: Tensor | None, need_weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What each head makes, (N, heads, L, head_dim), and with which weights."""
        q, k, v = (self._heads(x) for x in self._projected(inputs))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        if mask is not None and (missing := k.shape[2] - mask.shape[-1]):
            mask = F.pad(mask, (0, missing))  # what was added to the keys is always seen
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        scores = q * math.sqrt(1.0 / q.shape[-1]) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout, training=dropout > 0)
        return weights @ v, weights

    def _projected(self, inputs: list[Tensor]) -> list[Tensor]:
        """(N, length, width of all heads) of queries, keys and values."""
        biases: Any = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        made = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
        for place, bias in ((1, self.bias_k), (2, self.bias_v)):
            if bias is not None:
                more = bias.expand(len(made[place]), 1, -1)
                made[place] = torch.cat([made[place], more], 1)
        return made

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, query: Tensor
    ) -> Tensor | None:
        """What is added to the scores, broadcast to (N, heads, L, S)."""
        masks = []
        if attn_mask is not None:
            shape = (len(query), self.num_heads) if attn_mask.dim() == 3 else (1, 1)
            masks.append(_added(attn_mask, query.dtype).view(*shape, *attn_mask.shape[-2:]))
        if padding is not None:
            masks.append(_added(padding, query.dtype)[:, None, None, :])
        return sum(masks[1:], masks[0]) if masks else None

    def _nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sequences of several lengths, as `nn.TransformerEncoder` hands them on in eval mode."""
        if query is not key or key is not value:
            raise RuntimeError("nested tensors are for self-attention: give one as all three")
        lengths = [len(row) for row in query.unbind()]
        padded = torch.nested.to_padded_tensor(query, 0.0)
        places = torch.arange(padded.shape[1], device=padded.device)
        padding = places >= torch.tensor(lengths, device=padded.device)[:, None]
        x = padded if self.batch_first else padded.transpose(0, 1)
        out, weights = self.forward(x, x, x, padding, need_weights, None, average)
        out = out if self.batch_first else out.transpose(0, 1)
        rows = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows), weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to scores: `True` is for what is not seen."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def with_its_heads(module: nn.Module) -> None:
    """Have torch's own attention say the heads and widths that its tensors have, in place.

    One that lost some becomes a `FewerHeads`: torch's own encoder layers go around a module's
    forward unless its keys and values are said to have widths of their own.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return
    owner: Any = module
    packed = owner.in_proj_weight is not None
    names = ["in_proj_weight"] * 3 if packed else [f"{x}_proj_weight" for x in "qkv"]
    shapes = [weight_shape(module, name) for name in names]
    rows = shapes[0][0] // 3 if packed else shapes[0][0]
    fits = rows == owner.num_heads * owner.head_dim and shapes[0][1] == owner.embed_dim
    owner.num_heads = rows // owner.head_dim
    owner.embed_dim, owner.kdim, owner.vdim = (width for _, width in shapes)
    if not fits:
        owner._qkv_same_embed_dim = False
        owner.__class__ = _with_fewer(type(module), parametrize.is_parametrized(module))


def _with_fewer(kind: type, parametrized: bool) -> type:
    """The class of an attention that counts its heads; a user's own calls it as its parent."""
    if issubclass(kind, FewerHeads):
        return kind
    if parametrized:  # torch put a class of its own, for this module alone, before the real one
        own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        return type(kind.__name__, (_with_fewer(kind.__bases__[0], False),), own)
    return (
        FewerHeads if kind is nn.MultiheadAttention else type(kind.__name__, (kind, FewerHeads), {})
    )
