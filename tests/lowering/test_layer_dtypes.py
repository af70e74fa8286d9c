"""The dtypes of lowered layers: what lifting gives back, and what autocast makes of them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, passes

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def folded(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 24, bias=bias), nn.ReLU(), nn.Linear(24, 8, bias=bias))
    return torchprune.fold(torchprune.sparsify(model, MagnitudeSpec(), progress=False))


MOVES: dict[str, Any] = {
    "nothing": lambda model: model,
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "to bfloat16 and back": lambda model: model.to(torch.bfloat16).float(),
    "double": lambda model: model.double(),
    "type": lambda model: model.type(torch.bfloat16),
}


@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("dtype", [None, *FLOATS, torch.int8], ids=str)
def test_lifted_layers_have_one_dtype_and_run(
    dtype: torch.dtype | None, move: str, bias: bool
) -> None:
    model, like = torchprune.lower(folded(bias=bias), "bitmask", dtype=dtype), folded(bias=bias)
    model, like = MOVES[move](model), MOVES[move](like)
    assert model[0].weight.dtype == like[0].weight.dtype
    torchprune.lift(model)
    for layer in (model[0], model[2]):
        assert type(layer) is nn.Linear
        assert {p.dtype for p in layer.parameters()} == {like[0].weight.dtype}
    x = torch.randn(3, 48).to(like[0].weight.dtype)
    found, expected = model(x), like(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05)
    if dtype is None:
        assert torch.equal(model[0].weight, like[0].weight)


def test_a_layer_takes_the_dtype_of_a_bias_that_is_assigned() -> None:
    model = torchprune.lower(folded(), "bitmask", dtype=torch.int8)
    other = torchprune.lower(folded().bfloat16(), "bitmask", dtype=torch.int8)
    model.load_state_dict(other.state_dict(), assign=True)
    torchprune.lift(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def ran(run: Any, x: Tensor, mode: str, autocast: torch.dtype | None) -> dict[str, Any]:
    """Dtypes of the output and gradients, and the output, or which error there was."""
    x = x.clone()
    if mode == "gradients":
        x.requires_grad_()
    try:
        with (
            torch.set_grad_enabled(mode != "no_grad"),
            torch.autocast("cpu", autocast, enabled=autocast is not None),
        ):
            y = run(x)
    except RuntimeError:
        return {"error": True}
    found = {"dtype": y.dtype, "grads": y.requires_grad, "y": y.detach()}
    if y.requires_grad and mode == "gradients":
        y.float().sum().backward()
        assert x.grad is not None
        found |= {"x": x.grad.dtype, "dx": x.grad}
    return found


CASES = list(
    itertools.product(
        ["no_grad", "grad", "gradients"], [None, torch.bfloat16, torch.float16], FLOATS, FLOATS
    )
)


@pytest.mark.parametrize("trains", [True, False], ids=["bias trains", "bias frozen"])
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
def test_lowered_layers_give_the_dtypes_of_linear_ones(bias: bool, trains: bool) -> None:
    for mode, autocast, wide, dtype in CASES:
        plain = folded(bias=bias).to(dtype)[0]
        plain.weight.requires_grad_(False)
        if bias:
            plain.bias.requires_grad_(trains)
        layer = torchprune.lower(nn.Sequential(copy.deepcopy(plain)), "bitmask")[0]
        x = torch.randn(3, 48).to(wide)
        expected, found = ran(plain, x, mode, autocast), ran(layer, x, mode, autocast)
        case = (mode, autocast, wide, dtype)
        if "error" in expected:  # other dtypes than the weight's, which a lowered layer takes
            assert autocast is None, case
            assert wide != dtype, case
            continue
        for key in ("dtype", "grads", "x"):
            assert found.get(key) == expected.get(key), (case, key)
        for key in ("y", "dx"):
            if key in expected:
                torch.testing.assert_close(found[key], expected[key], rtol=0.05, atol=0.05)
        if bias and trains and mode == "gradients":
            assert layer.bias.grad.dtype == plain.bias.grad.dtype
            torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore")  # of torch.compile and torch.export
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
def test_packed_programs_and_the_backend_give_the_dtypes_of_linear_ones(bias: bool) -> None:
    plain, x = folded(bias=bias).requires_grad_(False), torch.randn(3, 48)
    program = torch.export.export(plain, (x,))
    forms = (program, program.run_decompositions())
    runs = [passes.pack_linears(form).program.module() for form in forms]
    torch._dynamo.reset()
    runs.append(torch.compile(plain, backend="torchprune", options={"backend": "eager"}))
    for mode, autocast in itertools.product(("no_grad", "grad"), (None, torch.bfloat16)):
        for wide in (torch.float32, torch.bfloat16):
            expected = ran(plain, x.to(wide), mode, autocast)
            for run in runs if "error" not in expected else []:
                found = ran(run, x.to(wide), mode, autocast)
                assert found["dtype"] == expected["dtype"], (mode, autocast, wide)
                torch.testing.assert_close(found["y"], expected["y"], rtol=0.05, atol=0.05)
    torch._dynamo.reset()


def test_gradients_are_of_the_weights_that_the_output_came_from() -> None:
    layer, x = torchprune.lower(folded(), "bitmask")[0], torch.randn(3, 48, requires_grad=True)
    y = layer(x)
    layer.values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_layers_compile_with_gradients() -> None:
    layer, x = torchprune.lower(folded(), "bitmask")[0], torch.randn(3, 48, requires_grad=True)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    (found,) = torch.autograd.grad(run(x).square().sum(), x)
    torch.testing.assert_close(found, wanted)
