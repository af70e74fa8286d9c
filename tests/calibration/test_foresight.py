"""Layers pruned together because blocks are alike, and what happens where they are not."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import Spec, by_hand, by_hand_from, groups_for, inputs_of, prune
from families import FAMILIES, tokens
from torch import Tensor, nn

import torchprune
from torchprune import SparseGPTSpec, WandaSpec
from torchprune.calibration.lockstep import Calibration
from torchprune.errors import CalibrationError
from torchprune.methods.sparsegpt import sparsegpt

METHODS = [WandaSpec(), SparseGPTSpec(sequential="layer")]
Trick = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """Two layers and a third; a trick decides what the second one reads."""

    def __init__(self, trick: Trick) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.trick = trick

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.one(x)
        return x + self.three(torch.tanh(self.trick(self, x) + y))


class Stack(nn.Module):
    """Blocks of one class, of which each has its own trick."""

    def __init__(self, *tricks: Trick) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(trick) for trick in tricks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def alike(block: Block, x: Tensor) -> Tensor:
    return block.two(x)


def equal_copy(block: Block, x: Tensor) -> Tensor:
    return block.two(x * 3.0)


def changed_in_place(block: Block, x: Tensor) -> Tensor:
    x[..., :4] *= 100.0
    return block.two(x)


def not_called(block: Block, x: Tensor) -> Tensor:
    return x


def called_for_some(block: Block, x: Tensor) -> Tensor:
    return block.two(x) if bool(x.sum() > 0) else x


def called_twice(block: Block, x: Tensor) -> Tensor:
    return block.two(x) + block.two(x * 2.0)


def swallowed(block: Block, x: Tensor) -> Tensor:
    """Code that catches everything cannot hide that the second layer read something else."""
    try:
        return block.two(x * 3.0)
    except BaseException:
        return block.two(x)


def batches(count: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 5, 8, generator=torch.Generator().manual_seed(3)))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each run of a calibration was to foresee."""
    seen: list[bool] = []

    def watched(*args: Any, foresee: bool, **options: Any) -> Calibration:
        seen.append(foresee)
        return Calibration(*args, foresee=foresee, **options)

    module = sys.modules["torchprune.sparsify"]  # the package's attribute is the function
    monkeypatch.setattr(module, "Calibration", watched)
    return seen


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each sweep solved."""
    seen: list[int] = []

    def watched(weights: Any, *args: Any) -> Any:
        seen.append(len(weights))
        return sparsegpt(weights, *args)

    monkeypatch.setattr("torchprune.methods.sparsegpt.sparsegpt", watched)
    return seen


def assert_as_by_hand(model: nn.Module, spec: Spec, data: list[Any], order: list[str]) -> None:
    """Prune, and compare masks and weights with the loop that runs the model for every layer."""
    other = copy.deepcopy(model)
    prune(model, spec, data)
    expected = by_hand(other, spec, data, groups_for("layer", [order]))
    found = torchprune.masks(model)
    for name, keep in expected.items():
        assert torch.equal(found[name], keep), name
        layer = name.removesuffix(".weight")
        pruned = model.get_submodule(layer).weight
        torch.testing.assert_close(pruned, other.get_submodule(layer).weight, atol=1e-5, rtol=1e-4)


def order_of(model: Stack) -> list[str]:
    names = ("one", "two", "three")
    return [f"blocks.{i}.{name}" for i in range(len(model.blocks)) for name in names]


@pytest.mark.parametrize("spec", METHODS, ids=["wanda", "sparsegpt"])
def test_what_one_block_shared_the_next_ones_share_in_one_stop(
    spec: Spec, runs: list[bool], solved: list[int]
) -> None:
    model = Stack(alike, alike, alike)
    assert_as_by_hand(model, spec, batches(), order_of(model))
    assert runs == [True]
    assert torchprune.report(model).notes == []
    if isinstance(spec, SparseGPTSpec):
        assert solved == [1, 1, 1, 2, 1, 2, 1]


def test_a_llama_solves_together_what_its_first_block_shared(
    runs: list[bool], solved: list[int]
) -> None:
    prune(FAMILIES["llama"].make(), SparseGPTSpec(sequential="layer"), tokens(count=3))
    assert solved == [1, 1, 1, 1, 1, 1, 1, 3, 1, 2, 1]
    assert runs == [True]


@pytest.mark.parametrize("spec", METHODS, ids=["wanda", "sparsegpt"])
@pytest.mark.parametrize("trick", [equal_copy, changed_in_place, swallowed])
def test_a_block_that_reads_another_tensor_is_seen_and_all_begins_anew(
    trick: Trick, spec: Spec, runs: list[bool]
) -> None:
    model = Stack(alike, trick, alike)
    assert_as_by_hand(model, spec, batches(), order_of(model))
    assert runs == [True, False]
    assert any("calibrated twice" in note for note in torchprune.report(model).notes)


@pytest.mark.parametrize("where", [1, 2])
def test_a_layer_foreseen_and_never_called_falls_back_to_magnitude(
    where: int, runs: list[bool]
) -> None:
    tricks = [alike, alike, alike]
    tricks[where] = not_called
    model = Stack(*tricks)
    with pytest.warns(UserWarning, match=rf"blocks\.{where}\.two"):
        assert_as_by_hand(
            model, METHODS[1], batches(), [n for n in order_of(model) if n != f"blocks.{where}.two"]
        )
    assert runs == [True, False]
    assert not torchprune.masks(model)[f"blocks.{where}.two.weight"].all()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_layer_called_for_some_batches_only_is_seen(runs: list[bool]) -> None:
    model = Stack(alike, called_for_some, alike)
    data = batches(8)
    assert_as_by_hand(model, METHODS[0], data, order_of(model))
    assert runs == [True, False]


def test_a_layer_foreseen_and_called_again_is_pruned_on_every_use(runs: list[bool]) -> None:
    model = Stack(alike, called_twice)
    other = copy.deepcopy(model)
    prune(model, METHODS[0], batches())
    dense = inputs_of(other, ["blocks.1.two"], batches())
    for name in order_of(model):
        found = dense if name == "blocks.1.two" else inputs_of(other, [name], batches())
        for key, keep in by_hand_from(other, METHODS[0], found).items():
            assert torch.equal(torchprune.masks(model)[key], keep), key
    assert runs == [True, True]  # the second after a look at how layers are read
    assert any("blocks.1.two" in note for note in torchprune.report(model).notes)


def test_a_promise_of_the_last_stop_is_checked_before_the_end(runs: list[bool]) -> None:
    model = Stack(alike, equal_copy)
    spec = WandaSpec(targets=("*.one", "*.two"))
    order = [name for name in order_of(model) if not name.endswith("three")]
    assert_as_by_hand(model, spec, batches(), order)
    assert runs == [True, False]


def test_batches_stop_where_the_last_promise_is_kept() -> None:
    calls: list[str] = []
    model = Stack(alike, alike)
    for name in ("one", "two", "three"):
        layer = model.blocks[1].get_submodule(name)
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    prune(model, WandaSpec(targets=("*.one", "*.two")), batches(4))
    # One batch goes on to see whether layers are used again.
    assert sorted(calls) == ["one"] * 4 + ["three", "two"]


def test_blocks_of_other_classes_and_shapes_learn_nothing_from_each_other(
    runs: list[bool], solved: list[int]
) -> None:
    class Other(Block):
        pass

    model = Stack(alike, alike, alike)
    model.blocks[1] = Other(equal_copy)
    spec = SparseGPTSpec(sequential="layer")
    assert_as_by_hand(model, spec, batches(), order_of(model))
    assert runs == [True]
    assert solved == [1] * 6 + [2, 1]


def test_a_model_that_fails_in_the_second_run_is_as_it_was(runs: list[bool]) -> None:
    model = Stack(alike, equal_copy, alike)
    before = copy.deepcopy(model.state_dict())

    def fail(*_: Any) -> None:
        if len(runs) == 2:
            raise ZeroDivisionError("the model's own")

    model.blocks[2].three.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match="the model's own"):
        prune(model, METHODS[0], batches())
    assert runs == [True, False]
    assert not torchprune.masks(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_inputs_that_are_not_finite_are_an_error_in_a_foreseen_layer_too(runs: list[bool]) -> None:
    model = Stack(alike, alike)
    with torch.no_grad():
        model.blocks[0].three.bias.fill_(torch.inf)
    with pytest.raises(CalibrationError, match=r"blocks\.1\.one"):
        prune(model, METHODS[0], batches())
    assert runs == [True]
    assert not torchprune.masks(model)


def test_every_family_is_foreseen_without_beginning_anew(runs: list[bool]) -> None:
    for name in ("llama", "qwen3", "gemma", "gpt2", "opt"):
        family = FAMILIES[name]
        prune(family.make(), METHODS[0], tokens(count=2))
    assert runs == [True] * 5
