"""Linear layers that feed linear layers: passes rewrite one and still know the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import exported, outputs
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

import torchprune
from torchprune import MagnitudeSpec, passes
from torchprune.export import load_pt2, to_pt2

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.export


class Chain(nn.Module):
    """Layers by name, and how they follow one another."""

    def __init__(self, forward: Callable[[Chain, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


class Turned(nn.Module):
    """As transformers' Conv1D: the weight is (in, out), the product an `addmm`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size) / 8)
        self.bias = nn.Parameter(torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(x.shape)


def linear(rows: int = 64, cols: int = 64, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(cols, rows, bias=bias)


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "two": lambda: nn.Sequential(linear(), linear()),
    "four": lambda: nn.Sequential(*(linear(bias=i % 2 > 0) for i in range(4))),
    "identity between": lambda: nn.Sequential(linear(), nn.Identity(), nn.Dropout(), linear()),
    "low rank": lambda: nn.Sequential(linear(64, 64), linear(24, 64, bias=False), linear(64, 24)),
    "applied twice": lambda: Chain(lambda m, x: m.a(m.a(x)), a=linear()),
    "there and back": lambda: Chain(lambda m, x: m.a(m.b(m.a(m.b(x)))), a=linear(), b=linear()),
    "turned": lambda: nn.Sequential(Turned(64), Turned(64), linear(), Turned(64)),
    "declared late first": lambda: Chain(lambda m, x: m.b(m.a(x)), b=linear(), a=linear()),
    "a computed bias": lambda: Chain(
        lambda m, x: F.linear(x, m.a.weight, m.b(m.a.bias)), a=linear(), b=linear()
    ),
    "input and bias of one product": lambda: Chain(
        lambda m, x: F.linear(m.a(x[0, 0]), m.b.weight, m.a(x[0, 0])), a=linear(), b=linear()
    ),
    "matmul": lambda: Chain(lambda m, x: (x @ m.a.weight.T) @ m.b.weight, a=linear(), b=linear()),
    "two readers": lambda: Chain(
        lambda m, x: m.b(h := m.a(x)) + m.c(h) + h, a=linear(), b=linear(), c=linear()
    ),
}
DECOMPOSITIONS: dict[str, Callable[[ExportedProgram], ExportedProgram]] = {
    "linear": lambda program: program,
    "decomposed": lambda program: program.run_decompositions(),
}


def sparse(chain: str) -> nn.Module:
    torch.manual_seed(0)
    model = CHAINS[chain]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight[torch.rand(weight.shape) < 0.5] = 0.0
    return model


CASES = [("linear", 3, True), ("decomposed", 2, True), ("decomposed", 3, False)]


@pytest.mark.parametrize(("form", "rank", "bias"), CASES, ids=["linear", "addmm", "mm and bmm"])
@pytest.mark.parametrize("chain", CHAINS)
def test_chains_are_packed_whole(chain: str, form: str, rank: int, bias: bool) -> None:
    if not bias and ("bias" in chain or "turned" in chain):
        pytest.skip("it needs its biases")
    if form == "linear" and chain == "matmul":
        pytest.skip("a linear layer only once it is decomposed")
    model = sparse(chain)
    x = torch.randn(3, 5, 64) if rank == 3 or "bias" in chain else torch.randn(5, 64)
    for layer in model.modules():
        if not bias and isinstance(layer, nn.Linear):
            layer.bias = None
    program = DECOMPOSITIONS[form](exported(model, x))
    expected = outputs(program, x)
    packed = passes.pack_linears(program)
    weights = {name for name, t in model.state_dict().items() if t.dim() == 2}
    assert set(packed.modified) == weights
    assert not packed.left
    for found, like in zip(outputs(packed.program, x), expected, strict=True):
        torch.testing.assert_close(found, like, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chain", ["four", "there and back", "turned"])
def test_masks_of_chains_are_put_in_and_folded(chain: str) -> None:
    model, x = sparse(chain), torch.randn(3, 5, 64)
    program = exported(model, x)
    masks = {n: t != 0 for n, t in model.state_dict().items() if t.dim() == 2}
    for form in DECOMPOSITIONS.values():
        masked = form(passes.insert_masks(program, masks).program)
        folded = passes.fold_masks(masked)
        assert set(folded.modified) == set(masks)
        for found, like in zip(outputs(folded.program, x), outputs(masked, x), strict=True):
            assert torch.equal(found, like)
        assert set(passes.pack_linears(folded.program).modified) == set(masks)


@pytest.mark.parametrize("chain", ["low rank", "applied twice"])
def test_chains_go_to_pt2(chain: str, tmp_path: Path) -> None:
    model, x = sparse(chain), torch.randn(3, 5, 64)
    report = to_pt2(model, tmp_path / "it.pt2", x)
    assert report.packed
    found = load_pt2(tmp_path / "it.pt2").module()(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chain", ["there and back", "turned"])
def test_chains_are_pruned_as_programs(chain: str) -> None:
    model, x = CHAINS[chain](), list(torch.randn(2, 3, 5, 64))
    program = torchprune.sparsify(exported(model, x[0]), MagnitudeSpec(), progress=False)
    folded = passes.fold_masks(program).program
    assert len(passes.pack_linears(folded).modified) == len(
        {n for n, p in model.named_parameters() if p.dim() == 2}
    )
