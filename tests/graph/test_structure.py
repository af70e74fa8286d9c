"""Labels and groups: what goes together, what stays, and why."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cnns import CNNS, awake, image_batches
from families import _DECODER, FAMILIES, llama, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune.graph.components import components
from torchprune.graph.groups import Group, structure_of
from torchprune.graph.labels import Labels, axes_of, collapsed
from torchprune.graph.values import Value, _spans, joined, reshaped


def groups_by_name(model: nn.Module, batch: Any) -> dict[str, Group]:
    return {f"{g.name} {g.kind}": g for g in structure_of(model, batch).groups}


def axes(group: Group) -> set[tuple[str, int]]:
    return {(m.key.removeprefix(group.name + "."), m.axis) for m in group.members}


# -- labels ----------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_components_are_those_of_a_search(count: int, edges: list[tuple[int, int]]) -> None:
    edges = [(a % count, b % count) for a, b in edges]
    one = torch.tensor([a for a, _ in edges], dtype=torch.long)
    two = torch.tensor([b for _, b in edges], dtype=torch.long)
    neighbours: dict[int, set[int]] = {n: {n} for n in range(count)}
    for a, b in edges:
        neighbours[a].add(b)
        neighbours[b].add(a)
    for start in range(count):
        seen, todo = {start}, [start]
        while todo:
            todo += (new := neighbours[todo.pop()] - seen)
            seen |= new
        assert int(components(count, one, two)[start]) == min(seen)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_views_carry_labels_where_elements_go(shape: list[int], chance: random.Random) -> None:
    """The oracle: reshape the labels of a whole tensor literally."""
    labels = Labels()
    count = int(torch.Size(shape).numel())
    flat = torch.arange(count)
    order = [*range(len(shape))]
    chance.shuffle(order)
    merged = [shape[a] for a in order]
    while len(merged) > 1 and chance.random() < 0.5:
        at = chance.randrange(len(merged) - 1)
        merged[at : at + 2] = [merged[at] * merged[at + 1]]
    varying = {a for a in range(len(shape)) if chance.random() < 0.6}
    tag_shape = [n if a in varying else 1 for a, n in enumerate(shape)]
    tag = collapsed(labels.new(int(torch.Size(tag_shape).numel())).reshape(tag_shape))
    value = Value(tuple(shape), (tag,) if axes_of(tag) else ())
    literal = tag.expand(shape).permute(order).reshape(merged)
    found = reshaped(labels, value.permuted(order), merged, "a test")
    whole = found.tags[0].expand(merged) if found.tags else literal.reshape(-1)[0].expand(merged)
    assert torch.equal(whole, literal)
    assert flat.numel() == count


@given(st.lists(st.integers(1, 6), max_size=4), st.randoms(use_true_random=False))
def test_spans_have_equal_products(shape: list[int], chance: random.Random) -> None:
    other = list(shape)
    chance.shuffle(other)
    if len(other) > 1:
        other[:2] = [other[0] * other[1]]
    spans = _spans(shape, other)
    assert [a for s, _ in spans for a in s] == [*range(len(shape))]
    assert [a for _, t in spans for a in t] == [*range(len(other))]
    for sources, targets in spans:
        left = torch.Size([shape[a] for a in sources]).numel()
        assert left == torch.Size([other[a] for a in targets]).numel()


def test_what_is_laid_beside_a_fixed_part_keeps_its_own_labels() -> None:
    labels = Labels()
    own = Value((2, 3), (labels.new(3).reshape(1, 3),))
    whole = joined(labels, [own, Value((2, 2))], 1, "a test")
    assert whole.shape == (2, 5)
    assert whole.tags[0].flatten().tolist() == [*own.tags[0].flatten().tolist(), 0, 0]


def test_heads_stay_whole_and_a_shared_norm_does_not_join_them() -> None:
    labels = Labels()
    heads, shared = labels.new(12).reshape(3, 4), labels.new(4).reshape(1, 4)
    (left,) = labels.merged([heads, shared], "a shared norm")
    assert left.shape == (3, 1)
    resolved = labels.resolve()
    assert len(resolved.classes[heads].unique()) == 3
    assert resolved.frozen[shared].all()
    assert not resolved.frozen[heads].any()


def test_what_goes_leaves_rectangles() -> None:
    labels = Labels()
    grid = labels.watch(labels.new(6).reshape(2, 3))
    classes = labels.resolve().classes[grid]
    assert (classes == classes[:, :1]).all()
    assert classes[0, 0] != classes[1, 0]


# -- groups of models ------------------------------------------------------------------------------


def test_llama_with_grouped_queries() -> None:
    model = llama(num_attention_heads=8, num_key_value_heads=4, head_dim=4)
    found = groups_by_name(model, tokens()[0])
    heads = found["model.layers.0.self_attn heads"]
    assert heads.count == 4
    assert axes(heads) == {
        ("q_proj.weight", 0),
        ("k_proj.weight", 0),
        ("v_proj.weight", 0),
        ("o_proj.weight", 1),
    }
    one = torch.arange(4) == 1
    widths = {m.key.split(".")[-2]: int(m.indices(one).sum()) for m in heads.members}
    assert widths == {"q_proj": 8, "k_proj": 4, "v_proj": 4, "o_proj": 8}
    assert [m.reads for m in heads.members] == [False, False, False, True]
    neurons = found["model.layers.1.mlp neurons"]
    assert neurons.count == 48
    assert axes(neurons) == {
        ("gate_proj.weight", 0),
        ("up_proj.weight", 0),
        ("down_proj.weight", 1),
    }
    assert len(found) == 4


def transformer(name: str, kind: str = "ForCausalLM", **changes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**_DECODER, **changes})
    model: nn.Module = getattr(transformers, f"{name}{kind}")(config).eval()
    return model


def test_fused_projections_are_cut_in_each_part() -> None:
    found = groups_by_name(transformer("Phi3"), tokens()[0])
    up = next(m for m in found["model.layers.0.mlp neurons"].members if "gate_up" in m.key)
    assert up.units.tolist() == [*range(48), *range(48)]
    qkv = next(m for m in found["model.layers.0.self_attn heads"].members if "qkv" in m.key)
    # four query heads of eight, two key heads, two value heads; a unit has half of each
    assert qkv.units.tolist() == [*[0] * 16, *[1] * 16, *[0] * 8, *[1] * 8, *[0] * 8, *[1] * 8]


@pytest.mark.parametrize("name", ["Qwen3", "Gemma2", "Gemma3"])
def test_norms_shared_by_heads_and_rotations_stay(name: str) -> None:
    extra = {} if name != "Gemma3" else {"layer_types": ["full_attention"] * 2}
    structure = structure_of(
        transformer(name, head_dim=8, **extra) if name != "Gemma3" else gemma3(), tokens()[0]
    )
    assert [g.count for g in structure.groups if g.kind == "heads"] == [2, 2]
    frozen = {f.key for f in structure.frozen}
    assert any("inv_freq" in key for key in frozen)
    if name != "Gemma2":
        assert {"model.layers.0.self_attn.q_norm.weight"} <= frozen


def gemma3() -> nn.Module:
    import transformers

    config = transformers.Gemma3TextConfig(**_DECODER, head_dim=8)
    model: nn.Module = transformers.Gemma3ForCausalLM(config).eval()
    return model


def test_one_key_value_head_leaves_query_heads_to_remove() -> None:
    model = transformer("Gemma", head_dim=8, num_key_value_heads=1)
    found = groups_by_name(model, tokens()[0])
    heads = found["model.layers.0.self_attn heads"]
    assert heads.count == 4
    assert axes(heads) == {("q_proj.weight", 0), ("o_proj.weight", 1)}


def test_t5_heads_share_a_bias_and_go_together_in_all_blocks() -> None:
    family = FAMILIES["t5"]
    structure = structure_of(family.make(), family.data()[0])
    heads = next(g for g in structure.groups if g.name == "encoder.block")
    keys = {m.key for m in heads.members}
    assert heads.kind == "heads"
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in keys
    assert {k.split(".")[2] for k in keys} == {"0", "1"}


def test_routed_experts_lose_the_same_neurons() -> None:
    family = FAMILIES["mixtral"]
    found = groups_by_name(family.make(), family.data()[0])
    group = found["model.layers.0.mlp.experts neurons"]
    assert axes(group) == {("gate_up_proj", 1), ("down_proj", 2)}
    frozen = structure_of(family.make(), family.data()[0]).frozen
    assert any(f.key.endswith("mlp.gate.weight") and "softmax" in f.why for f in frozen)


def test_the_residual_stream_is_frozen_by_its_norm_and_the_vocabulary_by_the_output() -> None:
    structure = structure_of(llama(), tokens()[0])
    why = {(f.key, f.axis): f.why for f in structure.frozen}
    assert "aten.mean.dim" in why["model.embed_tokens.weight", 1]
    assert "modeling_llama.py" in why["model.embed_tokens.weight", 1]
    assert why["lm_head.weight", 0] == "it is an output of the model"
    assert "frozen by it is an output of the model: lm_head.weight[0]" in str(structure)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("mobilenet", [8, 32, 32, 12, 48]),
        ("densenet", [8, 6, 6, 6, 10]),
        ("unet", [8, 4, 16, 12, 8]),  # four groups of a group norm
        ("grouped", [8, 4, 4, 6, 20]),  # four places in each group of a convolution
    ],
)
def test_convolutions(name: str, counts: list[int]) -> None:
    structure = structure_of(awake(CNNS[name]()), image_batches()[0])
    assert [g.count for g in structure.groups] == counts


def test_depthwise_and_skips_join_norms_statistics() -> None:
    found = groups_by_name(awake(CNNS["mobilenet"]()), image_batches()[0])
    inner = found["blocks.0 channels"]
    assert {
        ("expand.0.weight", 0),
        ("expand.1.running_var", 0),
        ("depth.0.weight", 0),
        ("depth.1.bias", 0),
        ("project.0.weight", 1),
    } <= axes(inner)
    skip = found["stem.0 channels"]
    assert ("blocks.0.project.0.weight", 0) in {(m.key, m.axis) for m in skip.members}


def test_masks_do_not_hide_the_structure() -> None:
    model = llama()
    before = str(structure_of(model, tokens()[0]))
    torchprune.sparsify(model, torchprune.MagnitudeSpec())
    assert str(structure_of(model, tokens()[0])) == before


class Sorted(nn.Module):
    """A neuron's place decides: sorting freezes the hidden axis."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).topk(6, -1).values)


def test_an_operator_without_a_rule_freezes_what_it_reads() -> None:
    structure = structure_of(Sorted(), torch.randn(2, 4))
    assert structure.groups == []
    why = {(f.key, f.axis): f.why for f in structure.frozen}
    assert why["up.weight", 0].startswith("aten.topk.default at test_structure.py:")


class Chunked(nn.Module):
    """Halves that never meet, but are cut in the middle: their n-th features go together."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.left, self.right = nn.Linear(4, 12), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.up(x).chunk(2, -1)
        return self.left(one.relu()) + self.right(two.sigmoid())


def test_equal_parts_stay_equal() -> None:
    (group,) = structure_of(Chunked(), torch.randn(2, 4)).groups
    assert group.count == 6
    up = next(m for m in group.members if m.key == "up.weight")
    assert up.units.tolist() == [*range(6), *range(6)]


class Packed(nn.Module):
    """Queries, keys and values in one weight, viewed as (3, heads, size)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2))


def test_heads_of_one_packed_weight() -> None:
    (group,) = structure_of(Packed(), torch.randn(2, 5, 16)).groups
    assert (group.kind, group.count) == ("heads", 4)
    qkv = next(m for m in group.members if m.key == "qkv.weight")
    heads = [h for h in range(4) for _ in range(4)]
    assert qkv.units.tolist() == heads * 3


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 0:
            return self.up(x)
        return x


def test_a_model_that_cannot_be_exported_is_told_where_and_what_to_do() -> None:
    with pytest.raises(torchprune.TorchpruneError) as caught:
        torchprune.plan_shrink(Branching(), torch.randn(2, 4))
    text = str(caught.value)
    assert "torch.export cannot capture this Branching at test_structure.py:" in text
    assert "make that line exportable" in text
