"""`torch.compile(backend="torchprune")`: what is folded and packed, and that changes are seen."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from saved import output
from sweeps import sample
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule
from torch.nn.utils import parametrize

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import LoweringError

pytestmark = [  # of torch.compile and transformers
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


NAMES = ["llama", "qwen3", "gemma", "gpt2", "opt", "bert", "t5", "vit"]


class Seen:
    """An inner backend that keeps the graphs it is given."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, graph: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        assert len(example_inputs) == sum(n.op == "placeholder" for n in graph.graph.nodes)
        return graph.forward

    @property
    def operators(self) -> list[str]:
        nodes = [n for graph in self.graphs for n in graph.graph.nodes]
        return [str(n.target) for n in nodes if n.op in ("call_function", "call_method")]

    @property
    def packed(self) -> int:
        return sum("bitmask_linear" in name for name in self.operators)


def compiled(model: nn.Module, **options: Any) -> tuple[Callable[..., Any], Seen]:
    seen = Seen()
    options = {"backend": seen, **options}
    return torch.compile(model, backend="torchprune", options=options, fullgraph=True), seen


def small(*, sparsity: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    return torchprune.sparsify(model, MagnitudeSpec(sparsity=sparsity), progress=False)


def fuller(model: nn.Module) -> dict[str, Tensor]:
    """Masks that keep more: nine tenths."""
    return {name: torch.rand(mask.shape) < 0.9 for name, mask in torchprune.masks(model).items()}


@pytest.mark.parametrize("folded", [False, True], ids=["masked", "folded"])
@pytest.mark.parametrize("name", sample(NAMES, "llama", "bert"))
def test_every_pruned_layer_of_a_family_is_packed(name: str, folded: bool) -> None:
    family = FAMILIES[name]
    model, batch = family.make().eval(), family.data()[0]
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    layers = len(torchprune.masks(model))
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    expected = output(model, batch)
    if folded:
        torchprune.fold(model)
    run, seen = compiled(model)
    torch.testing.assert_close(output(run, batch), expected, rtol=1e-4, atol=1e-4)
    assert len(seen.graphs) == 1
    assert seen.packed >= layers
    assert not any(name in ("mul", "where") and "mask" in name for name in seen.operators)


def test_masks_of_convolutions_are_folded_and_the_rest_is_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    run, seen = compiled(model)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(output(run, x), output(model, x))
    assert seen.packed == 1
    assert not any("view" in name for name in seen.operators)  # no masking left
    inputs = [n.name for n in seen.graphs[0].graph.nodes if n.op == "placeholder"]
    assert not any("mask" in name or "original" in name for name in inputs)


def test_dense_only_folds() -> None:
    model = small()
    run, seen = compiled(model, lower="dense")
    x = torch.randn(5, 16)
    assert torch.equal(output(run, x), output(model, x))
    assert seen.packed == 0
    assert len(seen.operators) == 3


def test_dense_weights_and_other_parametrizations_are_left() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0.5

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    parametrize.register_parametrization(model[1], "weight", Halved())
    run, seen = compiled(model)
    x = torch.randn(5, 16)
    assert torch.equal(output(run, x), output(model, x))
    assert seen.packed == 0


def test_a_weight_with_another_reader_keeps_its_mask_in_the_graph() -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer.parametrizations.weight.original.sum()

    model = torchprune.sparsify(Peeks(), MagnitudeSpec(), progress=False)
    run, seen = compiled(model)
    x = torch.randn(5, 16)
    torch.testing.assert_close(output(run, x), output(model, x))
    assert seen.packed == 0


def test_tied_weights_are_left() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 16)
            self.embed.weight.data[torch.rand(10, 16) < 0.6] = 0

        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.linear(self.embed(tokens), self.embed.weight)

    model, tokens = Tied(), torch.randint(0, 10, (2, 3))
    run, seen = compiled(model)
    assert torch.equal(output(run, tokens), output(model, tokens))
    assert seen.packed == 0


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("lower", ["bitmask", "dense"])
def test_changed_masks_and_weights_take_effect_without_recompiling(
    lower: str, inference: bool
) -> None:
    model, x = small(), torch.randn(5, 16)
    run, seen = compiled(model, lower=lower)
    original = model[0].parametrizations.weight.original

    def agree() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            torch.testing.assert_close(run(x), model(x))

    agree()
    torchprune.sparsify(model, MagnitudeSpec(sparsity=0.7), progress=False)
    agree()
    torchprune.apply_masks(model, fuller(model))
    agree()
    with torch.no_grad():
        original.mul_(3)
    agree()
    for _ in range(3):  # each time another storage
        original.data = torch.randn_like(original)
        agree()
    state = {name: t.flip(0) for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    agree()
    assert len(seen.graphs) == 1


def test_gradients_reach_kept_weights_only() -> None:
    model, x = small(), torch.randn(5, 16)
    run, seen = compiled(model)
    run(x).square().sum().backward()
    for name, mask in torchprune.masks(model).items():
        grad = model[int(name[0])].parametrizations.weight.original.grad
        assert not grad[~mask].any()
        assert grad[mask].any()
    assert seen.packed == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # a step, then an evaluation
        model.zero_grad()
        run(x).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(output(run, x), output(model, x))
    assert seen.packed == 2
    assert len(seen.graphs) == 2  # one for each mode


def test_blocks_that_share_a_graph_keep_their_own_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    counter = CompileCounterWithBackend("eager")
    masks = [layer.parametrizations.weight[0] for layer in model]
    weights = [torch.randn(16, 16) for _ in masks]
    for mask in masks:
        mask.compile(backend="torchprune", options={"backend": counter})
    for _ in range(2):
        for mask, weight in zip(masks, weights, strict=True):
            with torch.no_grad():
                assert torch.equal(mask(weight), torch.where(mask.mask, weight, 0))
    assert counter.frame_count == 1


def test_prepared_weights_go_with_the_model() -> None:
    model = small()
    run, seen = compiled(model)
    output(run, torch.randn(5, 16))
    assert seen.packed == 2
    gone = weakref.ref(model[0].parametrizations.weight.original)
    del model, run, seen
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_under_autocast_and_with_other_dtypes() -> None:
    model, x = small(), torch.randn(5, 16)
    run, _ = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = output(run, x), output(model, x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)
        torch.testing.assert_close(
            output(run, x.to(dtype)), output(model, x.to(dtype)), rtol=2e-2, atol=2e-2
        )


def test_sizes_may_vary() -> None:
    model, seen = small(), Seen()
    run = torch.compile(model, backend="torchprune", options={"backend": seen}, dynamic=True)
    for rows in (5, 9, 40):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(output(run, x), output(model, x))
    assert len(seen.graphs) == 1


@pytest.mark.parametrize("lower", ["bitmask", "dense"])
def test_inductor_compiles_what_is_left(lower: str) -> None:
    model, x = small(), torch.randn(5, 16)
    run = torch.compile(model, backend="torchprune", options={"lower": lower}, fullgraph=True)
    torch.testing.assert_close(output(run, x), output(model, x))
    torchprune.apply_masks(model, fuller(model))
    torch.testing.assert_close(output(run, x), output(model, x))


def test_a_graph_without_zeros_is_passed_on_and_said(caplog: pytest.LogCaptureFixture) -> None:
    run, seen = compiled(nn.Linear(8, 8))
    with caplog.at_level(logging.INFO, "torchprune.lowering.backend"):
        output(run, torch.randn(2, 8))
    assert seen.packed == 0
    assert "nothing to fold or pack" in caplog.text


@pytest.mark.parametrize(
    ("options", "match"),
    [({"lowr": "dense"}, "no option 'lowr'; it takes backend, lower, min_sparsity"),
     ({"lowr": "dense", "backend": Seen()}, "no option 'lowr'.* Seen takes none"),
     ({"lower": "csr"}, "lower must be 'bitmask' or 'dense', got 'csr'")],
)  # fmt: skip
def test_wrong_options_say_what_there_is(options: dict[str, Any], match: str) -> None:
    run = torch.compile(small(), backend="torchprune", options=options)
    with pytest.raises(Exception, match=match) as caught:
        run(torch.randn(2, 16))
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, LoweringError):
        cause = cause.__cause__ or getattr(cause, "inner_exception", None)
    assert cause is not None


@pytest.mark.parametrize("how", [{"mode": "reduce-overhead"},
                                 {"options": {"epilogue_fusion": False, "lower": "dense"}},
                                 {"options": {"max-autotune": False}}])  # fmt: skip
def test_what_inductor_takes_goes_on_to_it(how: dict[str, Any]) -> None:
    from torch._dynamo.backends import registry

    model, x, seen = small(), torch.randn(2, 16), []
    before = registry.lookup_backend("inductor")

    def inductor(graph: GraphModule, inputs: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return graph.forward

    registry._COMPILER_FNS["inductor"] = inductor
    try:
        run = torch.compile(model, backend="torchprune", **how)
        torch.testing.assert_close(output(run, x), output(model, x))
    finally:
        registry._COMPILER_FNS["inductor"] = before
    if "mode" in how:
        assert seen == [torch._inductor.list_mode_options(how["mode"])]
    else:
        given = {name.replace("-", "_"): value for name, value in how["options"].items()}
        assert seen == [{name: value for name, value in given.items() if name != "lower"}]


def test_what_another_backend_takes_goes_on_to_it() -> None:
    seen: list[Any] = []

    def inner(graph: GraphModule, inputs: Any, *, mode: Any = None, options: Any = None) -> Any:
        seen.append((mode, options))
        return graph.forward

    x = torch.randn(2, 16)
    options = {"backend": inner, "fast": True}
    output(torch.compile(small(), backend="torchprune", options=options), x)
    assert seen == [(None, {"fast": True})]


def test_the_name_is_known_without_importing_torchprune() -> None:
    code = (
        "import torch; f = torch.compile(torch.nn.Linear(4, 4), backend='torchprune',"
        " options={'backend': 'eager'}); print(f(torch.ones(1, 4)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch.Size([1, 4])" in done.stdout
