"""Writes into masked weights take effect on what is kept; the zeros stay, and cost nothing."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import torchprune
from torchprune import MagnitudeSpec
from torchprune.masking.mask import original_of


def checker(weight: Tensor) -> Tensor:
    """A checkered mask."""
    return (torch.arange(weight.numel()) % 2 == 0).reshape(weight.shape)


def masked(layer: nn.Module | None = None, name: str = "weight") -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5) if layer is None else layer
    return torchprune.apply_masks(layer, {name: checker(getattr(layer, name))})


def under_no_grad(write: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    def run(layer: Any) -> None:
        with torch.no_grad():
            write(layer.weight)

    return run


def assigned(layer: Any) -> None:
    layer.weight.data = layer.weight.detach() * 3 + 1


def added(layer: Any) -> None:
    layer.weight.data += 1


def filled(layer: Any) -> None:
    layer.weight.data[0] = 7


def set_whole(layer: Any) -> None:
    if parametrize.is_parametrized(layer):
        layer.weight = torch.ones(5, 6)
    else:
        layer.weight.data.fill_(1)


WRITES: dict[str, Callable[[Any], Any]] = {
    "data.mul_": lambda layer: layer.weight.data.mul_(3).add_(1),
    "data +=": added,
    "data[0] =": filled,
    "data =": assigned,
    "mul_": under_no_grad(lambda w: w.mul_(3).add_(1)),
    "detach": lambda layer: layer.weight.detach().add_(1),
    "copy_": under_no_grad(lambda w: w.copy_(torch.ones_like(w))),
    "kaiming": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "constant": lambda layer: nn.init.constant_(layer.weight, 2.0),
    "foreach": under_no_grad(lambda w: torch._foreach_add_([w], 1.0)),
    "out": under_no_grad(lambda w: torch.add(w, 1, out=w)),
    "attribute": set_whole,
    "original": lambda layer: original_of(layer, "weight").data.fill_(4),
    "reset": lambda layer: layer.reset_parameters(),
    "vector": lambda layer: nn.utils.vector_to_parameters(torch.ones(35), layer.parameters()),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_take_effect_and_zeros_stay(name: str) -> None:
    layer = masked()
    plain = nn.Linear(6, 5)
    plain.load_state_dict(torchprune.fold(copy.deepcopy(layer)).state_dict())
    for one in (layer, plain):
        torch.manual_seed(5)
        WRITES[name](one)
    keep = checker(layer.weight)
    assert torch.equal(layer.weight, torch.where(keep, plain.weight, 0))
    assert not layer.weight[~keep].signbit().any()
    x = torch.randn(3, 6)
    expected = nn.functional.linear(x, torch.where(keep, plain.weight, 0), layer.bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(torchprune.fold(layer).weight, torch.where(keep, plain.weight, 0))


@pytest.mark.parametrize("name", WRITES)
def test_what_is_saved_after_a_write_is_clean(name: str) -> None:
    layer = masked()
    WRITES[name](layer)
    keep = checker(torch.empty(5, 6))
    assert not layer.state_dict()["parametrizations.weight.original"][~keep].any()


def test_a_masked_weight_is_the_parameter_itself() -> None:
    layer = masked()
    assert layer.weight is layer.parametrizations.weight.original
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight is layer.weight
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.weight.grad is not None


def test_infinities_written_under_zeros_are_cleared() -> None:
    layer = masked()
    layer.weight.data.fill_(float("nan"))
    keep = checker(layer.weight)
    assert torch.equal(layer.weight.isnan(), keep)
    off = layer.weight.detach()[~keep]
    assert torch.equal(off.view(torch.int32), torch.zeros_like(off, dtype=torch.int32))


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 5), (4, 2, 3, 3)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_any_parameter_of_any_module_can_be_masked(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.full(shape, 2.0).to(dtype), requires_grad=False)

    model = masked(Own(), "table")
    keep = checker(model.table)
    assert list(torchprune.masks(model)) == ["table"]
    for value in (2.0, 4.0):
        model.table.data.copy_(torch.full(shape, value).to(dtype))
        assert torch.equal(model.table.float(), torch.where(keep, value, 0.0))
    torchprune.densify(model)
    assert torch.equal(model.table.float(), torch.where(keep, 4.0, 2.0))


def test_views_at_odd_places_and_other_layouts() -> None:
    flat = torch.arange(1.0, 40.0).bfloat16()
    for values in (flat[1:31].view(5, 6), flat[:30].view(6, 5).t(), flat[:1].expand(5, 6)):
        layer = nn.Linear(6, 5, dtype=torch.bfloat16)
        layer.weight.data = values.clone() if values.stride(0) == 0 else values
        wanted = torch.where(checker(layer.weight), values, 0).clone()
        masked(layer)
        assert torch.equal(layer.weight, wanted)


# -- optimizers ------------------------------------------------------------------------------------


def test_parameters_are_clean_right_after_a_step() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x = torch.randn(8, 16)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()  # momentum that knows of no mask
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        found = dict(model.named_parameters())
        for name, mask in torchprune.masks(model).items():
            stem = name.removesuffix("weight")
            assert not found[f"{stem}parametrizations.weight.original"][~mask].any()


def test_gradients_are_zero_off_the_mask_however_they_are_asked_for() -> None:
    layer = masked()
    x, keep = torch.randn(3, 6), checker(layer.weight)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), [layer.weight])
    assert grad[keep].all()
    assert not grad[~keep].any()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), [layer.weight], create_graph=True)
    grad.square().sum().backward()
    assert not layer.weight.grad[~keep].any()
    assert layer.weight.grad[keep].all()
    other = copy.deepcopy(layer)
    other.zero_grad()
    other.requires_grad_(False)
    other(x)
    other.requires_grad_(True)
    other(x).sum().backward()
    assert not other.weight.grad[~keep].any()
    x.fill_(float("inf"))
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad == 0, ~keep)


def test_a_read_between_forward_and_backward_is_no_write() -> None:
    layer = masked()
    y = layer(torch.randn(2, 6))
    layer.weight.data.norm()
    (y + layer(torch.randn(2, 6))).sum().backward()
    assert layer.weight.grad is not None


# -- what looks at the model otherwise -------------------------------------------------------------


def test_other_tensors_are_masked_and_left_alone() -> None:
    layer = masked()
    x, keep = torch.randn(2, 6), checker(layer.weight)
    for kind in (nn.Parameter, lambda t: t):
        given = kind(torch.ones(5, 6))
        out = functional_call(layer, {"parametrizations.weight.original": given}, (x,))
        assert torch.equal(out, nn.functional.linear(x, keep.float(), layer.bias))
        assert given.all()
    copied = copy.deepcopy(layer)
    torchprune.apply_masks(copied, {"weight": ~keep})
    given = dict(copied.named_parameters())
    out = functional_call(layer, {"parametrizations.weight.original": given.popitem()[1]}, (x,))
    assert torch.equal(copied.weight == 0, keep)
    assert torch.equal(layer.weight == 0, ~keep)


def test_transforms_of_functions_see_the_mask() -> None:
    layer = masked()
    params = {k: v.detach() for k, v in layer.named_parameters()}
    params["parametrizations.weight.original"] = torch.ones(5, 6)
    x, keep = torch.randn(4, 6), checker(layer.weight)

    def loss(given: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(layer, given, (row,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    grad = grads["parametrizations.weight.original"]
    assert not grad[:, ~keep].any()
    assert grad[:, keep].all()
    per_row = torch.func.vmap(lambda row: layer(row))(x)
    torch.testing.assert_close(per_row, layer(x))


def test_threads_see_clean_weights() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    x, wrong = torch.randn(4, 64), []
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
        keeps = [torchprune.masks(model)[f"{i}.weight"] for i in range(8)]
        expected = x
        for keep, layer in zip(keeps, model, strict=True):
            expected = nn.functional.linear(expected, keep * 0.01, layer.bias)

    def run() -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(x), expected):
                    wrong.append(1)

    for _ in range(5):
        for layer in model:
            layer.weight.data.fill_(0.01)
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_conversions_and_loads_keep_the_zeros() -> None:
    layer = masked()
    keep = checker(layer.weight)
    layer.to(torch.bfloat16).to(torch.float64).float()
    assert torch.equal(layer.weight == 0, ~keep)
    other = masked()
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other.weight, layer.weight)
    assert other.weight is other.parametrizations.weight.original
    other.weight.data.fill_(3)
    assert torch.equal(other.weight, torch.where(keep, 3.0, 0.0))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    layer.weight.data.fill_(3)
    assert torch.equal(layer.weight, torch.where(keep, 3.0, 0.0).double())


def test_shared_memory_stays_shared() -> None:
    layer = masked()
    layer.share_memory()
    alias = layer.weight.data
    layer.weight.data.fill_(2)
    assert layer.weight.data_ptr() == alias.data_ptr()
    assert torch.equal(alias, torch.where(checker(alias), 2.0, 0.0))


def test_a_state_with_masks_a_byte_a_weight_loads() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(6, 5)
    keep = checker(dense.weight)
    state = {
        "bias": dense.bias.detach().clone(),
        "parametrizations.weight.original": dense.weight.detach().clone(),
        "parametrizations.weight.0.mask": ~keep,
    }
    layer = masked()
    layer.weight.data.zero_()
    layer.load_state_dict(state, strict=True)
    assert torch.equal(layer.parametrizations.weight.original, torch.where(keep, 0, dense.weight))
    assert torch.equal(torchprune.masks(layer)["weight"], ~keep)
    torchprune.densify(layer)
    assert torch.equal(layer.weight, dense.weight)


def test_state_dicts_tell_what_is_wrong_with_a_mask() -> None:
    layer = masked()
    state = layer.state_dict()
    bits = state.pop("parametrizations.weight.0.bits")
    with pytest.raises(RuntimeError, match=r"Missing key.*parametrizations\.weight\.0\.bits"):
        masked().load_state_dict(state)
    state["parametrizations.weight.0.bits"] = bits[:-1]
    with pytest.raises(RuntimeError, match=r"size mismatch for parametrizations\.weight\.0\.bits"):
        masked().load_state_dict(state)
    state["parametrizations.weight.0.bits"] = bits
    state["parametrizations.weight.0.odd"] = bits
    with pytest.raises(RuntimeError, match=r"Unexpected key.*parametrizations\.weight\.0\.odd"):
        masked().load_state_dict(state)


# -- memory and reversal ---------------------------------------------------------------------------


def attached(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(("reversible", "most"), [(True, 1.57), (False, 1.07)])
def test_masks_cost_bits_and_the_values_under_them(reversible: bool, most: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    before = attached(model)
    torchprune.sparsify(model, MagnitudeSpec(), progress=False, reversible=reversible)
    assert attached(model) <= most * before
    for tensor in model.buffers():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # nothing larger behind a view
    if reversible:
        torchprune.densify(model)
    else:
        with pytest.raises(torchprune.errors.MaskError, match=r"reversible=False.*fold"):
            torchprune.densify(model)


def test_kept_weights_keep_what_was_written_and_the_others_return() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(6, 5)
    layer = masked()
    keep = checker(layer.weight)
    with torch.no_grad():
        layer.weight.add_(1)
    torchprune.densify(layer)
    assert torch.equal(layer.weight, torch.where(keep, dense.weight + 1, dense.weight))


def test_masks_that_grow_and_masks_that_move_keep_every_value() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(64, 48)
    layer = copy.deepcopy(dense)
    for sparsity in (0.25, 0.5, 0.75):
        torchprune.sparsify(layer, MagnitudeSpec(sparsity), progress=False)
    torchprune.apply_masks(layer, {"weight": checker(dense.weight)})
    assert torch.equal(layer.weight, torch.where(checker(dense.weight), dense.weight, 0))
    torchprune.densify(layer)
    assert torch.equal(layer.weight, dense.weight)


def test_parametrizations_on_top_still_see_the_mask() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer = masked()
    weight = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Doubled())
    layer.parametrizations.weight.original.data.add_(1)
    keep = checker(weight)
    assert torch.equal(layer.weight, torch.where(keep, 2 * (weight + 1), 0))


def test_taking_a_mask_off_by_hand_leaves_an_ordinary_weight() -> None:
    layer = masked()
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, weight)
    layer.weight.data.fill_(1)
    assert layer.weight.all()


def test_copies_begin_without_what_was_handed_out() -> None:
    """Export copies a module while it holds tensors without values."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    torchprune.sparsify(model, MagnitudeSpec(0.5))
    expected = model(x)
    twin = copy.deepcopy(model)
    assert not any(value for key, value in vars(twin[0]).items() if "handed" in key)
    with torch.no_grad():
        twin[0].weight.mul_(2)
    assert not torch.equal(twin(x), expected)
    for strict in (False, True):
        torch.export.export(model, (x,), strict=strict)
        assert torch.equal(model(x), expected)
