"""Calibration in odd surroundings, and what errors leave behind: nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from by_hand import (
    MODES,
    Spec,
    assert_as_it_was,
    by_hand,
    by_hand_from,
    fingerprint,
    groups_for,
    inputs_of,
    modes_now,
    prune,
)
from families import FAMILIES, tokens
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec

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
