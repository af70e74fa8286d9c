"""What differentiates, batches and traces: lowered layers and packed graphs go through it all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import torchprune
from torchprune import MagnitudeSpec, passes

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own too

Run = Callable[[Tensor], Tensor]


def masked() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 24), nn.Tanh(), nn.Linear(24, 66))
    return torchprune.sparsify(model, MagnitudeSpec(), progress=False)


def eager(dtype: torch.dtype | None = None) -> nn.Module:
    return torchprune.lower(masked(), "bitmask", dtype=dtype)


def packed_graph() -> nn.Module:
    model, rows = torchprune.fold(masked()), torch.export.Dim("rows", min=1)
    program = torch.export.export(model, (torch.randn(3, 70),), dynamic_shapes=({0: rows},))
    passed = passes.pack_linears(program)
    assert len(passed.modified) == 2
    return passed.program.module()


FORMS = {"lowered": eager, "packed": packed_graph, "int8": lambda: eager(torch.int8)}

WAYS: dict[str, Callable[[Run, Tensor], Any]] = {
    "grad": lambda run, x: grad(lambda x: run(x).square().sum())(x),
    "jacrev": lambda run, x: jacrev(run)(x),
    "jacfwd": lambda run, x: jacfwd(run)(x),
    "hessian": lambda run, x: hessian(lambda x: run(x).square().sum())(x),
    "grad of grad": lambda run, x: grad(
        lambda x: grad(lambda y: run(y).square().sum())(x).sin().sum()
    )(x),
    "jvp of vmap": lambda run, x: jvp(vmap(run), (x[:, None],), (x[:, None] + 1,)),
    "jvp": lambda run, x: jvp(run, (x,), (x + 1,)),
    "vmap": lambda run, x: vmap(run)(x.expand(4, *x.shape)),
    "vmap of columns": lambda run, x: vmap(run, 1, 1)(x.unsqueeze(1).expand(-1, 4, -1)),
    "vmap of grad": lambda run, x: vmap(grad(lambda x: run(x[None]).square().sum()))(x),
    "backward": lambda run, x: torch.autograd.grad(run(y := x.requires_grad_()).square().sum(), y),
    "twice": lambda run, x: torch.autograd.functional.hessian(lambda y: run(y).sin().sum(), x),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_transforms_give_what_they_give_of_the_dense_model(form: str, way: str) -> None:
    model: Any = FORMS[form]()
    dense = torchprune.lift(eager(torch.int8 if form == "int8" else None))
    x = torch.randn(2, 70)
    found, expected = WAYS[way](model, x.clone()), WAYS[way](dense, x.clone())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_biases_learn_and_may_differ_from_item_to_item() -> None:
    model, dense = eager(), torchprune.fold(masked())
    x, biases = torch.randn(5, 70), torch.randn(4, 24)

    def run(bias: Tensor, of: nn.Module) -> Tensor:
        return functional_call(of, {"0.bias": bias}, (x,))

    for way in (vmap(run, (0, None)), vmap(jacrev(run), (0, None))):
        torch.testing.assert_close(way(biases, model), way(biases, dense), rtol=1e-4, atol=1e-4)
    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(model[2].bias.grad, dense[2].bias.grad, rtol=1e-4, atol=1e-4)


def test_a_weight_for_each_item_is_refused_in_a_sentence() -> None:
    model = eager()
    values, x = model[0].values.expand(3, -1), torch.randn(2, 70)
    with pytest.raises(RuntimeError, match=r"a packed weight of its own.*torchprune\.lift"):
        vmap(lambda v: functional_call(model, {"0.values": v}, (x,)))(values)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("form", ["masked", "lowered", "int8"])
def test_jit_trace_records_any_form(form: str, learns: bool) -> None:
    model = masked() if form == "masked" else FORMS[form]()
    x = torch.randn(2, 70)
    with torch.set_grad_enabled(learns):
        traced = torch.jit.trace(model, x)
        assert "PythonOp" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x[:1]), model(x[:1]))
        if form == "masked":  # the masks are in the graph: new weights have the zeros, too
            traced.get_parameter("0.parametrizations.weight.original").data.fill_(1.0)
            torch.testing.assert_close(traced(x), model(x))


def test_a_lowered_model_without_data_can_be_printed() -> None:
    assert "zeros=unknown" in str(eager().to("meta"))
    text = []

    def run(x: Tensor) -> Tensor:
        text.append(str(model))
        return model(x)

    model = eager()
    vmap(run)(torch.randn(2, 3, 70))
    vmap(lambda starts: text.append(repr_with(model, starts)) or starts)(
        model[0].starts.expand(2, -1)
    )
    assert "zeros=" in text[0]
    assert "zeros=unknown" in text[1]


def repr_with(model: Any, starts: Tensor) -> str:
    kept, model[0]._buffers["starts"] = model[0].starts, starts
    try:
        return str(model)
    finally:
        model[0]._buffers["starts"] = kept
