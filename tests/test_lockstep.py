"""Lockstep calibration against a hand-written loop, and its behaviour at every edge."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, llama, mixtral, tokens
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec
from torchprune.errors import CalibrationError, SpecError
from torchprune.experts import observed
from torchprune.methods.magnitude import magnitude_score
from torchprune.methods.sparsegpt import factorise, sparsegpt
from torchprune.methods.wanda import wanda_score
from torchprune.moments import Moments
from torchprune.patterns import Unstructured
from torchprune.projection import project

Spec = WandaSpec | SparseGPTSpec
QUIET: dict[str, Any] = {"progress": False}


def prune(model: nn.Module, spec: torchprune.specs.Spec, data: Any = None, **options: Any) -> Any:
    return torchprune.sparsify(model, spec, data, **{**QUIET, **options})


# -- the flow by hand -----------------------------------------------------------------------------


def inputs_of(
    model: nn.Module, names: Iterable[str], data: list[Any], uses: slice = slice(None)
) -> dict[str, list[Tensor]]:
    """Every named layer's inputs, one entry a use, from whole forward passes over all batches."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for batch in data:
        seen: dict[str, list[Tensor]] = defaultdict(list)
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, into=seen[name]: into.append(args[0].detach().clone())
            )
            for name in names
        ]
        with torch.no_grad():
            model(**batch) if isinstance(batch, dict) else model(batch)
        for handle in handles:
            handle.remove()
        for name, xs in seen.items():
            found[name] += xs[uses]
    return found


def by_hand(
    model: nn.Module,
    spec: Spec,
    data: list[Any],
    groups: list[list[str]],
    uses: slice = slice(None),
) -> dict[str, Tensor]:
    """Prune group after group of Linear layers, running the whole model anew for each."""
    kept = {}
    for group in groups:
        kept |= by_hand_from(model, spec, inputs_of(model, group, data, uses))
    return kept


def by_hand_from(model: nn.Module, spec: Spec, found: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Prune Linear layers on these inputs; zeros and new weights go straight into the weights."""
    kept = {}
    for name, xs in found.items():
        weight = model.get_submodule(name).weight
        gram = isinstance(spec, SparseGPTSpec)
        moments = Moments.empty(1, weight.shape[1], weight.device, gram=gram)
        for x in xs:
            moments.add([x.clone().reshape(-1, x.shape[-1])])
        moments.finish()
        pattern, share, scope = spec.goal.pattern, spec.goal.sparsity, spec.scope or ""
        if moments.gram is not None:
            factor = factorise(moments.gram[0], moments.rows[0], spec.damping, name)
            (solved,) = sparsegpt([weight], factor, pattern, share, scope, spec.block_size)
            new, keep = solved.weight, solved.keep
        else:
            keep = project(wanda_score(weight, moments.square[0]), pattern, share, scope)
            new = weight.detach()
        weight.data = torch.where(keep, new.to(weight.dtype), 0)
        kept[f"{name}.weight"] = keep
    return kept


def llama_layers(blocks: int = 2) -> list[list[str]]:
    """A Llama's layers in the order they run, a list for each block."""
    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    mlp = [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    return [[f"model.layers.{i}.{n}" for n in attention + mlp] for i in range(blocks)]


def groups_for(mode: str, layers: list[list[str]]) -> list[list[str]]:
    if mode == "block":
        return layers
    flat = [name for block in layers for name in block]
    return [[name] for name in flat] if mode == "layer" else [flat]


MODES = ["layer", "block", "none"]


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
    tail = ["model.layers.1.mlp.down_proj", "model.norm", "lm_head"]  # nobody needs it any more
    assert {name: calls.pop(name, 0) for name in tail} == dict.fromkeys(tail, 0)
    for block in llama_layers():
        assert set(block) - set(tail) <= set(calls)
    assert set(calls.values()) == {4}


def test_block_mode_computes_every_block_twice_at_most() -> None:
    model, data = FAMILIES["llama"].make(), tokens(count=4)
    calls = count_forwards(model)
    prune(model, WandaSpec(sequential="block"), data)
    first, last = llama_layers()
    # A dense pass ends where the block's last layer has been reached.
    assert {calls[name] for name in first[:-1]} == {8}
    assert calls[first[-1]] == 4
    assert {calls[name] for name in last[:-1]} == {4}
    assert calls[last[-1]] == calls["lm_head"] == 0
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
    monkeypatch.setattr("torchprune.decide.sparsegpt", counting_solve)
    prune(FAMILIES["llama"].make(), SparseGPTSpec(sequential=mode), tokens(count=3))
    # q, k and v share; o; gate and up share; down: in each of two blocks.
    assert len(made) == len(factorised) == 8
    if mode != "layer":  # layer by layer, the next one that reads the same tensor is not yet known
        assert solved == [3, 1, 2, 1] * 2
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
        with observed(experts, lambda name, xs: seen.update({name: xs}), lambda shape: None):
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


def test_a_layer_used_twice_is_pruned_on_its_first_use_and_says_so() -> None:
    model, data = Shared(), list(torch.randn(3, 6, 8))
    other = copy.deepcopy(model)
    prune(model, WandaSpec(), data)
    expected = by_hand(other, WandaSpec(), data, [["same"]], slice(0, 1))
    expected |= by_hand(other, WandaSpec(), data, [["last"]])
    for name, keep in expected.items():
        assert torch.equal(torchprune.masks(model)[name], keep), name
    assert any(
        "same" in note and "more than once" in note and "the first" in note
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


# -- what a forward pass may switch for its thread ------------------------------------------------


class Within(nn.Module):
    """A repeated stack that runs inside a context of its own."""

    def __init__(self, context: Callable[[], Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(2)
        )
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            for block in self.blocks:
                x = block(x)
        return x


CONTEXTS = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("cpu"),
}


def modes_now() -> tuple[object, ...]:
    from torch.overrides import _get_current_function_mode_stack

    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_float32_matmul_precision(),
        torch.backends.mha.get_fastpath_enabled(),
        len(_get_current_function_mode_stack()),
    )


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", [WandaSpec, SparseGPTSpec])
def test_contexts_inside_the_forward_pass(context: str, mode: str, method: type[Spec]) -> None:
    model, data = Within(CONTEXTS[context]), list(torch.randn(3, 6, 8))
    other = copy.deepcopy(model)
    spec, before = method(sequential=mode), modes_now()
    prune(model, spec, data)
    assert modes_now() == before
    layers = [[f"blocks.{i}.0", f"blocks.{i}.2"] for i in range(2)]
    for name, keep in by_hand(other, spec, data, groups_for(mode, layers)).items():
        assert torch.equal(torchprune.masks(model)[name], keep), name
    for mask in torchprune.masks(model).values():
        assert not mask.is_inference()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("method", [WandaSpec, SparseGPTSpec])
def test_contexts_around_the_call(context: str, method: type[Spec]) -> None:
    model, data = FAMILIES["mlp"].make(), FAMILIES["mlp"].data()
    other = copy.deepcopy(model)
    with CONTEXTS[context]():
        before = modes_now()
        prune(model, method(), data)
        assert modes_now() == before
    expected: dict[str, Tensor] = {}
    for layer in ("0", "2", "4"):  # a context for each: autocast remembers the weights it has cast
        with CONTEXTS[context]():
            found = inputs_of(other, [layer], data)
        expected |= by_hand_from(other, method(), found)
    for name, mask in expected.items():
        assert torch.equal(torchprune.masks(model)[name], mask), name
    model(data[0]).sum().backward()  # neither masks nor weights are inference tensors
    assert model[0].parametrizations.weight.original.grad.any()


# -- errors and what they leave behind ------------------------------------------------------------


class BoomError(Exception):
    pass


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything a failed call must leave as it was."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "keys": list(model.state_dict()),
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "training": [m.training for m in model.modules()],
        "classes": [type(m).__qualname__ for m in model.modules()],
        "hooks": [
            (len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m))
            for m in model.modules()
        ],
        "use_cache": getattr(getattr(model, "config", None), "use_cache", None),
        "modes": modes_now(),
    }


def assert_as_it_was(model: nn.Module, before: dict[str, Any]) -> None:
    now = fingerprint(model)
    for key, value in before.pop("state").items():
        assert torch.equal(now["state"][key].view(torch.uint8), value.view(torch.uint8)), key
    now.pop("state")
    assert now == before


def mixed_flags(model: nn.Module) -> None:
    """A training flag of its own for every module."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 1


def raise_at(module: nn.Module, call: int, error: BaseException) -> None:
    calls = iter(range(10**6))

    def hook(*_: object) -> None:
        if next(calls) == call:
            raise error

    module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("place", ["model.layers.0.self_attn", "model.layers.1.mlp.up_proj"])
@pytest.mark.parametrize("call", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", [WandaSpec, SparseGPTSpec])
def test_an_error_of_the_model_leaves_it_as_it_was(
    place: str, call: int, mode: str, method: type[Spec]
) -> None:
    model = FAMILIES["llama"].make()
    mixed_flags(model)
    raise_at(model.get_submodule(place), call, BoomError("of the model"))
    before = fingerprint(model)
    assert before["use_cache"] is True
    with pytest.raises(BoomError, match="of the model"):
        prune(model, method(sequential=mode), tokens())
    assert_as_it_was(model, before)
    prune(model, method(sequential=mode), tokens())  # and the same model can be pruned after it
    assert torchprune.report(model).sparsity == 0.5


@pytest.mark.parametrize("mode", MODES)
def test_an_error_behind_fused_experts(mode: str) -> None:
    model = FAMILIES["mixtral"].make()
    raise_at(model.model.layers[1].input_layernorm, 1, BoomError())
    before = fingerprint(model)
    with pytest.raises(BoomError):
        prune(model, WandaSpec(sequential=mode), tokens())
    assert_as_it_was(model, before)


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    model = FAMILIES["mlp"].make()
    raise_at(model[2], 1, KeyboardInterrupt())
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        prune(model, WandaSpec(), FAMILIES["mlp"].data())
    assert_as_it_was(model, before)


@pytest.mark.parametrize("first", [MagnitudeSpec(sparsity=0.25), SparseGPTSpec(sparsity=0.25)])
def test_an_error_in_a_second_pruning_leaves_the_first(first: torchprune.specs.Spec) -> None:
    model, data = FAMILIES["mlp"].make(), FAMILIES["mlp"].data()
    prune(model, first, data, keep_dense=True)
    raise_at(model[4], 1, BoomError())
    before, report = fingerprint(model), torchprune.report(model).to_dict()
    with pytest.raises(BoomError):
        prune(model, SparseGPTSpec(sparsity=0.5), data)
    assert_as_it_was(model, before)
    assert torchprune.report(model).to_dict() == report


def test_an_error_of_the_data_is_the_datas_own() -> None:
    model = FAMILIES["mlp"].make()
    before = fingerprint(model)

    def data() -> Iterator[Tensor]:
        yield torch.randn(2, 16)
        raise BoomError("of the data")

    with pytest.raises(BoomError, match="of the data"):
        prune(model, WandaSpec(), data())
    assert_as_it_was(model, before)


def test_success_leaves_flags_hooks_and_settings_too() -> None:
    model = FAMILIES["llama"].make()
    mixed_flags(model)
    before = fingerprint(model)
    prune(model, SparseGPTSpec(), tokens())
    torchprune.fold(model)
    now = fingerprint(model)
    for what in ("hooks", "use_cache", "modes", "training", "keys", "parameters", "classes"):
        assert now[what] == before[what], what


def test_dropout_is_off_while_calibrating() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.9), nn.Linear(8, 4)).train()
    other = copy.deepcopy(model).eval()
    data = list(torch.randn(2, 6, 8))
    prune(model, WandaSpec(), data)
    prune(other, WandaSpec(), data)
    assert torch.equal(torchprune.masks(model)["2.weight"], torchprune.masks(other)["2.weight"])
    assert model[1].training


# -- data -----------------------------------------------------------------------------------------


class Keyed(nn.Module):
    """A model that takes its inputs by position or by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.two(self.one(x if shift is None else x + shift).relu())


def test_batches_come_in_any_form() -> None:
    from transformers import BatchEncoding

    xs, shift = torch.randn(3, 4, 8), torch.ones(8)
    forms: dict[str, list[Any]] = {
        "tensor": [x + shift for x in xs],
        "tuple": [(x, shift) for x in xs],
        "list": [[x, shift] for x in xs],
        "dict": [{"x": x, "shift": shift} for x in xs],
        "encoding": [BatchEncoding({"x": x, "shift": shift}) for x in xs],
    }
    model, found = Keyed(), {}
    for form, data in forms.items():
        other = copy.deepcopy(model)
        prune(other, WandaSpec(), data)
        found[form] = torchprune.masks(other)
    for form, kept in found.items():
        for name, mask in found["tensor"].items():
            assert torch.equal(kept[name], mask), (form, name)


def test_data_may_be_a_generator_or_endless() -> None:
    model, data = FAMILIES["mlp"].make(), FAMILIES["mlp"].data(count=4)
    copies = [copy.deepcopy(model) for _ in range(2)]
    prune(model, WandaSpec(), data)
    prune(copies[0], WandaSpec(), (x for x in data))
    drawn = []

    def endless() -> Iterator[Tensor]:
        while True:
            drawn.append(data[len(drawn) % 4])
            yield drawn[-1]

    prune(copies[1], WandaSpec(), endless(), max_batches=4)
    for other in copies:
        for name, mask in torchprune.masks(model).items():
            assert torch.equal(torchprune.masks(other)[name], mask)
    assert len(drawn) <= 5
    assert any("first 4 batches" in note for note in torchprune.report(copies[1]).notes)
    assert torchprune.report(model).notes == []


def test_a_loader_of_tokenised_text() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [t[0].tolist() for t in tokens(count=6, rows=1)]
    masks = [[1] * 12 for _ in rows]
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": masks})
    loader = torch.utils.data.DataLoader(dataset.with_format("torch"), batch_size=2)
    model = FAMILIES["llama"].make()
    other = copy.deepcopy(model)
    prune(model, WandaSpec(), loader)
    prune(other, WandaSpec(), [torch.tensor(rows[i : i + 2]) for i in (0, 2, 4)])
    assert {y.tokens for y in torchprune.report(model).layers} == {72}
    for name, mask in torchprune.masks(other).items():
        assert torch.equal(torchprune.masks(model)[name], mask)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(2, 16), r"one tensor \(2, 16\).*for one batch: \[data\]"),
        ("some text", "data is a str; data must be an iterable of batches"),
        ({"input_ids": torch.ones(2, 16)}, "data is a dict; data must be an iterable of batches"),
        (7, "data is a int; data must be an iterable of batches"),
        ([], "holds no batches"),
        (iter(()), "holds no batches"),
        (["text", "more text"], "a batch is a str"),
        ([None], "a batch is a NoneType"),
    ],
    ids=["tensor", "str", "dict", "int", "empty", "exhausted", "strings", "none"],
)
def test_data_that_cannot_be_read(data: Any, message: str) -> None:
    model = FAMILIES["mlp"].make()
    before = fingerprint(model)
    with pytest.raises(CalibrationError, match=message):
        prune(model, WandaSpec(), data)
    assert_as_it_was(model, before)


def test_max_batches_must_be_positive() -> None:
    with pytest.raises(CalibrationError, match="max_batches must be at least 1, got 0"):
        prune(FAMILIES["mlp"].make(), WandaSpec(), FAMILIES["mlp"].data(), max_batches=0)


# -- padding --------------------------------------------------------------------------------------


class PerToken(nn.Module):
    """A model without mixing between tokens, that knows no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.one(x)


@pytest.mark.parametrize("flat", [False, True])
def test_padding_rows_do_not_count_at_all(flat: bool) -> None:
    model, x = PerToken(), torch.randn(2, 6, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    other = copy.deepcopy(model)
    padded = torch.where(mask[..., None].bool(), x, 1e4)
    batch = {"x": padded.flatten(0, 1) if flat else padded, "attention_mask": mask}
    prune(model, SparseGPTSpec(), [batch])
    prune(other, SparseGPTSpec(), [x[mask.bool()]])
    assert torch.equal(model.one.weight, other.one.weight)
    assert torchprune.report(model).layers[0].tokens == 9


def padded_tokens(side: str) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Sequences of several lengths as padded batches, and one by one."""
    plain = [tokens(seed, 1, rows=1, length=n)[0] for seed, n in enumerate([12, 5, 9, 7])]
    batches = []
    for pair in (plain[:2], plain[2:]):
        width = max(t.shape[1] for t in pair)
        ids = torch.zeros(2, width, dtype=torch.long)
        mask = torch.zeros(2, width, dtype=torch.long)
        for row, t in enumerate(pair):
            place = slice(0, t.shape[1]) if side == "right" else slice(width - t.shape[1], width)
            ids[row, place], mask[row, place] = t[0], 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches, plain


def agreement(one: nn.Module, two: nn.Module) -> float:
    """Share of mask entries that agree."""
    first, second = torchprune.masks(one), torchprune.masks(two)
    same = sum(int((first[name] == second[name]).sum()) for name in first)
    return same / sum(mask.numel() for mask in first.values())


def test_padding_of_a_language_model_does_not_count() -> None:
    batches, plain = padded_tokens("right")
    one, two, three = (FAMILIES["llama"].make() for _ in range(3))
    prune(one, WandaSpec(), batches)
    prune(two, WandaSpec(), plain)
    prune(three, WandaSpec(), [batch["input_ids"] for batch in batches])
    assert {y.tokens for y in torchprune.report(one).layers} == {33}
    assert agreement(one, two) > 0.999  # up to the rounding of attention over another width
    assert agreement(three, two) < 0.99  # it would show


def test_padding_on_both_sides_of_an_encoder_decoder() -> None:
    model = FAMILIES["t5"].make()
    (batch, _), _ = padded_tokens("right")
    target = tokens(5, 1, length=6)[0]
    mask = torch.ones_like(target)
    mask[0, 2:] = 0
    prune(
        model,
        WandaSpec(),
        [{**batch, "decoder_input_ids": target, "decoder_attention_mask": mask}],
    )
    read = {y.name: y.tokens for y in torchprune.report(model).layers}
    encoder, decoder = 17, 8
    for name, count in read.items():
        crossing = name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert count == (encoder if name.startswith("encoder") or crossing else decoder), name


def test_a_batch_that_is_all_padding_adds_nothing() -> None:
    one, two = PerToken(), PerToken()
    two.load_state_dict(one.state_dict())
    x, yes, no = torch.randn(2, 6, 8), torch.ones(2, 6), torch.zeros(2, 6)
    real = {"x": x, "attention_mask": yes}
    prune(one, WandaSpec(), [real, {"x": x * 9, "attention_mask": no}])
    prune(two, WandaSpec(), [real])
    assert torch.equal(torchprune.masks(one)["one.weight"], torchprune.masks(two)["one.weight"])


# -- memory ---------------------------------------------------------------------------------------


def wide_llama() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return llama(hidden_size=64, intermediate_size=96).eval()


@pytest.mark.parametrize("method", [WandaSpec, SparseGPTSpec])
def test_holding_activations_in_sixteen_bits(method: type[Spec]) -> None:
    data = tokens(count=4, rows=4, length=32)
    one, two = wide_llama(), wide_llama()
    prune(one, method(), data)
    prune(two, method(), data, hold=torch.bfloat16)
    whole, half = (torchprune.report(m).peak_held_bytes for m in (one, two))
    assert 0 < half < 0.75 * whole
    assert 0.95 < agreement(one, two) < 1.0
    assert torchprune.report(two).sparsity == 0.5


def test_what_waits_grows_with_the_batches() -> None:
    peaks = []
    for count in (2, 4):
        model = wide_llama()
        prune(model, WandaSpec(), tokens(count=count, rows=4, length=32))
        peaks.append(torchprune.report(model).peak_held_bytes)
    assert 1.5 * peaks[0] < peaks[1] <= 2 * peaks[0]


TABLE_OF_NOBODY = """
import torch, torchprune

class Constant(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.one, self.two = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.read = lambda: table

    def forward(self, x):
        table = self.read()
        return self.two(self.one(x) + table)

table = torch.randn(64, 64)
before = table.clone()
data = list(torch.randn(3, 64, 64))
torchprune.sparsify(
    Constant(table), torchprune.WandaSpec(), data, progress=False, hold=torch.bfloat16
)
assert torch.equal(table, before)
"""


def test_holding_never_touches_tensors_that_no_module_owns() -> None:
    # In a process of its own: a storage emptied under a running batch would end the whole suite.
    done = subprocess.run([sys.executable, "-c", TABLE_OF_NOBODY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


TABLES_BY_LENGTH = """
import torch, torchprune

class Tables(torch.nn.Module):
    def __init__(self, cache):
        super().__init__()
        self.one, self.two = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.cache = cache

    def forward(self, x):
        if len(x) not in self.cache:
            self.cache[len(x)] = torch.full((len(x), 64), 1.001)
        return self.two(self.one(x) + self.cache[len(x)])

model = Tables({})
data = [torch.randn(n, 64) for n in (96, 64, 96, 64)]
torchprune.sparsify(model, torchprune.WandaSpec(), data, progress=False, hold=torch.bfloat16)
for table in model.cache.values():
    assert (table == torch.tensor(1.001)).all(), table
"""


def test_holding_never_touches_caches_made_on_the_way() -> None:
    script = TABLES_BY_LENGTH.replace(
        "return self", "table = self.cache[len(x)]\n        return self"
    )
    for code in (TABLES_BY_LENGTH, script):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


class Nested(nn.Module):
    """Takes its tensors in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.two(self.one(inputs["x"])) + inputs["x"]


def test_holding_never_touches_the_callers_nested_inputs() -> None:
    data = [({"x": x},) for x in torch.randn(3, 64, 64)]
    before = copy.deepcopy(data)
    prune(Nested(), WandaSpec(), data, hold=torch.bfloat16)
    for (now,), (then,) in zip(data, before, strict=True):
        assert torch.equal(now["x"], then["x"])


@pytest.mark.parametrize("hold", [torch.float32, torch.int8, "bfloat16"])
def test_hold_takes_sixteen_bit_floats(hold: Any) -> None:
    with pytest.raises(SpecError, match=r"hold must be None, torch\.bfloat16 or torch\.float16"):
        prune(FAMILIES["mlp"].make(), WandaSpec(), FAMILIES["mlp"].data(), hold=hold)


# -- without data ---------------------------------------------------------------------------------


def test_a_language_model_calibrates_on_its_own_text() -> None:
    model = FAMILIES["llama"].make().train()
    copies = [copy.deepcopy(model) for _ in range(2)]
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    prune(model, WandaSpec())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model.model.layers[0].mlp.training
    torch.manual_seed(6)
    prune(copies[0], WandaSpec())
    prune(copies[1], WandaSpec(), seed=1)
    assert agreement(model, copies[0]) == 1.0
    assert agreement(model, copies[1]) < 1.0
    assert any("sampled from the model itself" in n for n in torchprune.report(model).notes)
    assert torchprune.report(model).sparsity == 0.5


@pytest.mark.parametrize("family", ["bert", "t5", "mlp", "vit"])
def test_models_that_cannot_write_need_data(family: str) -> None:
    model = FAMILIES[family].make()
    before = fingerprint(model)
    with pytest.raises(
        CalibrationError, match=f"needs calibration data for a {type(model).__name__}"
    ):
        prune(model, WandaSpec())
    assert_as_it_was(model, before)


# -- odd models -----------------------------------------------------------------------------------


def test_a_compiled_model_is_calibrated_in_plain_python() -> None:
    model = FAMILIES["mlp"].make()
    other = copy.deepcopy(model)
    data = FAMILIES["mlp"].data()
    prune(torch.compile(model, backend="eager"), WandaSpec(), data)
    prune(other, WandaSpec(), data)
    assert agreement(model, other) == 1.0


def test_checkpointed_activations_do_not_disturb() -> None:
    model = FAMILIES["llama"].make()
    other = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    model.train()
    prune(model, WandaSpec(), tokens())
    prune(other, WandaSpec(), tokens())
    assert agreement(model, other) == 1.0


def test_a_progress_bar_counts_layers(capsys: pytest.CaptureFixture[str]) -> None:
    torchprune.sparsify(FAMILIES["mlp"].make(), WandaSpec(), FAMILIES["mlp"].data())
    assert "3/3" in capsys.readouterr().err
    prune(FAMILIES["mlp"].make(), WandaSpec(), FAMILIES["mlp"].data())
    assert capsys.readouterr().err == ""


def test_nothing_is_warned_about_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(FAMILIES["llama"].make(), SparseGPTSpec(), tokens())
