"""Heads that lie in several parts go from the same places of all, and there are as many parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, tokens
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from structures import close, mask_random_units, outputs
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import HeadSpec, plan_shrink, shrink
from torchprune.graph.groups import structure_of

SIZE = 2
"""Of a head."""


class Parts(nn.Module):
    """Queries, keys and values of some heads of each part, one after the other."""

    def __init__(self, parts: int, each: int, order: str, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.order, self.fused = parts * each, order, fused
        self.parts = [parts]  # no attribute that could be set: as good as a number in the code
        width = self.num_heads * SIZE
        self.qkv = nn.ModuleList(nn.Linear(6, width) for _ in range(1 if fused else 3))
        if fused:
            self.qkv[0] = nn.Linear(6, 3 * width)
        self.o = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        (parts,) = self.parts
        each = self.num_heads // parts
        if self.fused:
            whole = self.qkv[0](x).reshape(b, t, parts, -1).split(each * SIZE, -1)
            named = dict(zip(self.order, whole, strict=True))
        else:
            named = {n: y(x).reshape(b, t, parts, -1) for n, y in zip("qkv", self.qkv, strict=True)}
        q, k, v = (
            named[n].reshape(b, t, parts, each, SIZE).flatten(2, 3).transpose(1, 2) for n in "qkv"
        )
        y = (q @ k.mT).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, self.num_heads * SIZE))


@settings(max_examples=6, deadline=None, phases=[Phase.generate])
@given(
    parts=st.integers(2, 4),
    each=st.integers(2, 4),
    order=st.permutations("qkv"),
    fused=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_same_places_of_all_parts_go(
    parts: int, each: int, order: list[str], fused: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Parts(parts, each, "".join(order), fused).to(dtype).eval()
    x = torch.randn(2, 3, 6, dtype=dtype)
    structure = mask_random_units(model, x, seed)
    (group,) = [g for g in structure.groups if g.kind == "heads"]
    assert group.count == each
    (read,) = [m.units for m in group.members if m.key == "o.weight"]
    assert read.tolist() == torch.arange(each).repeat_interleave(SIZE).repeat(parts).tolist()
    masked = copy.deepcopy(model)
    shrink(model, plan_shrink(model, x))
    assert model.num_heads % parts == 0
    for other in (x, torch.randn(1, 5, 6, dtype=dtype)):
        tolerance = 1e-12 if dtype == torch.float64 else 3e-2
        assert close(outputs(model, other), outputs(masked, other), tolerance)


def test_groups_of_queries_are_no_parts() -> None:
    """Queries of one key cannot go from all groups alone where the key has each group go."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.o = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            b, t, _ = x.shape
            q = self.q(x).view(b, t, -1, 2, SIZE).flatten(2, 3).transpose(1, 2)
            k, v = self.kv(x).view(b, t, -1, 2 * SIZE).transpose(1, 2).chunk(2, -1)
            k, v = (y.repeat_interleave(2, 1) for y in (k, v))
            y = (q @ k.mT).softmax(-1) @ v
            return self.o(y.transpose(1, 2).reshape(b, t, -1))

    (group,) = [
        g for g in structure_of(Grouped().eval(), torch.randn(2, 4, 6)).groups if g.kind == "heads"
    ]
    assert group.count == 3


@pytest.mark.parametrize("heads", sample([8, 12, 16], "8"))
def test_codegen_loses_four_heads_at_a_time(heads: int, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 8 * heads, "n_layer": 2, "n_head": heads, "rotary_dim": 4}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CodeGenConfig(**sizes, **ids, n_positions=64)
    model = transformers.CodeGenForCausalLM(config).eval()
    batch, other = tokens(count=2)
    torchprune.sparsify(model, HeadSpec(0.5), [batch], progress=False)
    masked = copy.deepcopy(model)
    shrink(model, plan_shrink(model, batch))
    left = {block.attn.num_attention_heads for block in model.transformer.h}
    assert left == {heads - heads // 8 * 4}
    torchprune.save(model, tmp_path / "own")
    again = torchprune.load(tmp_path / "own")
    for given_ids in (batch, other[:1, :5]):
        assert close(outputs(model, given_ids), outputs(masked, given_ids), 1e-5)
        assert close(outputs(again, given_ids), outputs(model, given_ids), 0.0)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(batch, **options), masked.generate(batch, **options))
