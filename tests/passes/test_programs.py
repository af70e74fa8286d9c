"""Pruning exported programs: the masks and weights that the eager path gives the same model."""

from __future__ import annotations

import copy
import functools

import pytest
import structures
import torch
from families import FAMILIES
from programs import Tied, assert_untouched, exported, masks_of, operators, outputs, state_of
from saved import QUIET
from sweeps import sample
from torch import Tensor, nn
from torch.export import ExportedProgram

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec, passes
from torchprune.errors import CalibrationError, SpecError, TargetError
from torchprune.specs.spec import Spec

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.export

FAMILIES_HERE = ["llama", "qwen3", "gemma", "gpt2", "opt", "bert", "t5", "vit", "mlp", "resnet"]


@functools.cache
def traced(name: str) -> tuple[nn.Module, ExportedProgram]:
    """A family's model and its program, which no test may change."""
    model = FAMILIES[name].make()
    return model, exported(model, FAMILIES[name].data()[0])


def assert_as_eager(
    name: str, spec: Spec, *, weights: bool = False, decomposed: bool = False
) -> None:
    (model, program), data = traced(name), FAMILIES[name].data()
    if decomposed:
        program = program.run_decompositions()
    state, ops = state_of(program), operators(program)
    other = copy.deepcopy(model)
    pruned = torchprune.sparsify(program, spec, data, **QUIET)
    assert_untouched(program, state, ops)
    torchprune.sparsify(other, spec, data, **QUIET)
    expected, found = torchprune.masks(other), masks_of(pruned)
    assert found.keys() == expected.keys()
    for key, mask in expected.items():
        assert torch.equal(found[key], mask), key
    torchprune.fold(other)
    folded = passes.fold_masks(pruned).program
    for key in expected:
        if weights:
            torch.testing.assert_close(folded.state_dict[key], other.state_dict()[key])
        else:
            assert torch.equal(folded.state_dict[key], other.state_dict()[key])
    for a, b in zip(outputs(pruned, data[0]), structures.outputs(other, data[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sample(FAMILIES_HERE, "gpt2", "t5", "vit", "mlp"))
def test_wanda_masks_are_those_of_the_eager_path(name: str) -> None:
    assert_as_eager(name, WandaSpec())


@pytest.mark.parametrize("name", sample(["llama", "bert", "mlp", "resnet"], "bert", "mlp"))
def test_decomposed_programs_are_pruned_alike(name: str) -> None:
    assert_as_eager(name, WandaSpec(), decomposed=True)


@pytest.mark.parametrize("name", sample(["llama", "bert", "resnet"], "resnet"))
def test_magnitude_masks_are_those_of_the_eager_path(name: str) -> None:
    assert_as_eager(name, MagnitudeSpec(sparsity=0.6))


@pytest.mark.parametrize(
    "spec",
    [
        WandaSpec(pattern="2:4"),
        WandaSpec(sequential="block"),
        WandaSpec(sequential="none"),
        WandaSpec(scope="global"),
        WandaSpec(overrides={"*.down_proj": "dense", "*.o_proj": 0.25}),
        WandaSpec(targets="*.mlp.*"),
    ],
    ids=str,
)
def test_options_mean_what_they_mean_there(spec: Spec) -> None:
    assert_as_eager("llama", spec)


@pytest.mark.parametrize(
    "spec",
    [SparseGPTSpec(), SparseGPTSpec(pattern="2:4"), SparseGPTSpec(sequential="none")],
    ids=str,
)
def test_sparsegpt_weights_are_those_of_the_eager_path(spec: Spec) -> None:
    assert_as_eager("llama", spec, weights=True)


def test_padding_does_not_count() -> None:
    model = FAMILIES["llama"].make().eval()
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(3):
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[0, 7:] = 0
        tokens = torch.randint(0, 50, (2, 12), generator=generator)
        batches.append({"input_ids": tokens, "attention_mask": mask})
    other = copy.deepcopy(model)
    pruned = torchprune.sparsify(exported(model, batches[0]), WandaSpec(), batches, **QUIET)
    torchprune.sparsify(other, WandaSpec(), batches, **QUIET)
    found = masks_of(pruned)
    for key, mask in torchprune.masks(other).items():
        assert torch.equal(found[key], mask), key


@pytest.mark.parametrize("sequential", ["layer", "block", "none"])
def test_a_layer_used_twice_is_pruned_on_both_uses(sequential: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.last = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.two(self.one(x) * torch.arange(8.0)).relu()) @ self.last

    model, data = Twice(), list(torch.randn(3, 5, 8))
    program = exported(model, data[0], dynamic=False)
    spec = WandaSpec(sequential=sequential)
    pruned = torchprune.sparsify(program, spec, data, **QUIET)
    torchprune.sparsify(model, spec, data, **QUIET)
    found = masks_of(pruned)
    for key, mask in torchprune.masks(model).items():
        assert torch.equal(found[key], mask), key


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.two((x + self.one(x)) * torch.arange(16.0))


class InPlace(Functional):
    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x += self.one(x)
        return self.two(x.mul_(torch.arange(16.0)))


class Blocks(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("sequential", ["layer", "block", "none"])
def test_writes_in_place_happen_once(sequential: str) -> None:
    model, other = Blocks(InPlace), Blocks(Functional)
    other.load_state_dict(model.state_dict())
    data, spec = list(torch.randn(3, 40, 16)), WandaSpec(sequential=sequential)
    program = exported(model, data[0])
    state, ops = state_of(program), operators(program)
    pruned = torchprune.sparsify(program, spec, data, **QUIET)
    assert_untouched(program, state, ops)
    torchprune.sparsify(other, spec, data, **QUIET)
    found = masks_of(pruned)
    for key, mask in torchprune.masks(other).items():
        assert torch.equal(found[key], mask), key


def test_tied_weights_stay_dense() -> None:
    program = exported(Tied(), torch.randint(0, 10, (2, 3)))
    with pytest.raises(TargetError, match="nothing to prune"):
        torchprune.sparsify(program, MagnitudeSpec(), **QUIET)


def test_wrong_calls_leave_the_program_as_it_was() -> None:
    model, data = FAMILIES["llama"].make().eval(), FAMILIES["llama"].data()
    program = exported(model, data[0])
    state, ops = state_of(program), operators(program)
    for call, error, match in [
        ((WandaSpec(),), CalibrationError, "needs calibration data for an ExportedProgram"),
        ((WandaSpec(targets="nope"), data), TargetError, "nope"),
        ((WandaSpec(), [torch.randn(2, 3)]), Exception, ""),
    ]:
        with pytest.raises(error, match=match):
            torchprune.sparsify(program, *call, **QUIET)
    with pytest.raises(SpecError, match="keep_dense"):
        torchprune.sparsify(program, MagnitudeSpec(), keep_dense=True, **QUIET)
    with pytest.raises(SpecError, match="got int"):
        torchprune.sparsify(7, MagnitudeSpec(), **QUIET)  # type: ignore[type-var]
    assert_untouched(program, state, ops)


def test_inputs_that_are_not_finite_are_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    program = exported(model, torch.randn(3, 8))
    with pytest.raises(CalibrationError, match="0: its inputs hold inf or NaN"):
        torchprune.sparsify(program, WandaSpec(), [torch.full((3, 8), torch.inf)], **QUIET)
