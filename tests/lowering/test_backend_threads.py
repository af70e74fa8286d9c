"""Modules that share a compiled graph, called from several threads: each uses its own weights."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import torchprune
from torchprune import MagnitudeSpec
from torchprune.lowering import backend

pytestmark = [  # of torch.compile
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def block(seed: int, *, folded: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    made = Block()
    torchprune.sparsify(made, MagnitudeSpec(), progress=False)
    return torchprune.fold(made) if folded else made


class Recorder:
    """The backend, and the calls that dynamo makes of its graphs."""

    def __init__(self, **options: Any) -> None:
        self.options = {"backend": "eager", **options}
        self.runs: list[Callable[..., Any]] = []
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, graph: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        run = backend.compile_graph(graph, example_inputs, options=self.options)
        self.runs.append(run)

        def recorded(*args: Any) -> Any:
            self.calls.append(args)
            return run(*args)

        return recorded


def after_lines(count: int, call: Callable[[], Any], other: Callable[[], Any]) -> tuple[Any, bool]:
    """What a call gives if, after so many lines of the backend, another one runs in a thread.

    And whether there were so many lines.
    """
    left, switched = count, False

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left, switched
        if frame.f_code.co_filename != backend.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0 and not switched:
                switched = True
                thread = threading.Thread(target=other)
                thread.start()
                thread.join(timeout=10)
                assert not thread.is_alive(), "a call waits for another"
        return trace

    sys.settrace(trace)
    try:
        found = call()
    finally:
        sys.settrace(None)
    return found, switched


@pytest.mark.parametrize("changes", [False, True], ids=["unchanged", "changed"])
@pytest.mark.parametrize(
    ("lower", "shared"),
    [
        ("bitmask", "models"),
        ("bitmask", "blocks"),
        ("bitmask", "masked layers"),
        ("dense", "masked layers"),
    ],
)
@torch.no_grad()
def test_a_call_uses_its_own_weights_wherever_another_comes_between(
    lower: str, shared: str, changes: bool
) -> None:
    x, recorder = torch.randn(3, 16), Recorder(lower=lower)
    one, two = (block(seed, folded=shared != "masked layers") for seed in range(2))
    for model in (one, two):
        if shared == "models":
            torch.compile(model, backend=recorder)(x)
        else:
            mask = model.up.parametrizations.weight[0] if shared == "masked layers" else None
            part, given = (model, x) if mask is None else (mask, model.up.weight)
            part.compile(backend=recorder)
            part(given)
    assert len(recorder.runs) == 1  # they share it
    (run,), (mine, others) = recorder.runs, recorder.calls
    expected, not_this = run(*mine), run(*others)
    assert not torch.equal(expected[0], not_this[0])

    def other() -> None:
        with torch.no_grad():
            if changes:  # so that it is prepared anew
                next(two.parameters()).mul_(1.0)
            assert torch.equal(run(*others)[0], not_this[0])

    switches = 0
    while True:
        found, switched = after_lines(switches, lambda: run(*mine), other)
        assert torch.equal(found[0], expected[0]), f"another call came after line {switches}"
        if not switched:
            break
        switches += 1
    assert switches > 10


@pytest.mark.parametrize("folded", [False, True], ids=["masked", "folded"])
def test_threads_with_models_of_one_shape(folded: bool) -> None:
    models = [block(seed, folded=folded) for seed in range(3)]
    x = torch.randn(3, 16)
    with torch.no_grad():
        expected = [model(x) for model in models]
    runs = [torch.compile(m, backend="torchprune", options={"backend": "eager"}) for m in models]
    wrong: list[Tensor] = []

    def work(place: int) -> None:
        for turn in range(40):
            at = (place + turn) % len(runs)
            with torch.no_grad():
                found = runs[at](x)
            if not torch.allclose(found, expected[at], rtol=1e-4, atol=1e-5):
                wrong.append(found)

    with torch.no_grad():
        for run in runs:
            run(x)
    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
