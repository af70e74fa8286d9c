"""Masks as parametrizations: what they hold, what they survive, how they come and go."""

from __future__ import annotations

import copy
import datetime
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec
from torchprune.errors import MaskError, SpecError
from torchprune.masking.mask import original_of
from torchprune.specs.spec import Spec
from torchprune.testing import assert_sparsity, specs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def mlp() -> nn.Module:
    return FAMILIES["mlp"].make()


def data(count: int = 3) -> list[Tensor]:
    return FAMILIES["mlp"].data(count=count)


def prune(model: nn.Module, spec: Spec | None = None, **options: Any) -> nn.Module:
    return torchprune.sparsify(model, spec or WandaSpec(), data(), progress=False, **options)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(
        v.dtype == two[k].dtype
        and torch.equal(v.reshape(-1).view(torch.uint8), two[k].reshape(-1).view(torch.uint8))
        for k, v in one.items()
    )


def checker(weight: Tensor) -> Tensor:
    """A checkered mask."""
    return (torch.arange(weight.numel()) % 2 == 0).reshape(weight.shape)


# -- masks and what they do to weights ------------------------------------------------------------


def test_masks_are_named_after_the_plain_models_tensors() -> None:
    model = mlp()
    names = [k for k, v in model.state_dict().items() if v.dim() == 2]
    prune(model)
    found = torchprune.masks(model)
    assert list(found) == names
    for name, mask in found.items():
        assert mask.dtype == torch.bool
        weight = model.get_submodule(name.rpartition(".")[0]).weight
        assert mask.shape == weight.shape
        assert torch.equal(weight == 0, ~mask)


def test_a_mask_costs_one_bit_a_weight_and_what_it_hides() -> None:
    model = mlp()
    before = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    weights = sum(m.weight.numel() for m in model if isinstance(m, nn.Linear))
    prune(model)
    after = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert after - before == weights // 8 + weights // 2 * 4
    for mask in torchprune.masks(model).values():
        assert mask.untyped_storage().nbytes() == mask.numel()  # nothing larger behind a view
        assert mask.is_contiguous()


def test_pruning_keeps_every_parameter_object() -> None:
    model = mlp()
    before = {id(p) for p in model.parameters()}
    addresses = {p.data_ptr() for p in model.parameters()}
    prune(model)
    assert {id(p) for p in model.parameters()} == before
    assert {p.data_ptr() for p in model.parameters()} == addresses
    prune(model, SparseGPTSpec(0.7))
    torchprune.fold(model)
    assert {id(p) for p in model.parameters()} == before


SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")]


@given(st.lists(st.tuples(st.sampled_from(SPECIAL), st.booleans()), min_size=4, max_size=24))
def test_whatever_lies_under_a_mask_is_exactly_zero(cells: list[tuple[float, bool]]) -> None:
    layer = nn.Linear(len(cells), 1)
    layer.weight.data = torch.tensor([[value for value, _ in cells]])
    dense = layer.weight.detach().clone()
    mask = torch.tensor([[kept for _, kept in cells]])
    torchprune.apply_masks(layer, {"weight": mask})
    for weight in (layer.weight.detach(), torchprune.fold(copy.deepcopy(layer)).weight.detach()):
        off = weight[~mask]
        assert torch.equal(off.view(torch.int32), torch.zeros_like(off, dtype=torch.int32))
        kept = weight[mask].view(torch.int32)
        assert torch.equal(kept, dense[mask].view(torch.int32))  # -0.0 and NaN included
    torchprune.densify(layer)
    assert torch.equal(layer.weight.view(torch.int32), dense.view(torch.int32))


@pytest.mark.parametrize("kind", [MagnitudeSpec, WandaSpec, SparseGPTSpec])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_prunes_exactly(kind: type[Spec], dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    batches = [x.to(dtype) for x in data()]
    torchprune.sparsify(model, kind(scope="row"), batches, progress=False)
    assert_sparsity(model, "unstructured", 0.5, scope="row")
    for layer in (model[0], model[2], model[4]):
        assert layer.weight.dtype == dtype
        assert not layer.weight[layer.weight == 0].signbit().any()
    assert model(batches[0]).isfinite().all()


def test_infinite_weights_are_kept_by_magnitude() -> None:
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[float("inf"), 1.0, -float("inf"), 2.0]])
    torchprune.sparsify(layer, MagnitudeSpec())
    assert layer.weight.tolist() == [[float("inf"), 0.0, -float("inf"), 0.0]]


# -- apply_masks ----------------------------------------------------------------------------------


def test_given_masks_act_and_are_copied() -> None:
    model = mlp()
    mask = checker(model[0].weight)
    torchprune.apply_masks(model, {"0.weight": mask})
    mask.fill_(True)
    assert torch.equal(model[0].weight == 0, ~checker(model[0].weight))
    assert list(torchprune.masks(model)) == ["0.weight"]
    (entry,) = torchprune.report(model).layers
    assert (entry.method, entry.zeros) == ("given", 192)


def test_masks_carry_over_to_another_model() -> None:
    one, two = mlp(), mlp()
    prune(one)
    torchprune.apply_masks(two, torchprune.masks(one))
    assert all(torch.equal(m, torchprune.masks(two)[k]) for k, m in torchprune.masks(one).items())
    assert torch.equal(one(data()[0]), two(data()[0]))
    torchprune.masks(one)["0.weight"].zero_()
    assert torchprune.masks(two)["0.weight"].any()


def test_a_given_mask_replaces_the_one_before() -> None:
    model, dense = prune(mlp()), mlp()[0].weight
    mask = checker(dense)
    torchprune.apply_masks(model, {"0.weight": mask})
    assert torch.equal(torchprune.masks(model)["0.weight"], mask)
    assert torch.equal(model[0].weight, torch.where(mask, dense, 0))
    assert len(model[0].parametrizations.weight) == 1


def test_a_mask_may_be_of_any_layout() -> None:
    model = mlp()
    columns = (torch.arange(16) % 2 == 0).expand(24, 16)
    torchprune.apply_masks(model, {"0.weight": columns})
    assert torch.equal(torchprune.masks(model)["0.weight"], columns)
    assert torchprune.masks(model)["0.weight"].is_contiguous()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"0.wieght": torch.ones(24, 16).bool()},
            r"'0\.wieght' is no prunable.*did you mean '0\.weight'",
        ),
        ({"1.weight": torch.ones(24).bool()}, r"'1\.weight' is no prunable tensor"),
        (
            {"0.weight": torch.ones(16, 24).bool()},
            r"expected a bool mask \(24, 16\), got torch\.bool \(16, 24\)",
        ),
        ({"0.weight": torch.ones(24, 16)}, r"got torch\.float32 \(24, 16\)"),
        ({"0.weight": [[True]]}, "got list"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(masks: dict[str, Any], message: str) -> None:
    model = mlp()
    before = bits(model)
    with pytest.raises(MaskError, match=message):
        torchprune.apply_masks(model, {"2.weight": torch.ones(20, 24).bool(), **masks})
    assert same_bits(bits(model), before)
    assert not torchprune.masks(model)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_another_parametrization_is_left_alone() -> None:
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", Doubled())
    with pytest.raises(MaskError, match="already has another parametrization"):
        torchprune.apply_masks(model, {"0.weight": torch.ones(24, 16).bool()})
    with pytest.warns(UserWarning, match="1 layer with 38% of the weights to prune cannot carry"):
        prune(model)
    assert list(torchprune.masks(model)) == ["2.weight", "4.weight"]
    torchprune.fold(model)
    assert parametrize.is_parametrized(model[0], "weight")


# -- densify --------------------------------------------------------------------------------------


@given(specs(fits=(4, 4)))
def test_densify_restores_every_bit(spec: Spec) -> None:
    model = mlp()
    before = bits(model)
    prune(model, spec, keep_dense=True)
    torchprune.densify(model)
    assert same_bits(bits(model), before)
    assert {type(m) for m in model} == {nn.Linear, nn.GELU}


def test_changed_weights_do_not_come_back_unless_kept() -> None:
    model = prune(mlp(), SparseGPTSpec())
    before = bits(model)
    with pytest.raises(MaskError, match=r"the dense weights of 0 are gone \(sparsegpt.*keep_dense"):
        torchprune.densify(model)
    assert same_bits(bits(model), before)


def test_densify_wants_masks() -> None:
    with pytest.raises(MaskError, match="carries no torchprune masks"):
        torchprune.densify(mlp())
    with pytest.raises(MaskError, match="carries no torchprune masks"):
        torchprune.densify(torchprune.fold(prune(mlp())))


def test_the_first_dense_weights_survive_a_second_pruning() -> None:
    model = mlp()
    before = bits(model)
    prune(model, SparseGPTSpec(0.25), keep_dense=True)
    prune(model, SparseGPTSpec(0.5), keep_dense=True)
    torchprune.densify(model)
    assert same_bits(bits(model), before)


def test_dense_weights_kept_late_are_refused_not_invented() -> None:
    model = prune(mlp(), SparseGPTSpec(0.25))
    prune(model, SparseGPTSpec(0.5), keep_dense=True)
    with pytest.raises(MaskError, match="are gone"):
        torchprune.densify(model)


def test_weights_trained_under_a_mask_keep_what_they_learned() -> None:
    model, dense = prune(mlp()), mlp()[0].weight
    mask = torchprune.masks(model)["0.weight"]
    with torch.no_grad():
        original_of(model[0], "weight").add_(1.0)
    torchprune.densify(model)
    assert torch.equal(model[0].weight, torch.where(mask, dense + 1.0, dense))


# -- fold -----------------------------------------------------------------------------------------


@given(specs(fits=(4, 4)))
def test_folding_changes_no_output_bit(spec: Spec) -> None:
    model = prune(mlp(), spec)
    with torch.no_grad():
        before = model(data()[0])
        masks = {k: m.clone() for k, m in torchprune.masks(model).items()}
        torchprune.fold(model)
        assert torch.equal(model(data()[0]), before)
    assert {type(m) for m in model} == {nn.Linear, nn.GELU}
    for name, mask in masks.items():
        assert not model.state_dict()[name][~mask].any()


def test_a_folded_model_is_a_plain_model() -> None:
    plain = mlp()
    keys = list(plain.state_dict())
    folded = torchprune.fold(prune(mlp()))
    assert list(folded.state_dict()) == keys
    plain.load_state_dict(folded.state_dict(), strict=True)
    assert [n for n, _ in folded.named_modules()] == [n for n, _ in plain.named_modules()]
    assert torch.equal(plain(data()[0]), folded(data()[0]))


def test_folding_twice_or_nothing_is_no_error() -> None:
    model = mlp()
    before = bits(model)
    assert torchprune.fold(model) is model
    assert same_bits(bits(model), before)
    prune(model)
    after = bits(torchprune.fold(model))
    assert same_bits(bits(torchprune.fold(model)), after)


def test_frozen_parameters_stay_frozen() -> None:
    model = mlp().requires_grad_(False)
    prune(model, SparseGPTSpec())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model[0].weight.requires_grad
    torchprune.fold(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_model_can_be_pruned_folded_and_pruned_again() -> None:
    model = torchprune.fold(prune(mlp(), WandaSpec(0.25)))
    zeros = {k: v == 0 for k, v in model.state_dict().items() if v.dim() == 2}
    prune(model, WandaSpec(0.5))
    assert_sparsity(model, "unstructured", 0.5, scope="row")
    for name, mask in torchprune.masks(model).items():
        assert not (mask & zeros[name]).any()  # zeros score lowest


# -- pruning a pruned model -----------------------------------------------------------------------


@settings(max_examples=25)
@given(specs(fits=(4, 4)), specs(fits=(4, 4)))
def test_masks_only_grow(first: Spec, second: Spec) -> None:
    model = prune(mlp(), first)
    before = {k: m.clone() for k, m in torchprune.masks(model).items()}
    weights = bits(model)
    try:
        prune(model, second)
    except SpecError:
        assert same_bits(bits(model), weights)
    else:
        for name, mask in torchprune.masks(model).items():
            assert not (mask & ~before[name]).any(), name


def test_less_than_there_is_is_refused() -> None:
    model = prune(mlp(), MagnitudeSpec(0.75))
    with pytest.raises(SpecError, match=r"^0: it is already 0\.75 sparse and 0\.5 was asked"):
        prune(model, MagnitudeSpec(0.5))


def test_a_second_pruning_writes_into_the_same_mask() -> None:
    model = prune(mlp(), WandaSpec(0.25))
    bits = model[0].parametrizations.weight[0].bits
    prune(model, WandaSpec(0.5))
    assert model[0].parametrizations.weight[0].bits is bits  # seen without recompiling
    assert len(model[0].parametrizations.weight) == 1


# -- copies, dtypes, state ------------------------------------------------------------------------


@pytest.mark.parametrize("last", [torchprune.fold, torchprune.densify], ids=["fold", "densify"])
def test_a_deepcopy_is_independent_both_ways(last: Any) -> None:
    model = prune(mlp())
    before = bits(model)
    other, third = copy.deepcopy(model), copy.deepcopy(model)
    torchprune.apply_masks(other, {"0.weight": torch.zeros(24, 16, dtype=torch.bool)})
    original_of(other[2], "weight").data.zero_()
    last(other)
    assert same_bits(bits(model), before)
    assert torch.equal(model[0].weight == 0, ~torchprune.masks(model)["0.weight"])
    last(model)
    assert same_bits(bits(third), before)
    assert torch.equal(third[0].weight == 0, ~torchprune.masks(third)["0.weight"])
    assert torchprune.report(third).sparsity == 0.5


def test_a_copy_of_a_copy_and_unmasked_siblings() -> None:
    model = mlp()
    torchprune.apply_masks(model, {"0.weight": checker(model[0].weight)})
    second = copy.deepcopy(copy.deepcopy(model))
    torchprune.fold(second)
    assert isinstance(model[0].weight, Tensor)
    assert type(model[2]) is nn.Linear
    assert nn.Linear(2, 2).weight.shape == (2, 2)  # the shared class was left alone


def test_the_report_of_a_copy_is_its_own() -> None:
    model = prune(mlp())
    other = copy.deepcopy(model)
    prune(other, WandaSpec(0.75))
    assert (torchprune.report(model).sparsity, torchprune.report(other).sparsity) == (0.5, 0.75)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_masks_follow_a_dtype_unharmed(dtype: torch.dtype) -> None:
    model = prune(mlp(), SparseGPTSpec(), keep_dense=True)
    before = {k: m.clone() for k, m in torchprune.masks(model).items()}
    model.to(dtype)
    for name, mask in torchprune.masks(model).items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, before[name])
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight == 0, ~before["0.weight"])
    torchprune.densify(model)
    assert torch.equal(model[0].weight, mlp()[0].weight.to(dtype))


def test_a_state_dict_holds_everything() -> None:
    model, other = prune(mlp()), mlp()
    state = model.state_dict()
    assert "0.parametrizations.weight.original" in state
    assert state["0.parametrizations.weight.0.bits"].dtype == torch.uint8
    prune(other, MagnitudeSpec(0.9))
    other.load_state_dict(state, strict=True)
    assert same_bits(bits(other), bits(model))
    assert torch.equal(other(data()[0]), model(data()[0]))


def test_a_state_dict_round_trip_through_safetensors(tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    model, other = prune(mlp(), SparseGPTSpec(), keep_dense=True), mlp()
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    prune(other, SparseGPTSpec(0.3), keep_dense=True)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"), strict=True)
    assert same_bits(bits(torchprune.densify(other)), bits(mlp()))


# -- training -------------------------------------------------------------------------------------


def test_gradients_reach_kept_weights_only() -> None:
    model = prune(mlp())
    model(data()[0]).square().sum().backward()
    for name, mask in torchprune.masks(model).items():
        grad = original_of(model.get_submodule(name.rpartition(".")[0]), "weight").grad
        assert not grad[~mask].any()
        assert (grad[mask] != 0).float().mean() > 0.9


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    ],
    ids=["adamw", "sgd", "rmsprop"],
)
@pytest.mark.parametrize("kind", [WandaSpec, SparseGPTSpec])
def test_zeros_survive_training(optimizer: Any, kind: type[Spec]) -> None:
    model = mlp()
    optimiser = optimizer(model.parameters())  # made before: pruning keeps the parameters
    model(data()[0]).square().sum().backward()
    optimiser.step()
    prune(model, kind())
    before = bits(model)
    masks = {k: m.clone() for k, m in torchprune.masks(model).items()}
    for x in data(5):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
    assert not torch.equal(
        before["0.parametrizations.weight.original"], original_of(model[0], "weight")
    )
    for folded in (False, True):
        for name, mask in masks.items():
            weight = model.get_submodule(name.rpartition(".")[0]).weight
            assert not weight[~mask].any()
            assert weight[mask].all()
        assert folded or torchprune.fold(model) is model


def test_masks_can_be_cached_for_a_while() -> None:
    model = prune(mlp())
    x = data()[0]
    with torch.no_grad(), parametrize.cached():
        assert torch.equal(model(x), model(x))
        assert model[0].weight is model[0].weight


# -- distributed ----------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path}/rendezvous",
        rank=0,
        world_size=1,
        timeout=datetime.timedelta(seconds=60),
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_data_parallel_training_keeps_the_zeros() -> None:
    model = prune(mlp())
    masks = {k: m.clone() for k, m in torchprune.masks(model).items()}
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1)
    for x in data():
        optimizer.zero_grad()
        parallel(x).square().sum().backward()
        optimizer.step()
    for name, mask in masks.items():
        weight = model.get_submodule(name.rpartition(".")[0]).weight
        assert torch.equal(torchprune.masks(model)[name], mask)
        assert not weight[~mask].any()
        assert weight[mask].all()
    torchprune.fold(model)
    assert not model[0].weight[~masks["0.weight"]].any()


@pytest.mark.usefixtures("one_process")
def test_a_wrapped_model_can_be_pruned() -> None:
    parallel = nn.parallel.DistributedDataParallel(mlp())
    prune(parallel)
    assert list(torchprune.masks(parallel)) == [f"module.{i}.weight" for i in (0, 2, 4)]


@pytest.mark.usefixtures("one_process")
def test_fully_sharded_training_keeps_the_zeros() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = prune(mlp())
    masks = {k: m.clone() for k, m in torchprune.masks(model).items()}
    x = data()[0]
    expected = model(x).detach()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about CPU meshes
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            sharded = isinstance(original_of(model[0], "weight"), DTensor)
            found = model(x)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"fully_shard does not run on this CPU: {error}")
    assert sharded
    torch.testing.assert_close(found, expected)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for x in data():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    model.unshard()
    for name, mask in masks.items():
        weight = model.get_submodule(name.rpartition(".")[0]).weight
        assert not weight[~mask].any()
        assert weight[mask].all()


# -- reports --------------------------------------------------------------------------------------


def test_a_report_counts_what_is_there_now() -> None:
    model = prune(mlp())
    report = torchprune.report(model)
    assert (report.zeros, report.size, report.sparsity) == (512, 1024, 0.5)
    torchprune.apply_masks(model, {"0.weight": torch.zeros(24, 16, dtype=torch.bool)})
    assert torchprune.report(model).layers[0].sparsity == 1.0
    assert torchprune.report(torchprune.fold(model)).layers == []
    assert torchprune.report(mlp()).sparsity == 0.0


def test_a_report_is_plain_data_and_text() -> None:
    import json

    report = torchprune.report(prune(mlp(), WandaSpec(overrides={"0": "dense"})))
    told = json.loads(json.dumps(report.to_dict()))
    assert told["total"]["zeros"] == sum(y["zeros"] for y in told["layers"])
    assert told["skipped"] == {"0": "dense by overrides['0']"}
    assert [y["tokens"] for y in told["layers"]] == [15, 15]
    for word in ("wanda", "unstructured 0.5", "50.00%", "dense: 0"):
        assert word in str(report)


@pytest.mark.parametrize("kind", [WandaSpec, SparseGPTSpec])
def test_a_layers_reported_error_is_its_outputs(kind: type[Spec]) -> None:
    layer = nn.Linear(16, 12, bias=False)
    dense = copy.deepcopy(layer)
    x = torch.randn(50, 16)
    torchprune.sparsify(layer, kind(), [x], progress=False)
    with torch.no_grad():
        lost = (layer(x) - dense(x)).square().sum() / dense(x).square().sum()
    assert torchprune.report(layer).layers[0].error == pytest.approx(float(lost), rel=1e-3)


def test_pruning_none_is_pruning_nothing() -> None:
    model = mlp()
    before = bits(model)
    prune(model, WandaSpec(0.0))
    assert all(mask.all() for mask in torchprune.masks(model).values())
    assert same_bits(bits(torchprune.fold(model)), before)


def test_a_language_model_generates_the_same_masked_and_folded() -> None:
    model = FAMILIES["llama"].make()
    torchprune.sparsify(model, WandaSpec(pattern="2:4"), tokens(), progress=False)
    prompt = tokens()[0]
    mask = torch.ones_like(prompt)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    one = model.generate(prompt, **options)
    assert torch.equal(torchprune.fold(model).generate(prompt, **options), one)


def test_a_tied_weight_is_refused_a_mask() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(MaskError, match=r"head\.weight cannot carry a mask.*tied to embed\.weight"):
        torchprune.apply_masks(model, {"head.weight": torch.ones(8, 4, dtype=torch.bool)})
    assert torchprune.masks(model) == {}


@pytest.mark.parametrize("spec", [MagnitudeSpec(), WandaSpec(), SparseGPTSpec()])
def test_masking_keeps_the_memory_format(spec: Spec) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3)).to(memory_format=torch.channels_last)
    torchprune.sparsify(model, spec, [torch.randn(4, 8, 6, 6)], progress=False)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    torchprune.fold(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
