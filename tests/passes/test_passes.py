"""Graph passes: the same numbers, on programs of every family, and nothing else touched."""

from __future__ import annotations

import copy
import io
import re

import pytest
import structures
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Tied, assert_untouched, exported, operators, outputs, state_of
from sweeps import sample
from torch import Tensor, nn
from torch.export import ExportedProgram

import torchprune
from torchprune import MagnitudeSpec, passes
from torchprune.errors import LoweringError, MaskError
from torchprune.lowering.bitmask import Bitmask
from torchprune.passes.program import Passed

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.export
NAMES = ["llama", "qwen3", "gemma", "mixtral", "gpt2", "opt", "bert", "t5", "vit", "resnet", "mlp"]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sample(NAMES, "llama", "mixtral", "resnet"))
def test_insert_fold_and_pack_on_every_family(name: str) -> None:
    model, batch = FAMILIES[name].make().eval(), FAMILIES[name].data()[0]
    program = exported(model, batch)
    state, ops = state_of(program), operators(program)
    model = copy.deepcopy(model)  # folding it would change the tensors that the program shares
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    masks = {key: mask.clone() for key, mask in torchprune.masks(model).items()}
    expected = structures.outputs(torchprune.fold(model), batch)

    masked = passes.insert_masks(program, masks)
    assert masked.modified == list(masks)
    assert_untouched(program, state, ops)
    assert_same_bits(outputs(masked.program, batch), expected)

    folded = passes.fold_masks(masked.program)
    assert sorted(folded.modified) == sorted(masks)
    assert operators(folded.program) == ops
    assert_same_bits(outputs(folded.program, batch), expected)
    assert folded.program.state_dict.keys() == state.keys()
    for key, mask in masks.items():
        assert not folded.program.state_dict[key][~mask].any()
        assert torch.equal(folded.program.state_dict[key][mask], state[key][mask])

    packed = passes.pack_linears(folded.program)
    linear = {key for key in masks if folded.program.state_dict[key].dim() == 2}
    larger = {key for key, why in packed.left.items() if why.startswith("packed it takes")}
    assert set(packed.modified) == linear - larger
    assert len(packed.modified) >= len(larger)
    assert operators(packed.program)["torchprune.bitmask_linear.default"] >= len(packed.modified)
    assert not packed.program.state_dict.keys() & set(packed.modified)
    assert_close(outputs(packed.program, batch), expected)
    assert_untouched(program, state, ops)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_masks_of_sparsify_are_folded_decomposed_or_not(name: str) -> None:
    model, batch = FAMILIES[name].make(), FAMILIES[name].data()[0]
    torchprune.sparsify(model, MagnitudeSpec(pattern="2:4"), progress=False)
    count = len(torchprune.masks(model))
    program = exported(model, batch)
    expected = outputs(program, batch)
    for form in (program, program.run_decompositions()):
        folded = passes.fold_masks(form)
        assert len(folded.modified) == count
        assert not any("where" in op and "Scalar" in op for op in operators(folded.program))
        assert not any(n.endswith(".mask") for n in folded.program.state_dict)
        assert_close(outputs(folded.program, batch), expected)
        packed = passes.pack_linears(folded.program)
        assert len(packed.modified) == count
        assert_close(outputs(packed.program, batch), expected)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8, bias=False))


def masked_program() -> tuple[ExportedProgram, dict[str, Tensor]]:
    program = exported(plain(), torch.randn(4, 64))
    generator = torch.Generator().manual_seed(1)
    masks = {
        f"{i}.weight": torch.rand(program.state_dict[f"{i}.weight"].shape, generator=generator)
        < 0.5
        for i in (0, 2)
    }
    return passes.insert_masks(program, masks).program, masks


def test_programs_stay_dynamic_and_survive_a_file() -> None:
    program, _ = masked_program()
    folded = passes.fold_masks(program).program
    packed = passes.pack_linears(folded).program
    for made in (program, folded, packed):
        file = io.BytesIO()
        torch.export.save(made, file)
        file.seek(0)
        again = torch.export.load(file)
        for rows in (2, 7, 33):
            x = torch.randn(rows, 64)
            assert_close(outputs(made, x), outputs(folded, x))
            assert_same_bits(outputs(again, x), outputs(made, x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_programs_run_under_compilers(backend: str) -> None:
    program, _ = masked_program()
    x = torch.randn(5, 64)
    expected = outputs(program, x)
    for made in (program, passes.pack_linears(passes.fold_masks(program).program).program):
        with torch.no_grad():
            found = torch.compile(made.module(), backend=backend, fullgraph=True)(x)
        assert_close([found], expected)


def test_new_mask_values_change_the_pruning_without_a_new_program() -> None:
    program, masks = masked_program()
    x = torch.randn(3, 64)
    program.state_dict["0.weight_mask"].zero_()
    weight = program.state_dict["2.weight"]
    bias = program.state_dict["0.bias"]
    expected = torch.relu(bias).expand(3, -1) @ torch.where(masks["2.weight"], weight, 0.0).T
    assert_close(outputs(program, x), [expected.detach()])


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31), st.booleans())
def test_folding_is_bit_equal_for_any_weight(rows: int, cols: int, seed: int, odd: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(cols, rows))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(rows, cols, generator=generator))
    mask = torch.rand(rows, cols, generator=generator) < 0.5
    if odd:  # what is masked out leaves no trace, whatever it was
        model[0].weight.data[~mask] = torch.tensor(float("nan"))
    x = torch.randn(2, cols, generator=generator)
    masked = passes.insert_masks(exported(model, x, dynamic=False), {"0.weight": mask}).program
    folded = passes.fold_masks(masked).program
    assert_same_bits(outputs(folded, x), outputs(masked, x))
    assert not folded.state_dict["0.weight"][~mask].any()
    assert not outputs(folded, x)[0].isnan().any()


def test_convolutions_are_masked_and_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    x = torch.randn(2, 4, 9, 9)
    masks = {f"{i}.weight": torch.rand_like(model[i].weight) < 0.5 for i in (0, 2)}
    masked = passes.insert_masks(exported(model, x), masks)
    folded = passes.fold_masks(masked.program)
    assert_same_bits(outputs(folded.program, x), outputs(masked.program, x))
    assert str(passes.pack_linears(folded.program)) == "pack_linears: nothing to do"


class Wasteful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        self.steps.add_(1)
        return self.used(x)


def test_strip_dead_takes_what_nobody_reads_and_keeps_what_is_written() -> None:
    model, x = Wasteful(), torch.randn(2, 8)
    program = exported(model, x)
    stripped = passes.strip_dead(program)
    assert sorted(stripped.modified) == ["unused.bias", "unused.weight"]
    assert sorted(stripped.program.state_dict) == ["steps", "used.bias", "used.weight"]
    assert operators(stripped.program)["aten.linear.default"] == 1
    assert_same_bits(outputs(stripped.program, x), outputs(program, x))
    assert passes.strip_dead(stripped.program).modified == []


def test_a_pass_with_nothing_to_do_says_so() -> None:
    program = exported(plain(), torch.randn(4, 64))
    for found in (passes.fold_masks(program), passes.insert_masks(program, {})):
        assert isinstance(found, Passed)
        assert str(found).endswith("nothing to do")
    left = passes.pack_linears(program)
    assert left.modified == []
    assert "left: 0.weight: less than 25% of it is zero" in str(left)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_weights_are_packed_where_that_makes_them_smaller(
    rows: int, cols: int, share: float
) -> None:
    model = nn.Sequential(nn.Linear(cols, rows, bias=False))
    with torch.no_grad():
        flat = torch.arange(1.0, rows * cols + 1)
        flat[: int(share * rows * cols)] = 0
        model[0].weight.copy_(flat.reshape(rows, cols))
    program = exported(model, torch.ones(2, cols), dynamic=False)
    dense = sum(t.nbytes for t in program.state_dict.values())
    passed = passes.pack_linears(program, min_sparsity=0.0)
    size = sum(t.nbytes for t in passed.program.state_dict.values())
    assert size <= dense
    assert (size < dense) is bool(passed.modified)
    if not passed.modified and share < 1:
        assert re.fullmatch(r"packed it takes .* bytes and dense .*", passed.left["0.weight"])
        assert Bitmask.pack(model[0].weight).nbytes >= dense
    saved = dense - size
    for least, packs in ((saved, True), (saved + 1, False)) if saved else ():
        again = passes.pack_linears(program, min_sparsity=0.0, min_saving=least)
        assert bool(again.modified) is packs


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        ({"0.wieght": torch.ones(96, 64, dtype=torch.bool)}, r"did you mean '0\.weight'"),
        ({"0.weight": torch.ones(96, 64)}, "expected a bool mask"),
        ({"0.weight": torch.ones(64, 96, dtype=torch.bool)}, r"\(96, 64\), got .*\(64, 96\)"),
    ],
)
def test_wrong_masks_are_refused(masks: dict[str, Tensor], match: str) -> None:
    program = exported(plain(), torch.randn(4, 64))
    state, ops = state_of(program), operators(program)
    with pytest.raises(MaskError, match=match):
        passes.insert_masks(program, masks)
    assert_untouched(program, state, ops)


def test_second_masks_tied_weights_and_unknown_formats_are_refused() -> None:
    program, masks = masked_program()
    with pytest.raises(MaskError, match="carries a mask already"):
        passes.insert_masks(program, masks)
    tied = exported(Tied(), torch.randint(0, 10, (2, 3)))
    assert {"embed.weight", "head.weight"} <= tied.state_dict.keys()
    name = "head.weight"
    with pytest.raises(MaskError, match="tied to"):
        passes.insert_masks(tied, {name: torch.ones(10, 8, dtype=torch.bool)})
    with pytest.raises(LoweringError, match="'bitmask'"):
        passes.pack_linears(program, "zip")
