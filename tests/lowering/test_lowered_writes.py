"""A lowered layer's weight is read, never written: no write is lost without a word."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import LoweringError


def lowered(dtype: torch.dtype | None = None) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    return torchprune.lower(model, "bitmask", dtype=dtype)


def assigned(layer: Any, value: object) -> None:
    layer.weight = value


def added(layer: Any) -> None:
    layer.weight += 1


def data_set(layer: Any) -> None:
    layer.weight.data = torch.ones(6, 8)


WRITES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda layer: layer.weight.copy_(torch.ones(6, 8)),
    "init": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "init of data": lambda layer: nn.init.zeros_(layer.weight.data),
    "data": lambda layer: layer.weight.data.add_(1),
    "data of data": lambda layer: layer.weight.data.data.mul_(2),
    "data set": data_set,
    "+=": added,
    "item": lambda layer: layer.weight.__setitem__((0, 0), 1.0),
    "item of a view": lambda layer: layer.weight.T[1:].__setitem__(0, 1.0),
    "detached": lambda layer: layer.weight.detach().fill_(0.0),
    "out": lambda layer: torch.add(torch.ones(6, 8), 1, out=layer.weight),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight, torch.ones(2)], 2.0),
    "relu": lambda layer: nn.functional.relu(layer.weight, inplace=True),
    "row": lambda layer: layer.weight.unsqueeze(0)[..., 1].neg_(),
    "set_": lambda layer: layer.weight.set_(torch.ones(6, 8)),
    "assigned": lambda layer: assigned(layer, torch.ones(6, 8)),
    "parameter": lambda layer: assigned(layer, nn.Parameter(torch.ones(6, 8))),
    "registered": lambda layer: layer.register_parameter("weight", None),
}


@pytest.mark.parametrize("dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_writes_raise_and_say_what_to_call(write: str, dtype: torch.dtype | None) -> None:
    model, x = lowered(dtype), torch.randn(3, 8)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(LoweringError, match=r"torchprune\.lift\(model\) first"):
            WRITES[write](model[0])
    assert torch.equal(model(x), expected)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_numpy_view_is_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        lowered()[0].weight.numpy()[0] = 1


def test_what_is_computed_of_the_weight_is_an_ordinary_tensor() -> None:
    layer = lowered()[0]
    weight, x = layer.weight, torch.randn(3, 8)
    for made in (weight.clone(), weight + 1, x @ weight.T, weight.double(), copy.deepcopy(weight)):
        made.add_(1)
        assert type(made) is Tensor or made is not weight
    torch.testing.assert_close(nn.functional.linear(x, weight, layer.bias), layer(x))
    other = nn.Linear(8, 6)
    other.weight.data.copy_(weight)
    assert torch.equal(other.weight, layer.weight)
    assert type(torchprune.lift(lowered())[0].weight) is nn.Parameter
    assert "requires_grad" not in repr(weight)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], "all-linear", r".*\.v_proj", None])
@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig"])
def test_adapters_on_lowered_layers_are_refused(kind: str, targets: Any) -> None:
    peft = pytest.importorskip("peft")
    if targets is None and kind == "LoHaConfig":
        pytest.skip("it has no targets of its own for a llama")
    model: Any = FAMILIES["llama"].make()
    torchprune.sparsify(model, MagnitudeSpec(ignore=["*.q_proj"]), progress=False)
    torchprune.lower(model, "bitmask")
    names = [name for name, _ in model.named_modules()]
    config = getattr(peft, kind)(target_modules=targets)
    with pytest.raises(
        LoweringError, match=r"(v|k|down)_proj is lowered.*torchprune\.lift\(model\)"
    ):
        peft.get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names
    adapted = peft.get_peft_model(model, getattr(peft, kind)(target_modules=["q_proj"]))
    assert any("q_proj" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_lifted_a_model_takes_adapters_again() -> None:
    peft = pytest.importorskip("peft")
    model: Any = FAMILIES["llama"].make()
    torchprune.lower(torchprune.sparsify(model, MagnitudeSpec(), progress=False), "bitmask")
    adapted = peft.get_peft_model(
        torchprune.lift(model), peft.LoraConfig(target_modules="all-linear")
    )
    assert type(adapted.merge_and_unload()) is type(model)
