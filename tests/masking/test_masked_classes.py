"""Masked modules of one kind share a class, and torch's functions still change one module alone."""

from __future__ import annotations

import copy
import pickle
from abc import ABC
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torchprune


class Doubled(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return 2 * tensor

    def right_inverse(self, tensor: Tensor) -> Tensor:
        return tensor / 2


class Odd(nn.Module, ABC):
    """Of a class that is no plain `type`, with tensors of odd names."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.up + self.down).T


def masked(module: nn.Module, *names: str) -> Any:
    """The module with a mask of every other element on each of these tensors."""
    given = {}
    for name in names:
        tensor = module.get_parameter(name)
        given[name] = (torch.arange(tensor.numel()) % 2 == 0).view(tensor.shape)
    return torchprune.apply_masks(module, given)


def gives(module: nn.Module, name: str) -> Tensor:
    """What a module without masks would have in a tensor's place."""
    tensor = getattr(module, name).detach().clone()
    if name in torchprune.masks(module):
        assert not tensor[~torchprune.masks(module)[name]].any()
    return tensor


KINDS = {
    "linear": (lambda: nn.Linear(6, 4), ["weight", "bias"]),
    "odd": (Odd, ["up", "down"]),
    "gru": (lambda: nn.GRU(6, 4), ["weight_ih_l0", "weight_hh_l0"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_class_for_a_kind_and_the_tensors_that_are_masked(kind: str) -> None:
    make, (one, two) = KINDS[kind]
    first, second, both = masked(make(), one), masked(make(), one), masked(make(), one, two)
    assert type(first) is type(second) is type(copy.deepcopy(first)) is not type(both)
    assert first.__annotations__ is not None  # which Python writes down, as it does for a copy
    assert type(both) is type(masked(copy.deepcopy(first), two))
    assert type(both) is type(masked(masked(make(), two), one))
    for module in (first, both):
        assert parametrize.type_before_parametrizations(module) is type(make())
    torchprune.densify(both)
    assert type(both) is type(make())
    assert isinstance(first, type(make()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leave", [True, False])
def test_what_torch_removes_from_one_module_the_others_keep(kind: str, leave: bool) -> None:
    make, (one, two) = KINDS[kind]
    for names in ([one], [one, two]):
        module, other = masked(make(), *names), masked(make(), *names)
        before = {name: gives(other, name) for name in names}
        value = gives(module, one)
        parametrize.remove_parametrizations(module, one, leave_parametrized=leave)
        assert one in module._parameters
        assert torch.equal(getattr(module, one), value)
        setattr(module, one, nn.Parameter(value + 1))
        assert torch.equal(getattr(module, one), value + 1)
        assert parametrize.is_parametrized(module) == (len(names) == 2)
        assert list(torchprune.masks(module)) == names[1:]
        for name in names:
            assert torch.equal(gives(other, name), before[name])
        torchprune.fold(module)
        assert type(module) is type(make())


@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_adds_to_one_module_the_others_do_not_get(kind: str) -> None:
    make, (one, two) = KINDS[kind]
    module, other = masked(make(), one), masked(make(), one)
    plain = getattr(other, two).detach().clone()
    doubled = 2 * getattr(module, two).detach()
    parametrize.register_parametrization(module, two, Doubled())
    assert torch.equal(getattr(module, two), doubled / 2)  # what went in comes out
    with torch.no_grad():
        module.parametrizations[two].original.fill_(3.0)
    assert torch.equal(getattr(module, two), torch.full_like(doubled, 6.0))
    with parametrize.cached():
        assert getattr(module, two) is getattr(module, two)
    # The other's is its own: read, written, replaced, taken away and put back.
    assert torch.equal(getattr(other, two), plain)
    assert getattr(other, two) is other._parameters[two]
    setattr(other, two, nn.Parameter(plain + 1))
    assert torch.equal(getattr(other, two), plain + 1)
    with pytest.raises(TypeError, match="cannot assign"):
        setattr(other, two, plain)
    delattr(other, two)
    assert not hasattr(other, two)
    setattr(other, two, plain)
    assert getattr(other, two) is plain
    assert not isinstance(vars(type(masked(make(), one))).get(two), property)
    # Masks come and go beside what torch added.
    torchprune.densify(module)
    assert parametrize.is_parametrized(module, two)
    masked(module, one)
    assert torch.equal(getattr(module, two), torch.full_like(doubled, 6.0))
    parametrize.remove_parametrizations(module, two)
    assert torch.equal(getattr(module, two), torch.full_like(doubled, 6.0))
    assert list(torchprune.masks(module)) == [one]


def test_more_on_top_of_a_mask_is_one_modules_affair() -> None:
    module, other = masked(nn.Linear(6, 4), "weight"), masked(nn.Linear(6, 4), "weight")
    weight = gives(module, "weight")
    parametrize.register_parametrization(module, "weight", Doubled(), unsafe=True)
    assert torch.equal(module.weight, 2 * weight)
    assert torch.equal(other.weight, gives(other, "weight"))
    copied = copy.deepcopy(module)
    assert torch.equal(copied.weight, module.weight)
    parametrize.remove_parametrizations(copied, "weight")
    assert torch.equal(module.weight, 2 * weight)
    assert set(module.state_dict()) == set(copied.state_dict()) - {"weight"} | {
        "parametrizations.weight.original",
        "parametrizations.weight.0.bits",
        "parametrizations.weight.0.hidden",
    }


def test_pickling_is_refused_as_torch_refuses_it() -> None:
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(masked(nn.Linear(6, 4), "weight"))


def test_a_class_with_something_of_its_own_is_shared_with_none() -> None:
    """As before: what is written on the class of one masked module is that module's."""
    module = nn.Linear(6, 4)
    parametrize.register_parametrization(module, "bias", Doubled())
    type(module).extra_repr = lambda self: "mine"  # type: ignore[method-assign]
    masked(module, "weight")
    assert "mine" in repr(module)
    assert type(module) is not type(masked(nn.Linear(6, 4), "weight"))
    torchprune.fold(module)
    assert "mine" in repr(module)
    assert parametrize.is_parametrized(module, "bias")
    assert not parametrize.is_parametrized(module, "weight")
