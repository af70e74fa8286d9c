"""Sparsified and lowered models under torch.compile: one graph, no recompilation for new masks."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from saved import output
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import torchprune
from torchprune import MagnitudeSpec

pytestmark = [  # of torch.compile and transformers
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


@pytest.mark.parametrize("lowered", [False, True], ids=["masked", "lowered"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_models_compile_whole_and_compute_the_same(name: str, lowered: bool) -> None:
    model = torchprune.sparsify(FAMILIES[name].make(), MagnitudeSpec(), progress=False).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if lowered:
        torchprune.lower(model, "bitmask")
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = output(model, tokens)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(output(compiled, tokens), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("train", [False, True])
def test_new_masks_take_effect_without_recompiling(train: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(5, 16)
    with torch.set_grad_enabled(train):
        for sparsity in (0.5, 0.7, 0.9):
            torchprune.sparsify(model, MagnitudeSpec(sparsity=sparsity), progress=False)
            found, expected = compiled(x), model(x)
            torch.testing.assert_close(found, expected)
            if train:
                model.zero_grad()
                found.square().sum().backward()
                for name, mask in torchprune.masks(model).items():
                    layer = model[int(name[0])]
                    grad = layer.parametrizations.weight.original.grad
                    assert not grad[~mask].any()
                    assert grad[mask].any()
    assert counter.frame_count == 1


def test_code_that_reads_data_compiles_with_the_mask() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / self.weight.data.norm() + x @ self.weight.mT

    torch.manual_seed(0)
    model = nn.Sequential(Scaled(16, 16), nn.Linear(16, 16))
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    x = torch.randn(3, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x), model(x))


class Block(nn.Module):
    """What models repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


FORMS = {
    "dense": lambda model: model,
    "masked": lambda model: torchprune.sparsify(model, MagnitudeSpec(), progress=False),
    "folded": lambda model: torchprune.fold(FORMS["masked"](model)),
    "lowered": lambda model: torchprune.lower(FORMS["masked"](model), "bitmask"),
    "twice": lambda model: torchprune.sparsify(
        FORMS["masked"](model), MagnitudeSpec(0.7), progress=False
    ),
    "biases too": lambda model: torchprune.apply_masks(
        model, {name: p > 0 for name, p in model.named_parameters() if "norm" not in name}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_blocks_that_are_compiled_each_share_one_graph(form: str) -> None:
    torch.manual_seed(0)
    model = FORMS[form](nn.Sequential(*(Block() for _ in range(10))))
    x = torch.randn(3, 16)
    with torch.no_grad():
        expected = model(x)
        counter = CompileCounterWithBackend("eager")
        for block in model:
            block.compile(backend=counter, fullgraph=True)
        torch.testing.assert_close(model(x), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_masks_cost_no_graph_in_any_block_of_a_family(name: str) -> None:
    def graphs(form: str) -> int:
        torch._dynamo.reset()
        model = FORMS[form](FAMILIES[name].make())
        model.config.use_cache = False
        counter = CompileCounterWithBackend("eager")
        for blocks in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
            for block in blocks:
                block.compile(backend=counter)
        (batch,) = FAMILIES[name].data(count=1)
        model(**batch) if isinstance(batch, dict) else model(batch)
        return counter.frame_count

    dense = graphs("dense")
    assert graphs("masked") == graphs("lowered") == dense >= 1
