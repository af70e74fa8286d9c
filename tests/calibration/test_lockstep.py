"""Lockstep calibration against a hand-written loop: what it computes, and how often."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import (
    MODES,
    Spec,
    by_hand,
    groups_for,
    llama_layers,
    prune,
)
from families import FAMILIES, mixtral, tokens
from torch import Tensor, nn

import torchprune
from torchprune import ADMMSpec, Reconstruct, SparseGPTSpec, WandaSpec
from torchprune.calibration.experts import observed
from torchprune.calibration.moments import Moments
from torchprune.masking.projection import project
from torchprune.methods.magnitude import magnitude_score
from torchprune.methods.sparsegpt import sparsegpt
from torchprune.methods.wanda import wanda_score
from torchprune.specs.patterns import Unstructured


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make",
    [
        lambda mode: WandaSpec(sequential=mode),
        lambda mode: WandaSpec(pattern="2:4", sequential=mode),
        lambda mode: WandaSpec(sparsity=0.7, scope="layer", sequential=mode),
        lambda mode: SparseGPTSpec(sequential=mode),
        lambda mode: SparseGPTSpec(pattern="2:4", sequential=mode),
    ],
    ids=["wanda", "wanda-2:4", "wanda-layer", "sparsegpt", "sparsegpt-2:4"],
)
def test_the_flow_is_the_hand_written_loop(make: Callable[[str], Spec], mode: str) -> None:
    spec, data = make(mode), tokens()
    model = FAMILIES["llama"].make()
    other = copy.deepcopy(model)
    prune(model, spec, data)
    expected = by_hand(other, spec, data, groups_for(mode, llama_layers()))
    found = torchprune.masks(model)
    assert found.keys() == expected.keys()
    for name, keep in expected.items():
        assert torch.equal(found[name], keep), name
        layer = name.removesuffix(".weight")
        effective = model.get_submodule(layer).weight
        assert torch.equal(effective, other.get_submodule(layer).weight), name


def test_the_three_modes_differ() -> None:
    made = []
    for mode in MODES:
        model = FAMILIES["llama"].make()
        prune(model, WandaSpec(sequential=mode), tokens())
        made.append(torchprune.masks(model)["model.layers.1.mlp.down_proj.weight"])
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])


# -- what it costs --------------------------------------------------------------------------------


def count_forwards(model: nn.Module) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("method", [WandaSpec, SparseGPTSpec])
def test_every_layer_computes_once_a_batch(method: type[Spec]) -> None:
    model, data = FAMILIES["llama"].make(), tokens(count=4)
    calls = count_forwards(model)
    prune(model, method(sequential="layer"), data)
    # Nobody needs the tail any more; one batch goes on to see whether layers are used again.
    tail = {"model.layers.1.mlp.down_proj": 1, "model.norm": 1, "lm_head": 0}
    assert {name: calls.pop(name, 0) for name in tail} == tail
    for block in llama_layers():
        assert set(block) - tail.keys() <= set(calls)
    assert set(calls.values()) == {4}


@pytest.mark.parametrize(
    "spec",
    [
        ADMMSpec(alpha=0.5),
        ADMMSpec(alpha=0.5, reconstruct=Reconstruct(1)),
        ADMMSpec(alpha=0.5, reconstruct=Reconstruct(1, alpha=0.0)),
        WandaSpec(reconstruct=Reconstruct(1)),
    ],
    ids=["alpha", "alpha and training", "alpha and training alone", "training"],
)
def test_the_dense_stream_ends_where_it_is_wanted_no_more(spec: Spec) -> None:
    model, data = FAMILIES["llama"].make(), tokens(count=4)
    calls = count_forwards(model)
    prune(model, spec, data)
    assert calls["model.embed_tokens"] == 8
    assert calls["model.norm"] == 1
    assert calls["lm_head"] == 0


def test_block_mode_computes_every_block_twice_at_most() -> None:
    model, data = FAMILIES["llama"].make(), tokens(count=4)
    calls = count_forwards(model)
    prune(model, WandaSpec(sequential="block"), data)
    first, last = llama_layers()
    # A dense pass ends where the block's last layer has been reached, once one pass has shown that
    # none is reached after it.
    assert {calls[name] for name in first[:-1]} == {8}
    assert calls[first[-1]] == 5
    assert {calls[name] for name in last[:-1]} == {5}  # one batch goes on
    assert calls[last[-1]] == 1
    assert calls["lm_head"] == 0
    assert calls["model.embed_tokens"] == 4


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_read_the_same_tensor_share_everything(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Moments] = []
    factorised = []
    solved: list[int] = []
    empty, cholesky = Moments.empty, torch.linalg.cholesky_ex

    def counting_empty(*args: Any, **options: Any) -> Moments:
        made.append(empty(*args, **options))
        return made[-1]

    def counting_cholesky(*args: Any, **options: Any) -> Any:
        factorised.append(args)
        return cholesky(*args, **options)

    def counting_solve(weights: Any, *args: Any) -> Any:
        solved.append(len(weights))
        return sparsegpt(weights, *args)

    monkeypatch.setattr(Moments, "empty", staticmethod(counting_empty))
    monkeypatch.setattr(torch.linalg, "cholesky_ex", counting_cholesky)
    monkeypatch.setattr("torchprune.methods.sparsegpt.sparsegpt", counting_solve)
    prune(FAMILIES["llama"].make(), SparseGPTSpec(sequential=mode), tokens(count=3))
    # q, k and v share; o; gate and up share; down: in each of two blocks.
    assert len(made) == len(factorised) == 8
    together = [3, 1, 2, 1]
    # Layer by layer, who reads the same tensor is not known before the first block has shown it.
    assert solved == ([1] * 7 + together if mode == "layer" else together * 2)
    assert {m.batches for m in made} == {3}


class Twins(nn.Module):
    """Two layers that read equal numbers, of which the second's were changed in between."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.one, self.two, self.in_place = nn.Linear(8, 8), nn.Linear(8, 8), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.one(x)
        if self.in_place:
            x[..., :4] *= 100.0
        else:
            x = torch.cat([x[..., :4] * 100.0, x[..., 4:]], -1)
        return y + self.two(x)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_tensor_changed_in_place_is_not_the_same_tensor(in_place: bool, mode: str) -> None:
    model, data = Twins(in_place), list(torch.randn(3, 5, 8))
    other = copy.deepcopy(model)
    spec = WandaSpec(sequential=mode)
    prune(model, spec, data)
    expected = by_hand(other, spec, data, groups_for(mode, [["one", "two"]]))
    for name, keep in expected.items():
        assert torch.equal(torchprune.masks(model)[name], keep), name


# -- experts --------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Experts in a ModuleList; a token goes to the one its first feature names."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0].long()
        x = self.inner(x)
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            out[chosen == number] = self.experts[number](x[chosen == number])
        return out


def routed(*experts: int, rows: int = 6) -> Tensor:
    """A batch whose rows go to the given experts in turn."""
    x = torch.randn(rows, 8)
    x[:, 0] = torch.tensor([experts[i % len(experts)] for i in range(rows)])
    return x


@pytest.mark.parametrize("method", [WandaSpec, SparseGPTSpec])
@pytest.mark.parametrize("mode", MODES)
def test_an_expert_no_batch_reaches_is_pruned_by_magnitude_and_said_so(
    method: type[Spec], mode: str
) -> None:
    model = Experts()
    dense = model.experts[1][0].weight.detach().clone()
    spec = method(sequential=mode, targets="*")
    with pytest.warns(UserWarning, match=r"experts\.1\.\d: no calibration batch reached it") as met:
        prune(model, spec, [routed(0, 2), routed(0), routed(2)])
    assert len(met) == 2
    keep = torchprune.masks(model)["experts.1.0.weight"]
    assert torch.equal(keep, project(magnitude_score(dense), Unstructured(), 0.5, spec.scope or ""))
    assert torch.equal(model.experts[1][0].weight, torch.where(keep, dense, 0))
    report = torchprune.report(model)
    entry = {y.name: y for y in report.layers}["experts.1.0"]
    assert entry.method == "magnitude"
    assert entry.tokens == 0
    assert "no calibration batch reached it" in entry.note
    assert sum("no calibration batch" in w for w in report.warnings) == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_some_batches_reach_uses_those_and_says_so(mode: str) -> None:
    model, data = Experts(), [routed(0, 1), routed(1, 2), routed(0, 2)]
    other = copy.deepcopy(model)
    spec = WandaSpec(sequential=mode, targets="*")
    prune(model, spec, data)
    layers = [["inner"], *([f"experts.{i}.0", f"experts.{i}.2"] for i in range(3))]
    for name, keep in by_hand(other, spec, data, groups_for(mode, layers)).items():
        assert torch.equal(torchprune.masks(model)[name], keep), name
    notes = {y.name: y.note for y in torchprune.report(model).layers}
    assert notes["inner"] == ""
    assert notes["experts.1.0"] == "reached by 2 of 3 batches"
    assert {y.name: y.tokens for y in torchprune.report(model).layers}["experts.2.2"] == 6


class Reversing(nn.Module):
    """Two layers, run in an order the batch chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, backwards: bool) -> Tensor:
        order = (self.two, self.one) if backwards else (self.one, self.two)
        for layer in order:
            x = layer(x)
        return x


def test_batches_that_meet_layers_in_another_order_still_end() -> None:
    model = Reversing()
    one, two = torch.randn(5, 8), torch.randn(5, 8)
    dense = model.one.weight.detach().clone()
    prune(model, WandaSpec(), [(one, False), (two, True)])
    # The first registered is pruned first, on the batch that waits there.
    expected = project(wanda_score(dense, one.square().sum(0)), Unstructured(), 0.5, "row")
    assert torch.equal(torchprune.masks(model)["one.weight"], expected)
    assert set(torchprune.masks(model)) == {"one.weight", "two.weight"}
    assert torchprune.report(model).layers[0].note == "reached by 1 of 2 batches"


def route_to(model: nn.Module, experts: list[int]) -> None:
    """Have every token of a Mixtral's layers go to the same experts."""
    for layer in model.model.layers:
        own = layer.mlp.gate.forward

        def forward(hidden: Tensor, own: Callable[[Tensor], Any] = own) -> Any:
            logits, scores, index = own(hidden)
            return logits, scores, torch.tensor(experts).expand_as(index)

        layer.mlp.gate.forward = forward


@pytest.mark.parametrize("method", [WandaSpec, SparseGPTSpec])
@pytest.mark.parametrize("mode", MODES)
def test_a_fused_expert_no_token_reaches_is_pruned_by_magnitude_and_said_so(
    method: type[Spec], mode: str
) -> None:
    model = FAMILIES["mixtral"].make()
    route_to(model, [0, 2])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    dense = model.get_parameter(name).detach().clone()
    with pytest.warns(UserWarning, match="no tokens reached experts 1, 3"):
        prune(model, method(sequential=mode), tokens())
    keep = torchprune.masks(model)[name]
    by_size = magnitude_score(dense)
    scope = method().scope or ""
    for expert in (1, 3):
        assert torch.equal(keep[expert], project(by_size[expert], Unstructured(), 0.5, scope))
    effective = model.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(effective[[1, 3]], torch.where(keep, dense, 0)[[1, 3]])
    for expert in (0, 2):
        assert not torch.equal(keep[expert], project(by_size[expert], Unstructured(), 0.5, scope))
    entry = {y.name: y for y in torchprune.report(model).layers}[name]
    assert "no tokens reached experts 1, 3: pruned by magnitude" in entry.note
    assert entry.sparsity == 0.5
    if method is WandaSpec:
        assert torch.equal(torchprune.densify(model).get_parameter(name), dense)


def test_fused_experts_see_the_tokens_routed_to_them() -> None:
    data = tokens()
    model = FAMILIES["mixtral"].make()
    other = copy.deepcopy(model)
    prune(model, WandaSpec(), data)
    found = torchprune.masks(model)
    attention = {k: v for k, v in found.items() if k.startswith("model.layers.0.self_attn")}
    torchprune.apply_masks(other, attention)
    experts = other.model.layers[0].mlp.experts
    square = torch.zeros(4, 32)

    def watch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, index = args[:2]
        for expert in range(4):
            square[expert] += hidden[(index == expert).any(1)].square().sum(0)

    experts.register_forward_pre_hook(watch)
    with torch.no_grad():
        for batch in data:
            other(batch)
    for expert in range(4):
        score = wanda_score(experts.gate_up_proj[expert], square[expert])
        keep = project(score, Unstructured(), 0.5, "row")
        assert torch.equal(found["model.layers.0.mlp.experts.gate_up_proj"][expert], keep)


def gpt_oss_experts() -> nn.Module:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts(
        GptOssConfig(
            hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2
        )
    )


@pytest.mark.parametrize(
    ("make", "width"),
    [
        (lambda: mixtral().model.layers[0].mlp.experts, 32),
        (lambda: FAMILIES["qwen2_moe"].build().model.layers[0].mlp.experts, 32),
        (gpt_oss_experts, 16),
    ],
    ids=["mixtral", "qwen2_moe", "gpt_oss"],
)
def test_watched_experts_compute_what_they_compute(
    make: Callable[[], nn.Module], width: int
) -> None:
    experts = make().eval()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden, weights = torch.randn(9, width), torch.rand(9, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        plain = experts(hidden, index, weights)
        with observed(experts, lambda name, xs: seen.update({name: xs})):
            watched = experts(hidden, index, weights)
    torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-5)
    assert set(seen) == {"gate_up_proj", "down_proj"}
    for xs in seen.values():
        assert [len(x) for x in xs] == [int((index == e).sum()) for e in range(4)]
    assert "forward" not in vars(experts)


# -- layers used twice ----------------------------------------------------------------------------


class Shared(nn.Module):
    """One layer used twice on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.same(self.same(x).relu() * 3).relu())


def test_a_layer_used_twice_is_pruned_on_every_use_and_says_so() -> None:
    model, data = Shared(), list(torch.randn(3, 6, 8))
    other = copy.deepcopy(model)
    prune(model, WandaSpec(), data)
    expected = by_hand(other, WandaSpec(), data, [["same"]])
    expected |= by_hand(other, WandaSpec(), data, [["last"]])
    for name, keep in expected.items():
        assert torch.equal(torchprune.masks(model)[name], keep), name
    assert any(
        "same" in note and "more than once" in note and "every use" in note
        for note in torchprune.report(model).notes
    )


def test_without_sequence_a_layer_used_twice_counts_every_use() -> None:
    model, data = Shared(), list(torch.randn(3, 6, 8))
    other = copy.deepcopy(model)
    spec = WandaSpec(sequential="none")
    prune(model, spec, data)
    for name, keep in by_hand(other, spec, data, [["same", "last"]]).items():
        assert torch.equal(torchprune.masks(model)[name], keep), name
    assert any("same" in note and "every use" in note for note in torchprune.report(model).notes)


def test_a_layer_used_once_has_no_such_note() -> None:
    model = FAMILIES["mlp"].make()
    prune(model, WandaSpec(), FAMILIES["mlp"].data())
    assert list(torchprune.report(model).notes) == []
