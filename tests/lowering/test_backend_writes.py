"""`backend="torchprune"` sees every write in place, also to tensors made in inference mode."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.lowering import backend

pytestmark = [  # of torch.compile
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


def made(*, folded: bool, inference: bool) -> nn.Module:
    """A sparsified model; with `inference`, its weights and masks are inference tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    if folded:
        torchprune.fold(model)
    if inference:
        with torch.inference_mode():
            state = {name: t.clone() for name, t in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        assert all(t.is_inference() for t in model.state_dict().values())
    return model


def by_state(model: nn.Module) -> None:
    model.load_state_dict({name: t.flip(0) for name, t in model.state_dict().items()})


def by_copy(model: nn.Module) -> None:
    for t in model.state_dict().values():
        t.copy_(t.flip(0).clone())


def by_view(model: nn.Module) -> None:
    for t in model.state_dict().values():
        t.view(-1)[: t.numel() // 2] = 0


def by_foreach(model: nn.Module) -> None:
    torch._foreach_zero_([*model.parameters()])


@pytest.mark.parametrize("write", [by_state, by_copy, by_view, by_foreach])
@pytest.mark.parametrize("inference", [False, True], ids=["ordinary", "inference"])
@pytest.mark.parametrize("folded", [False, True], ids=["masked", "folded"])
def test_writes_under_inference_mode_are_seen(
    write: Callable[[nn.Module], None], inference: bool, folded: bool
) -> None:
    model, x = made(folded=folded, inference=inference), torch.randn(3, 16)
    run = torch.compile(model, backend="torchprune", options={"backend": "eager"})
    with torch.inference_mode():
        before = run(x)
        torch.testing.assert_close(before, model(x))
        write(model)
        expected = model(x)
        assert not torch.equal(expected, before)
        torch.testing.assert_close(run(x), expected)


def test_inference_tensors_are_left_and_said(caplog: pytest.LogCaptureFixture) -> None:
    graphs: list[list[str]] = []

    def inner(graph: Any, example_inputs: Any) -> Callable[..., Any]:
        graphs.append([str(n.target) for n in graph.graph.nodes])
        return graph.forward  # type: ignore[no-any-return]

    x = torch.randn(3, 16)
    models = [made(folded=True, inference=inference) for inference in (False, True)]
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "torchprune.lowering.backend"):
        for model in models:  # the second has a graph of its own
            torch.compile(model, backend="torchprune", options={"backend": inner})(x)
    packed = [sum("bitmask_linear" in name for name in names) for names in graphs]
    assert packed == [2, 0]
    assert "2 weights are left as they are" in caplog.text


def test_a_prepared_weight_is_never_taken_for_an_inference_tensor() -> None:
    """Should dynamo's guards let one in."""
    runs: list[Any] = []

    def recorded(graph: Any, example_inputs: Any) -> Callable[..., Any]:
        runs.append(backend.compile_graph(graph, example_inputs, options={"backend": "eager"}))
        return lambda *args: runs.append(args) or runs[0](*args)  # type: ignore[func-returns-value]

    layer = made(folded=False, inference=False)[0]
    mask = layer.parametrizations.weight[0]
    mask.compile(backend=recorded)
    with torch.inference_mode():
        mask(layer.weight)
        run, args = runs
        args = tuple(t.clone() for t in args)
        first = run(*args)[0]
        for t in args:
            if t.shape == (24, 16) and t.is_floating_point():
                t.mul_(2)
        second = run(*args)[0]
    assert not torch.equal(first, second)
