"""What we give to other suites: every assertion fails when it should, every strategy draws."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from hypothesis import find, given, settings
from torch import Tensor, nn

import torchprune
from torchprune import NM, Block, MagnitudeSpec, SparseGPTSpec, Unstructured, WandaSpec
from torchprune.errors import SpecError
from torchprune.masking import keeper
from torchprune.masking.keeper import values_of
from torchprune.masking.mask import Mask, masked_layers, original_of
from torchprune.masking.transaction import Changes
from torchprune.methods import block_counts, sparsegpt
from torchprune.specs.patterns import Pattern
from torchprune.specs.spec import Spec
from torchprune.testing import (
    SmallModel,
    assert_sparsity,
    check_laws,
    laws,
    patterns,
    small_models,
    specs,
    weights,
)

# -- assert_sparsity ------------------------------------------------------------------------------


def told(*args: Any, **options: Any) -> str:
    """The message of the AssertionError that must come."""
    with pytest.raises(AssertionError) as error:
        assert_sparsity(*args, **options)
    return str(error.value)


def test_exact_counts_pass_and_others_fail() -> None:
    t = torch.tensor([[0.0, 1, 2, 0], [3, 0, 0, 4]])
    for scope in (None, "row", "layer", "global"):
        assert_sparsity(t, "unstructured", 0.5, scope=scope)
    assert_sparsity(t, "unstructured")
    assert told(t, "unstructured", 0.75) == (
        "tensor: 4 of 8 weights are zero, expected exactly 6 (sparsity 0.75)"
    )
    t[0, 1] = 0
    assert "5 of 8 weights are zero, expected exactly 4" in told(t, "unstructured", 0.5)
    assert_sparsity(t, "unstructured", 0.5, exact=False)
    assert "expected at least 6" in told(t, "unstructured", 0.75, exact=False)


def test_rows_are_named() -> None:
    t = torch.tensor([[0.0, 0, 1, 2], [0, 1, 2, 3], [0, 0, 0, 1]])
    assert_sparsity(t, "unstructured", 0.5, scope="layer")
    assert told(t, "unstructured", 0.5, scope="row") == (
        "tensor: row 1: 1 of 4 weights are zero, expected exactly 2 (sparsity 0.5); "
        "2 of 3 rows are wrong"
    )
    assert "row 1: 1 of 4" in told(t, "unstructured", 0.5, scope="row", exact=False)


def test_without_a_scope_rows_or_the_whole_may_be_exact() -> None:
    rows = torch.ones(3, 5)
    rows[:, :2] = 0  # floor(5 / 2) in every row, 6 of 15
    assert_sparsity(rows, "unstructured", 0.5)
    assert "6 of 15 weights are zero, expected exactly 7" in told(
        rows, "unstructured", 0.5, scope="layer"
    )
    rows[0, 4] = 0
    assert_sparsity(rows, "unstructured", 0.5)
    rows[0, 3] = 0
    assert "8 of 15" in told(rows, "unstructured", 0.5)


def test_groups_are_named() -> None:
    t = torch.tensor([[0.0, 0, 1, 2, 3, 0, 0, 4], [0, 1, 0, 2, 3, 4, 5, 0]])
    assert told(t, "2:4") == (
        "tensor: row 1, group 1 (columns 4 to 7) keeps 3 of 4 weights, expected exactly 2"
    )
    assert "expected at most 2" in told(t, NM(2, 4), exact=False)
    t[1, 4:6] = 0
    assert "keeps 1 of 4 weights, expected exactly 2" in told(t, "2:4")
    assert_sparsity(t, "2:4", exact=False)
    assert "input width divisible by 3, got 8" in told(t, "1:3")


def test_tiles_are_named() -> None:
    t = torch.ones(4, 4)
    t[:2, :2] = t[2:, 2:] = 0
    assert_sparsity(t, "block:2x2", 0.5)
    assert_sparsity(t, "block:2x2", 0.5, scope="row")
    assert "2 of 4 block:2x2 tiles are zero, expected exactly 1" in told(t, Block(2, 2), 0.25)
    t[2, 0] = 0
    assert told(t, "block:2x2", 0.5) == (
        "tensor: the tile at row 2, column 0 has 1 of 4 weights zero, expected none or all"
    )
    assert_sparsity(t, "block:2x2", 0.5, exact=False)
    assert "rows divisible by 3" in told(t, "block:3x2", 0.5)


def test_stacks_and_masks_are_matrices_too() -> None:
    stack = torch.ones(2, 2, 4)
    stack[..., :2] = 0
    assert_sparsity(stack, "2:4")
    assert_sparsity(stack != 0, "2:4")
    stack[1, 1, 2] = 0
    assert told(stack, "2:4").startswith("tensor[1]: row 1, group 0")
    assert "all layers together: 9 of 16" in told(stack, "unstructured", 0.5, scope="global")
    with pytest.raises(SpecError, match="pass the module instead"):
        assert_sparsity(torch.ones(2, 2, 2, 2), "2:4")


def test_arguments_that_contradict_are_refused() -> None:
    with pytest.raises(SpecError, match="contradicts"):
        assert_sparsity(torch.ones(4, 4), "2:4", 0.7)
    with pytest.raises(SpecError, match="scope 'column'"):
        assert_sparsity(torch.ones(4, 4), "2:4", scope="column")


@pytest.mark.parametrize("family", ["gpt2", "resnet", "mixtral"])
def test_modules_are_read_as_they_multiply(family: str) -> None:
    model = FAMILIES[family].make()
    torchprune.sparsify(model, MagnitudeSpec(pattern="2:4"))
    assert_sparsity(model, "2:4")
    name, mask = next(iter(torchprune.masks(model).items()))
    places = (~mask).nonzero()[-1].tolist()
    mask[tuple(places)] = True
    torchprune.apply_masks(model, {name: mask})
    layer = name.removesuffix(".weight")
    assert told(model, "2:4").startswith(layer)
    assert_sparsity(model, "unstructured", 0.49, exact=False)
    torchprune.fold(model)
    assert told(model, "2:4").startswith(layer)


def test_a_folded_model_is_checked_where_pruning_would_go() -> None:
    model = FAMILIES["llama"].make()
    assert told(model, "2:4").startswith("model.layers.0.self_attn.q_proj: row 0, group 0")
    torchprune.sparsify(model, MagnitudeSpec(pattern="2:4"))
    assert_sparsity(torchprune.fold(model), "2:4")  # the dense head is no target
    model.model.layers[1].mlp.down_proj.weight.data[3, 7] = 0.5
    model.model.layers[1].mlp.down_proj.weight.data[3, 4:7] = 0.5
    assert told(model, "2:4").startswith("model.layers.1.mlp.down_proj: row 3, group 1")
    assert "nothing here could be sparse" in told(nn.ReLU(), "2:4")


def test_a_mask_that_does_not_act_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torchprune.sparsify(nn.Linear(4, 4), MagnitudeSpec())
    monkeypatch.setattr(keeper, "clear", lambda tensor, bits: None)
    model.weight.data.fill_(1.0)
    assert told(model, "unstructured", 0.5) == "weight: 8 weights are not zero though masked"


# -- check_laws: every law notices its own breach -------------------------------------------------

sparsify = torchprune.sparsify


def pruned_then(change: Callable[[nn.Module], Any]) -> Callable[..., nn.Module]:
    """A `sparsify` that does something more to the model."""

    def patched(*args: Any, **options: Any) -> nn.Module:
        model = sparsify(*args, **options)
        change(model)
        return model

    return patched


def unmask_one(model: nn.Module) -> None:
    name, mask = next(iter(torchprune.masks(model).items()))
    mask.view(-1)[int((~mask).view(-1).nonzero()[0])] = True
    torchprune.apply_masks(model, {name: mask})


def change_kept(model: nn.Module) -> None:
    for layer, _ in masked_layers(model):
        original_of(layer.module, layer.tensor).data.mul_(1 + 1e-6)


def change_bias(model: nn.Module) -> None:
    model[0].bias.data.add_(1.0)


def exchange(model: nn.Module) -> None:
    """Restore the first pruned weight of a row and prune the last kept one: as many as before."""
    for name, mask in torchprune.masks(model).items():
        row = mask[0]
        first, last = int((~row).nonzero()[0]), int(row.nonzero()[-1])
        row[first], row[last] = True, False
        torchprune.apply_masks(model, {name: mask})


def toss_a_row(model: nn.Module) -> None:
    name, mask = next(iter(torchprune.masks(model).items()))
    row = int(torch.randint(len(mask), ()))
    mask[row] = mask[row].roll(int(torch.randint(1, mask.shape[1], ())))
    torchprune.apply_masks(model, {name: mask})


def negative_zero(model: nn.Module) -> None:
    """Write where no mark is made."""
    for layer, mask in masked_layers(model):
        values_of(getattr(layer.module, layer.tensor)).masked_fill_(~mask.mask, -0.0)


def leaky(self: Mask, gradient: Tensor) -> Tensor:
    return gradient


def fold_and_nudge(model: nn.Module) -> nn.Module:
    torchprune.fold(model)
    model[0].bias.data.add_(1e-6)
    return model


def mask_elsewhere(self: Mask, memo: dict[int, Any]) -> Mask:
    """A copy that shares its mask with the original."""
    twin = Mask(self.mask, self.record, copy.deepcopy(self.dense, memo))
    twin.bits = self.bits
    return twin


def keep_changes(self: Changes) -> None:
    """Undo nothing."""


def unread(self: Mask, *state: Any) -> None:
    """Load nothing."""


def blind_budget(shape: Any, dead: Tensor, *rest: Any) -> block_counts.Budget:
    """Counts as if every input were alive."""
    return block_counts.budget_of(shape, torch.zeros_like(dead), *rest)


BREACHES: list[tuple[str, str, Any, Any]] = [
    ("count", "laws.sparsify", pruned_then(unmask_one), WandaSpec()),
    ("support", "laws.sparsify", pruned_then(change_kept), WandaSpec()),
    ("support", "laws.sparsify", pruned_then(negative_zero), WandaSpec()),
    ("reversal", "laws.sparsify", pruned_then(change_bias), WandaSpec()),
    ("reversal", "laws.densify", lambda model: model, SparseGPTSpec()),
    ("fold", "laws.fold", fold_and_nudge, WandaSpec()),
    ("training", "Mask.of_gradient", leaky, WandaSpec()),
    ("round trip", "Mask._load_from_state_dict", unread, WandaSpec()),
    ("copy", "Mask.__deepcopy__", mask_elsewhere, WandaSpec()),
    ("determinism", "laws.sparsify", pruned_then(toss_a_row), WandaSpec()),
    ("dead inputs", "laws.sparsify", pruned_then(exchange), WandaSpec()),
    ("dead inputs", "laws.sparsify", pruned_then(change_kept), SparseGPTSpec()),
    ("dead inputs", "sparsegpt.budget_of", blind_budget, SparseGPTSpec(block_size=4)),
    ("refusal", "Changes.undo", keep_changes, WandaSpec()),
    ("refusal", "Changes.undo", keep_changes, SparseGPTSpec()),
]


def make() -> nn.Module:
    return FAMILIES["mlp"].make()


@pytest.mark.parametrize(
    ("law", "where", "what", "spec"), BREACHES, ids=[f"{b[0]}-{b[1]}" for b in BREACHES]
)
def test_a_breach_of_a_law_is_found_and_named(
    law: str, where: str, what: Any, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = FAMILIES["mlp"].data()
    check_laws(make, spec, data)
    owner, name = where.split(".")
    home = {"laws": laws, "Mask": Mask, "Changes": Changes, "sparsegpt": sparsegpt}[owner]
    monkeypatch.setattr(home, name, what, raising=False)
    with pytest.raises(AssertionError, match=f"^law '{law}': "):
        check_laws(make, spec, data)


def test_magnitude_needs_no_data_for_its_laws() -> None:
    check_laws(make, MagnitudeSpec(pattern="2:4"))


@settings(max_examples=12)
@given(small_models(), specs(fits=(8, 8)))
def test_the_laws_hold_for_every_small_model_and_spec(model: SmallModel, spec: Spec) -> None:
    check_laws(model.make, spec, model.data)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True)
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.memory(x)[0])


class Raw(nn.Module):
    """Weights of no layer, turned and in parts: along their inputs 2:4, on which no shape tells."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.pair = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(8, 8))
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.pair.chunk(2)
        scores = torch.nn.functional.linear(x, one) @ torch.nn.functional.linear(x * 2, two).mT
        return self.last(scores @ torch.einsum("btd,edf->btef", x, self.stack).sum(2))


OTHERS = {
    "recurrent": Recurrent,
    "raw": Raw,
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("spec", [WandaSpec(), WandaSpec(pattern="2:4"), SparseGPTSpec()], ids=str)
def test_the_laws_hold_for_weights_of_no_plain_layer(name: str, spec: Spec) -> None:
    check_laws(
        OTHERS[name], spec, [torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))]
    )


def test_a_pattern_is_checked_along_the_inputs_that_were_seen(tmp_path: Path) -> None:
    model, data = Raw(), [torch.randn(2, 6, 8)]
    torchprune.sparsify(model, WandaSpec(pattern="2:4"), data, progress=False)
    assert_sparsity(model, "2:4")
    torchprune.save(model, tmp_path / "saved")
    other = Raw()
    torchprune.load_into(other, tmp_path / "saved")
    assert_sparsity(other, "2:4")
    mask = torchprune.masks(other)["stack"]
    assert not (mask.view(-1, 4).sum(1) == 2).all()  # along another axis it is none


# -- strategies -----------------------------------------------------------------------------------

FINDING = settings(max_examples=1000, database=None)


@given(weights(rows=(2, 5), cols=(4, 9), multiple_of=(1, 4), dtypes=[torch.float16]))
def test_weights_have_the_asked_shape(weight: Tensor) -> None:
    assert 2 <= weight.shape[0] <= 5
    assert weight.shape[1] in (4, 8)
    assert weight.dtype == torch.float16
    assert weight.isfinite().all()


@pytest.mark.parametrize(
    "wanted",
    [
        lambda w: bool((w == 0).any() and w.signbit().any()),
        lambda w: bool(w.numel() > 4 and (w == w[0, 0]).all() and w[0, 0] != 0),
        lambda w: w.shape == (1, 1),
        lambda w: len(w.unique()) == w.numel() > 8,
    ],
    ids=["negative zero", "all equal", "single", "all different"],
)
def test_weights_try_what_hurts(wanted: Callable[[Tensor], bool]) -> None:
    assert wanted(find(weights(), wanted, settings=FINDING))


def test_weights_are_infinite_only_when_asked() -> None:
    found = find(weights(finite=False), lambda w: bool(w.isinf().any()), settings=FINDING)
    assert found.isinf().any()


@given(patterns(fits=(4, 6)))
def test_patterns_fit(pattern: Pattern) -> None:
    torchprune.specs.patterns.check_shape(pattern, 4, 6, "x")


@pytest.mark.parametrize("kind", [Unstructured, NM, Block])
def test_every_kind_of_pattern_is_drawn(kind: type[Pattern]) -> None:
    assert isinstance(find(patterns(), lambda p: isinstance(p, kind), settings=FINDING), kind)


@given(specs(methods=["wanda"], scopes=["row", "global"]))
def test_specs_are_of_the_asked_kind(spec: Spec) -> None:
    assert isinstance(spec, WandaSpec)
    assert spec.scope in ("row", "global")


@pytest.mark.parametrize("kind", ["mlp", "cnn", "attention"])
def test_small_models_are_made_again_with_the_same_bits(kind: str) -> None:
    model = find(small_models(kinds=[kind]), lambda m: m.kind == kind, settings=FINDING)
    one, two = model.make(), model.make()
    assert one is not two
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    with torch.no_grad():
        assert one(model.data[0]).isfinite().all()
    assert not one.training


def test_the_example_suite_passes() -> None:
    import subprocess
    import sys
    from pathlib import Path

    example = Path(__file__).parents[2] / "examples" / "property_tests.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(example)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"3 passed", done.stdout)
