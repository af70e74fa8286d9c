"""Convolutions that are lowered to a bitmask where they are asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import LoweringError
from torchprune.lowering import convolutions
from torchprune.lowering.convolutions import BitmaskConv

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(deadline=None, max_examples=60)
@given(
    space=st.sampled_from([1, 2, 3]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    batch=st.sampled_from([None, 1, 3]),
    channels=st.integers(1, 5),
    size=st.integers(5, 8),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_computes_what_the_convolution_does(
    space: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: Any,
    mode: str,
    batch: int | None,
    channels: int,
    size: int,
    bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    stride = 1 if padding == "same" else stride
    conv = KINDS[space](
        channels, 7, kernel, stride, padding, dilation, bias=bias, padding_mode=mode
    )
    conv.weight.data[torch.rand(conv.weight.shape) < 0.6] = 0
    conv.weight.data.flatten()[: conv.weight.numel() // 2] = 0
    shape = (channels, *[size + at for at in range(space)])
    x = torch.randn(shape if batch is None else (batch, *shape))
    with torch.no_grad():
        want = conv(x)
    state = copy.deepcopy(conv.state_dict())
    model = nn.Sequential(conv)
    torchprune.lower(model, "bitmask", targets="0")
    assert isinstance(model[0], BitmaskConv)
    few, convolutions._FEW = convolutions._FEW, 64
    try:
        for most in (0, 1 << 20):  # unpacked, and as a product
            convolutions._FEW = most
            with torch.no_grad():
                torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    finally:
        convolutions._FEW = few
    torchprune.lift(model)
    assert model[0] is conv
    assert all(torch.equal(conv.state_dict()[key], value) for key, value in state.items())


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4)]
    rest = [nn.ReLU(), nn.Conv2d(16, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *rest, nn.Linear(24, 10)).eval()


def pruned() -> nn.Sequential:
    return torchprune.sparsify(cnn(), MagnitudeSpec(0.5), progress=False)


def test_by_default_convolutions_stay_and_the_plan_says_how_they_go() -> None:
    model = pruned()
    plan = torchprune.plan_lowering(model, "bitmask")
    assert [y.name for y in plan.layers] == ["7"]
    assert "lowered where targets= names it" in plan.left["0"]
    chosen = torchprune.plan_lowering(model, "bitmask", targets="*")
    assert [y.name for y in chosen.layers] == ["0", "4", "7"]
    assert "4 groups" in chosen.left["2"]
    torchprune.lower(model, "bitmask", targets="*")
    for planned in chosen.layers:
        held = model.get_submodule(planned.name).packed.nbytes
        assert held <= planned.after <= 1.02 * held
    assert "kernel_size=(3, 3)" in str(model[0])
    with pytest.raises(LoweringError, match="4 groups"):
        torchprune.lower(pruned(), "bitmask", targets="2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [9, 40], ids=["few positions", "many"])
def test_dtypes_autocast_and_int8(dtype: torch.dtype, size: int) -> None:
    model, x = torchprune.fold(pruned()).to(dtype), torch.randn(1, 3, size, size).to(dtype)
    with torch.no_grad():
        want = model(x)
    lowered = torchprune.lower(copy.deepcopy(model), "bitmask", targets="*")
    rounded = torchprune.lower(copy.deepcopy(model), "bitmask", targets="*", dtype=torch.int8)
    with torch.no_grad():
        assert lowered(x).dtype == dtype
        torch.testing.assert_close(lowered(x), want, rtol=3e-2, atol=1e-2)
        assert float((rounded(x) - want).float().abs().max()) < 0.05 * float(want.abs().max())
        if dtype == torch.float32:
            with torch.autocast("cpu", torch.bfloat16):
                assert lowered(x).dtype == torch.bfloat16
                torch.testing.assert_close(lowered(x), model(x), rtol=3e-2, atol=1e-2)


@pytest.mark.parametrize("size", [9, 40], ids=["few positions", "many"])
def test_gradients_reach_the_input_and_the_bias(size: int) -> None:
    model = torchprune.fold(pruned())
    lowered = torchprune.lower(copy.deepcopy(model), "bitmask", targets="*")
    x = torch.randn(2, 3, size, size)
    found = []
    for net in (model, lowered):
        given = x.clone().requires_grad_()
        net(given).square().sum().backward()
        found.append((given.grad, net[0].bias.grad, net[4].bias.grad))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiled_and_exported() -> None:
    model, x = torchprune.fold(pruned()), torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        want = model(x)
        torchprune.lower(model, "bitmask", targets="*")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-5)
