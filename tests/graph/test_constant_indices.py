"""Indices written in the code: what they name, and what lies before it on their side, stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import causal, tokens
from structures import close, mask_random_units, outputs
from torch import Tensor, nn

from torchprune import plan_shrink, shrink
from torchprune.graph.groups import structure_of


class Shared(nn.Module):
    """Queries of 4 heads, and one key and one value for all: fused, at one end or the other."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.size = first, 3
        self.qkv, self.out = nn.Linear(8, 18), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        fused = self.qkv(x).view(b, t, -1, self.size)
        if self.first:
            k, v, q = fused[:, :, [0]], fused[:, :, [1]], fused[:, :, 2:]
        else:
            q, k, v = fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("first", [False, True])
def test_queries_go_and_the_shared_key_stays(first: bool) -> None:
    torch.manual_seed(0)
    model, x = Shared(first).double().eval(), torch.randn(2, 5, 8).double()
    structure = mask_random_units(model, x, alike=True)
    assert [(g.kind, g.count) for g in structure.groups] == [("heads", 4)]
    want = outputs(model, x)
    shrink(model, plan_shrink(model, x))
    assert model.qkv.out_features == 12
    assert close(outputs(model, x), want, 1e-12)


class Picks(nn.Module):
    """Channels that the code counts from the front, from the back, or both."""

    def __init__(self, places: list[int]) -> None:
        super().__init__()
        self.places = places
        self.one, self.two, self.last = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(len(places), 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.two(h) + self.last(h[:, self.places])


@pytest.mark.parametrize(
    ("places", "stay"), [([1, 0], {0, 1}), ([-1], {7}), ([2, -3], {0, 1, 2, 5, 6, 7}), ([7], set())]
)
def test_what_lies_on_the_side_of_an_index_stays(places: list[int], stay: set[int]) -> None:
    torch.manual_seed(0)
    model, x = Picks(places).double().eval(), torch.randn(2, 4).double()
    group = next((g for g in structure_of(model, x).groups if g.name.startswith("one")), None)
    if not stay:  # counted from the front, all
        assert group is None
        return
    rows = next(m.units for m in group.members if m.key == "one.weight")
    assert {place for place, unit in enumerate(rows.tolist()) if unit < 0} == stay
    mask_random_units(model, x)
    want = outputs(model, x)
    shrink(model, plan_shrink(model, x))
    assert model.one.out_features < 8
    assert close(outputs(model, x), want, 1e-12)


@pytest.mark.parametrize(
    ("kind", "heads", "rows"),
    [
        ({"multi_query": True, "bias": True}, 4, 32),  # two queries, key and value
        ({"multi_query": False}, 4, 48),  # three of two heads
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2, 32),  # two, key and value
    ],
)
def test_falcon_s_layouts(kind: dict[str, Any], heads: int, rows: int) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model: Any = causal("Falcon", **sizes, **kind).double().eval()
    batch = {"input_ids": tokens(count=1)[0]}
    structure = mask_random_units(model, batch, alike=True)
    assert [g.count for g in structure.groups if g.kind == "heads"] == [heads]
    want = outputs(model, batch)
    shrink(model, plan_shrink(model, batch))
    attention = model.transformer.h[0].self_attention
    assert attention.query_key_value.weight.shape == (rows, 32)
    assert close(outputs(model, batch), want, 1e-10)
