"""Masked weights trained as they will be once quantized, by our way and by torchao's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec
from torchprune.errors import MaskError, SpecError
from torchprune.methods.grid import plain_scale, rounded
from torchprune.specs.quantize import Grid
from torchprune.training import Int4, Int8, lost_zeros, quantized_aware

GRIDS: list[Grid] = [Int4(group=16), Int4(group=None), Int8(), Int8(group=8)]
OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def net(seed: int = 0, dtype: torch.dtype = torch.float32, **goal: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16)).to(dtype)
    return torchprune.sparsify(model, MagnitudeSpec(**(goal or {"sparsity": 0.5})), progress=False)


def task(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(5)
    x = torch.randn(128, 32, generator=made)
    return x.to(dtype), (x @ torch.randn(32, 16, generator=made) / 6).tanh().to(dtype)


def error(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    x, wanted = task(dtype)
    return (model(x) - wanted).square().mean()


def train(model: nn.Module, optimizer: Any, steps: int, masks: dict[str, Tensor]) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        error(model, next(model.parameters()).dtype).backward()
        optimizer.step()
        assert_zeros(model, masks)


def weight_of(model: nn.Module, name: str) -> Any:
    return getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])


def assert_zeros(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        weight = weight_of(model, name)
        assert not weight[~mask].any(), name
        assert weight[mask].any(), name


@settings(max_examples=10)
@given(
    grid=st.sampled_from(GRIDS),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    goal=st.sampled_from([{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_zeros_stay_and_weights_end_on_the_grid(
    grid: Grid, optimizer: str, goal: Any, dtype: torch.dtype
) -> None:
    model = net(0, dtype, **goal)
    masks, keys = torchprune.masks(model), list(model.state_dict())
    parameters = list(model.parameters())
    made = OPTIMIZERS[optimizer](parameters)
    train(model, made, 2, masks)
    x, _ = task(dtype)
    with quantized_aware(model, grid) as same:
        assert same is model
        assert list(model.state_dict()) == keys
        train(model, made, 4, masks)
        inside = model(x).detach()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(x), inside)
    for name, mask in torchprune.masks(model).items():
        assert torch.equal(mask, masks[name])
        weight = weight_of(model, name).detach()
        assert not bool((weight.signbit() & (weight == 0)).any())
        if dtype == torch.float32 or grid.bits == 4:
            near = rounded(weight, plain_scale(weight, grid, dtype), grid)
            assert torch.equal(near.to(dtype), weight)
    train(model, made, 1, masks)  # an ordinary masked model again
    assert f"quantized to {grid}" in torchprune.report(model).layers[0].note


@pytest.mark.parametrize("grid", [Int4(group=16), Int4(group=None)], ids=str)
def test_training_lowers_the_loss_of_the_quantized_model(grid: Grid) -> None:
    model = net(0, pattern="2:4")
    train(model, torch.optim.Adam(model.parameters(), 0.01), 150, {})
    plain, aware = copy.deepcopy(model), copy.deepcopy(model)
    with quantized_aware(plain, grid):
        pass
    optimizer = torch.optim.Adam(aware.parameters(), 0.001)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, 60)
    with quantized_aware(aware, grid):
        for _ in range(60):
            train(aware, optimizer, 1, torchprune.masks(aware))
            schedule.step()
    assert float(error(aware).detach()) < 0.95 * float(error(plain).detach())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_are_those_of_the_rounded_model_where_masks_keep(grid: Grid) -> None:
    model = net()
    plain = torchprune.fold(copy.deepcopy(model))
    for layer in (plain[0], plain[2]):
        scale = plain_scale(layer.weight, grid, torch.float32)
        layer.weight.data = rounded(layer.weight, scale, grid)
    error(plain).backward()
    with quantized_aware(model, grid):
        error(model).backward()
    for name, mask in torchprune.masks(model).items():
        found = model.get_submodule(name[0]).parametrizations.weight.original.grad
        expected = weight_of(plain, name).grad * mask
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_gradients_pass_the_rounding_and_stop_at_the_mask() -> None:
    model = net()
    mask = torchprune.masks(model)["0.weight"]
    with quantized_aware(model, Int4(group=16)):
        weight = model[0].weight
        (weight * 3).sum().backward()
    assert torch.equal(model[0].parametrizations.weight.original.grad, 3.0 * mask)


def test_what_sparsegpt_put_on_the_grid_begins_and_ends_as_it_is() -> None:
    made = FAMILIES["llama"]
    spec = SparseGPTSpec(pattern="2:4", quantize=Int4(group=16))
    model = torchprune.sparsify(made.make(), spec, made.data(), progress=False)
    before = {n: weight_of(model, n).detach().clone() for n in torchprune.masks(model)}
    notes = [layer.note for layer in torchprune.report(model).layers]
    with quantized_aware(model, Int4(group=16)):
        for name, weight in before.items():
            assert torch.equal(weight_of(model, name), weight)
    for name, weight in before.items():
        assert torch.equal(weight_of(model, name), weight)
    assert [layer.note for layer in torchprune.report(model).layers] == notes


@pytest.mark.parametrize("family", ["gpt2", "resnet", "mixtral"])
def test_transposed_weights_kernels_and_experts(family: str) -> None:
    made = FAMILIES[family]
    model = torchprune.sparsify(made.make(), MagnitudeSpec(0.5), progress=False)
    masks = torchprune.masks(model)
    [batch] = made.data(count=1)
    with quantized_aware(model, Int8()):
        assert_zeros(model, masks)
        out = model(**batch) if isinstance(batch, dict) else model(batch)
        next(v for v in out.values() if v.is_floating_point()).sum().backward()
    assert_zeros(model, masks)


def test_an_error_inside_leaves_the_weights_as_they_were_trained() -> None:
    model = net()
    before = model[0].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), quantized_aware(model, Int4(group=16)):
        raise KeyboardInterrupt
    assert torch.equal(model[0].weight, before)
    assert len(model[0].parametrizations.weight) == 1


def test_what_cannot_be_done_is_refused_and_nothing_is_touched() -> None:
    model = net()
    with pytest.raises(SpecError, match=r"2: its rows have 48 weights.*groups of 32"):
        quantized_aware(model, Int4(group=32)).__enter__()
    with pytest.raises(SpecError, match="grid must be an Int8"):
        quantized_aware(model, "int4").__enter__()  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="no layer carries a mask"):
        quantized_aware(nn.Linear(4, 4), Int8()).__enter__()
    assert len(model[0].parametrizations.weight) == 1
    with quantized_aware(model, Int4(group=32), ignore="2"):
        assert len(model[2].parametrizations.weight) == 1
        with pytest.raises(MaskError, match="another parametrization"):
            quantized_aware(model, Int8()).__enter__()


def test_a_mask_is_not_taken_off_below_the_rounding() -> None:
    model, (x, _) = net(), task()
    with quantized_aware(model, Int4(group=16)):
        inside = model(x)
        for take in (torchprune.fold, torchprune.densify):
            with pytest.raises(MaskError, match="Rounded: leave the block of quantized_aware"):
                take(model)
        assert torch.equal(model(x), inside)
    assert torch.equal(torchprune.fold(model)(x), inside)
    assert not parametrize.is_parametrized(model[0])


# -- torchao ---------------------------------------------------------------------------------------


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao.quantization", reason="the extra quant is not installed")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_torchao_has_the_same_model_afterwards(grid: Grid, torchao: Any) -> None:
    model, (x, _) = net(pattern="2:4"), task()
    masks = torchprune.masks(model)
    with quantized_aware(model, grid):
        train(model, torch.optim.AdamW(model.parameters(), 0.01), 5, masks)
    before = torchprune.fold(model)(x)
    torchao.quantize_(model, grid.torchao())
    assert torch.allclose(model(x), before, atol=1e-5)
    for name, mask in masks.items():
        assert not weight_of(model, name).qdata[~mask].any()
    assert lost_zeros(model, masks) == {}


@pytest.mark.parametrize("again", [False, True], ids=["left", "put on again"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_zeros_outlive_the_modules_that_torchao_swaps(
    again: bool, optimizer: str, torchao: Any
) -> None:
    from torchao.quantization.qat import QATConfig

    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16))
    model = net()
    masks = torchprune.masks(model)
    made = OPTIMIZERS[optimizer](model.parameters())
    train(model, made, 2, masks)
    torchao.quantize_(model, QATConfig(config, step="prepare"))
    if again:
        torchprune.apply_masks(model, masks)
        assert list(torchprune.masks(model)) == list(masks)
    train(model, made, 4, masks)
    torchao.quantize_(model, QATConfig(config, step="convert"))
    assert lost_zeros(model, masks) == {}
    for name, mask in masks.items():
        assert not weight_of(model, name).qdata[~mask].any()


def test_a_parameter_put_where_a_mask_is_names_the_way_out(torchao: Any) -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MaskError, match=r"weight of a Linear carries a mask.*torchprune\.fold"):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(MaskError, match="carries a mask"):
        model[0].weight = nn.Parameter(torch.ones(48, 32))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model[0].bias = nn.Parameter(torch.ones(48))  # which has none
    model[0].register_parameter("more", nn.Parameter(torch.ones(2)))
    assert torch.equal(torchprune.fold(model)[0].bias, torch.ones(48))
