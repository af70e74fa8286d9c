"""Specs for whole units: counts, scores, the refit, allocation, and going back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from by_hand import moments_of
from cnns import CNNS, awake, image_batches
from families import FAMILIES, llama, tokens
from hypothesis import given
from hypothesis import strategies as st
from structures import close, outputs
from torch import Tensor, nn

import torchprune
from torchprune import ChannelSpec, HeadSpec, LayerSpec, NeuronSpec, plan_shrink, shrink
from torchprune.errors import CalibrationError, MaskError, SpecError, TargetError
from torchprune.graph.groups import structure_of
from torchprune.structure.refit_readers import refit
from torchprune.structure.scores import read_scores, taylor_scores
from torchprune.structure.share import across, uniform

SPECS = {"heads": HeadSpec, "neurons": NeuronSpec, "channels": ChannelSpec}


# -- specs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeuronSpec(sparsity=1.0), r"0 <= sparsity < 1, got 1\.0"),
        (lambda: NeuronSpec(sparsity=True), "must be a number"),
        (lambda: HeadSpec(score="magnitude"), r"'magnitude' is not understood.*'flap'"),
        (lambda: HeadSpec(scor="l2"), "did you mean 'score'"),
        (lambda: ChannelSpec(allocation="owl"), "allocation must be"),
        (lambda: NeuronSpec(damping=0.0), "damping must be above 0"),
        (lambda: NeuronSpec(round_to=0), "round_to must be"),
        (lambda: NeuronSpec(loss=3), "loss must be a callable"),
        (lambda: LayerSpec(0), "drop must be"),
        (lambda: LayerSpec(1, score="flap"), "score must be"),
    ],
)
def test_specs_refuse_what_makes_no_sense(make: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


@given(
    count=st.integers(1, 300),
    share=st.floats(0, 0.99),
    step=st.one_of(st.none(), st.integers(1, 64)),
)
def test_what_stays_is_a_multiple_near_what_was_asked(
    count: int, share: float, step: int | None
) -> None:
    spec = NeuronSpec(share, round_to=step)
    kept = spec.kept(count)
    width = min(spec.multiple(count), count)
    assert 1 <= kept <= count
    assert kept % width == 0 or kept == count
    assert abs(kept - count * (1 - share)) <= width
    if step is None:
        assert width == (8 if count % 8 == 0 else 1)


def test_wide_groups_keep_multiples_of_64() -> None:
    assert NeuronSpec(0.3).kept(11008) == 7680
    assert HeadSpec(1 / 3).kept(3) == 2


# -- scores and the refit, against brute force -----------------------------------------------------


def test_flap_is_the_variance_and_activation_the_energy() -> None:
    x, w = torch.randn(200, 5) + 2, torch.randn(3, 5)
    moments = moments_of(x, gram=False, total=True)
    square = w.double().square().sum(0)
    flap = x.double().var(0, correction=0) * square
    assert torch.allclose(read_scores("flap", w, moments).double(), flap, rtol=1e-3)
    energy = x.double().square().mean(0) * square
    assert torch.allclose(read_scores("activation", w, moments).double(), energy, rtol=1e-4)


@given(
    rows=st.integers(2, 60),
    cols=st.integers(2, 12),
    outputs=st.integers(1, 6),
    bias=st.booleans(),
    by_rows=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_refit_is_ridge_least_squares_in_float64(
    rows: int, cols: int, outputs: int, bias: bool, by_rows: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) + torch.rand(cols, generator=generator)
    w = torch.randn(outputs, cols, generator=generator)
    keep = torch.rand(cols, generator=generator) < 0.6
    keep[seed % cols] = True
    damping = 0.05
    moments = moments_of(x, total=True)
    if by_rows:  # as of layers too wide for a second moment
        moments.gram, moments.sample = None, [list(x.split(7))]
    found = refit(w, moments, keep, damping, bias=bias)
    assert torch.equal(found.weight[:, ~keep], torch.zeros(outputs, int((~keep).sum())))
    # brute force: the normal equations of the whole problem, the bias a column without ridge
    a, target = x.double(), x.double() @ w.double().T
    centred = a - a.mean(0) if bias else a
    ridge = damping * float(centred[:, keep].square().sum(0).mean())
    design = torch.cat([a[:, keep], torch.ones(rows, 1).double()], 1) if bias else a[:, keep]
    prior = torch.zeros(design.shape[1], outputs).double()
    prior[: int(keep.sum())] = w.double()[:, keep].T
    weight = torch.full((design.shape[1],), ridge).double()
    if bias:
        weight[-1] = 0
    left = design.T @ design + weight.diag()
    best = torch.linalg.lstsq(left, design.T @ target + weight[:, None] * prior).solution
    scale = float(w.abs().max())
    got = found.weight[:, keep].double()
    if bool((~keep).any()) and ridge > 1e-6:
        assert torch.allclose(got, best[: int(keep.sum())].T, atol=2e-3 * scale)
    shift = found.shift.double() if found.shift is not None else 0.0
    lost = (target - (a @ found.weight.double().T + shift)).square().sum()
    plain = (target - a @ (w * keep).double().T).square().sum()
    assert float(lost) <= float(plain) * (1 + 1e-4) + 1e-5, "a refit never raises the error"
    assert found.lost == pytest.approx(float(lost), rel=1e-2, abs=1e-3 * found.total + 1e-6)


def test_inputs_that_say_the_same_are_made_up_for() -> None:
    x = torch.randn(100, 4)
    x[:, 3] = x[:, 0] - 2 * x[:, 1]
    w = torch.randn(2, 4)
    found = refit(w, moments_of(x, total=True), torch.tensor([True, True, True, False]), 1e-6)
    assert found.lost < 1e-6 * found.total


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    batch = torch.randn(6, 3)
    (group,) = structure_of(model, batch).groups

    def loss(net: nn.Module, given: Any) -> Tensor:
        return net(*given).square().sum()

    weights = {"0.weight": model[0].weight, "2.weight": model[2].weight}
    from torchprune.calibration.batches import Batch

    (score,) = taylor_scores(model, [group], weights, [Batch((batch,), {})], loss)
    model.zero_grad()
    loss(model, (batch,)).backward()
    assert model[0].weight.grad is not None
    assert model[2].weight.grad is not None
    rows = (model[0].weight * model[0].weight.grad).sum(1)
    cols = (model[2].weight * model[2].weight.grad).sum(0)
    assert torch.allclose(score, (rows + cols).abs().detach(), rtol=1e-4)


# -- allocation ------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 40), min_size=1, max_size=5), st.floats(0, 0.9), st.integers(0, 99))
def test_one_budget_over_all_groups(counts: list[int], share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(count, generator=generator) for count in counts]
    spec = NeuronSpec(share, allocation="global", round_to=1)
    gone = across(scores, spec)
    total = sum(int(g.sum()) for g in gone)
    budget = int(share * sum(counts) + 1e-9)
    assert total <= budget
    assert total == budget or all(int(g.sum()) == len(g) - 1 for g in gone) or budget == 0
    for score, lost in zip(scores, gone, strict=True):
        assert not lost.all()
        if lost.any():
            assert float(score[lost].max()) <= float(score[~lost].min())


@given(st.integers(1, 50), st.floats(0, 0.9), st.integers(0, 99))
def test_the_lowest_of_one_group_go(count: int, share: float, seed: int) -> None:
    score = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    spec = NeuronSpec(share)
    gone = uniform(score, spec)
    assert int((~gone).sum()) == spec.kept(count)
    if gone.any():
        assert float(score[gone].max()) <= float(score[~gone].min())


def test_of_equal_scores_the_later_go() -> None:
    assert uniform(torch.ones(6), NeuronSpec(0.5)).tolist() == [False] * 3 + [True] * 3


# -- sparsify --------------------------------------------------------------------------------------

CASES = [
    ("llama", HeadSpec(0.5)),
    ("llama", NeuronSpec(0.5, score="activation")),
    ("gpt2", HeadSpec(0.5, score="l2")),
    ("gpt2", NeuronSpec(0.5)),
    ("opt", NeuronSpec(0.25, score="random", refit=False)),
    ("mixtral", NeuronSpec(0.5)),
    ("t5", HeadSpec(0.5)),
    ("bert", HeadSpec(0.25, score="activation", allocation="global")),
    ("vit", NeuronSpec(0.5, score="l2", refit=False)),
    ("resnet", ChannelSpec(0.5)),
    ("mlp", NeuronSpec(0.5, score="activation", refit=False)),
]


@pytest.mark.parametrize(("name", "spec"), CASES, ids=[f"{n}-{s.method}" for n, s in CASES])
def test_units_are_masked_whole_and_shrink_and_return(name: str, spec: Any) -> None:
    family = FAMILIES[name]
    model, data = family.make(), family.data()
    dense = copy.deepcopy(model.state_dict())
    torchprune.sparsify(model, spec, data, progress=False, keep_dense=True)
    found = torchprune.report(model)
    assert found.zeros > 0
    assert {y.method for y in found.layers} == {spec.method}
    masks = torchprune.masks(model)
    masked = outputs(model, data[0])
    plan = plan_shrink(model, data[0])
    for removal in plan.removals:
        assert removal.group.kind == spec.kind
        if spec.allocation == "uniform":
            assert removal.after == spec.kept(removal.before)
    small = shrink(copy.deepcopy(model), plan)
    assert close(outputs(small, data[0]), masked, 2e-4)
    assert sum(p.numel() for p in small.parameters()) == plan.parameters[1]
    # the masks say no more than the plan: outside of what goes, nothing is masked
    assert sum(int((~m).sum()) for m in masks.values()) >= plan.parameters[0] - plan.parameters[
        1
    ] - sum(p.numel() for k, p in model.named_parameters() if p.dim() < 2)
    torchprune.densify(model)
    after = model.state_dict()
    assert list(after) == list(dense)
    assert all(torch.equal(after[key], value) for key, value in dense.items())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fold_training_and_files_keep_the_units(name: str, tmp_path: Any) -> None:
    family = FAMILIES[name]
    model, data = family.make(), family.data()
    torchprune.sparsify(model, NeuronSpec(0.5), data, progress=False)
    torchprune.save(model, tmp_path / "masked")
    loaded = torchprune.load(tmp_path / "masked")
    assert all(
        torch.equal(a, b)
        for a, b in zip(outputs(loaded, data[0]), outputs(model, data[0]), strict=True)
    )
    assert str(torchprune.report(loaded)) == str(torchprune.report(model))
    folded = torchprune.fold(copy.deepcopy(model))
    assert all(
        torch.equal(a, b)
        for a, b in zip(outputs(folded, data[0]), outputs(model, data[0]), strict=True)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in data:
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    trained = outputs(model, data[0])
    assert not close(trained, outputs(folded, data[0]), 1e-3)
    plan = plan_shrink(model, data[0])
    assert [(r.before, r.after) for r in plan.removals] == [
        (r.before, r.after) for r in plan_shrink(folded, data[0]).removals
    ]
    assert close(outputs(shrink(model, plan), data[0]), trained, 2e-4)


def test_the_refit_lowers_the_error_of_every_layer_and_keeps_the_rest() -> None:
    family = FAMILIES["opt"]
    data = family.data(count=8)
    errors, weights = {}, {}
    for fit in (False, True):
        model = family.make()
        torchprune.sparsify(model, NeuronSpec(0.5, score="l2", refit=fit), data, progress=False)
        errors[fit] = {y.name: y.error for y in torchprune.report(model).layers if y.error}
        weights[fit] = torchprune.fold(model).state_dict()
    # without a fit there is nothing to run the data for, so nothing is measured
    assert not errors[False]
    assert all(error < 0.5 for error in errors[True].values())
    changed = {k for k in weights[True] if not torch.equal(weights[True][k], weights[False][k])}
    assert changed == {
        f"model.decoder.layers.{i}.fc2.{part}" for i in (0, 1) for part in ("weight", "bias")
    }


def test_refitted_outputs_are_nearer_to_the_dense_ones() -> None:
    family = FAMILIES["gpt2"]
    data, fresh = family.data(count=12), family.data(seed=9, count=2)
    dense = [outputs(family.make(), batch)[0] for batch in fresh]
    apart = {}
    for fit in (False, True):
        model = family.make()
        torchprune.sparsify(model, NeuronSpec(0.5, refit=fit), data, progress=False)
        apart[fit] = sum(
            float((outputs(model, b)[0] - d).square().sum())
            for b, d in zip(fresh, dense, strict=True)
        )
    assert apart[True] < apart[False]


def test_later_layers_see_the_refitted_ones() -> None:
    """The second block's statistics depend on what became of the first."""
    family = FAMILIES["llama"]
    data = family.data(count=4)
    both = family.make()
    torchprune.sparsify(both, NeuronSpec(0.5), data, progress=False)
    second = family.make()
    only = "model.layers.1"
    torchprune.sparsify(second, NeuronSpec(0.5, targets=only), data, progress=False)
    key = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(
        torchprune.fold(both).state_dict()[key], torchprune.fold(second).state_dict()[key]
    )
    assert set(torchprune.masks(second)) == set()


def test_a_callable_scores_units() -> None:
    family = FAMILIES["llama"]
    model, data = family.make(), family.data()
    seen = []

    def score(net: nn.Module, group: Any) -> Tensor:
        assert net is model
        seen.append(group.name)
        return torch.arange(group.count)

    torchprune.sparsify(model, NeuronSpec(0.5, score=score), data, progress=False)
    assert seen == ["model.layers.0.mlp", "model.layers.1.mlp"]
    mask = torchprune.masks(model)["model.layers.0.mlp.up_proj.weight"]
    assert mask.any(1).tolist() == [False] * 24 + [True] * 24
    assert "given score 24/48 neurons" in str(torchprune.report(model).to_dict())
    with pytest.raises(SpecError, match=r"tensor \(48,\).*got \(3,\)"):
        torchprune.sparsify(
            family.make(), NeuronSpec(0.5, score=lambda *_: torch.ones(3)), data, progress=False
        )


def test_selectors_choose_groups_by_their_layers() -> None:
    family = FAMILIES["llama"]
    model, data = family.make(), family.data()
    spec = NeuronSpec(0.5, targets="*.up_proj", ignore="model.layers.0")
    torchprune.sparsify(model, spec, data, progress=False)
    assert all(key.startswith("model.layers.1.mlp") for key in torchprune.masks(model))
    assert torchprune.report(model).skipped == {"model.layers.0.mlp": "ignored"}
    with pytest.raises(TargetError, match="matches none"):
        torchprune.sparsify(model, NeuronSpec(targets="*.upp"), data, progress=False)
    with pytest.raises(TargetError, match=r"no channels to prune.*groups of heads, neurons"):
        torchprune.sparsify(model, ChannelSpec(), data, progress=False)


def test_a_refused_call_leaves_the_model_as_it_was() -> None:
    family = FAMILIES["gpt2"]
    model, data = family.make(), family.data()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="inf or NaN"):
        torchprune.sparsify(model, NeuronSpec(0.5), data, progress=False)
    assert not torchprune.masks(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_going_back_needs_the_dense_weights() -> None:
    family = FAMILIES["gpt2"]
    model, data = family.make(), family.data()
    torchprune.sparsify(model, NeuronSpec(0.5), data, progress=False)
    with pytest.raises(MaskError, match="keep_dense=True"):
        torchprune.densify(model)


def test_heads_then_neurons_then_single_weights() -> None:
    family = FAMILIES["llama"]
    model, data = family.make(), family.data()
    torchprune.sparsify(model, HeadSpec(0.5), data, progress=False)
    torchprune.sparsify(model, NeuronSpec(0.5), data, progress=False)
    shrink(model, plan_shrink(model, data[0]))
    torchprune.sparsify(model, torchprune.WandaSpec(pattern="2:4"), data, progress=False)
    assert torchprune.report(model).sparsity == 0.5
    assert model.config.num_attention_heads == 2
    assert model.config.intermediate_size == 24


def test_a_layer_with_other_zeros_is_masked_but_not_refitted() -> None:
    family = FAMILIES["llama"]
    model, data = family.make(), family.data()
    torchprune.sparsify(model, torchprune.MagnitudeSpec(0.5), progress=False)
    before = {k: m.clone() for k, m in torchprune.masks(model).items()}
    torchprune.sparsify(model, NeuronSpec(0.5), data, progress=False)
    after = torchprune.masks(model)
    assert all(not (after[k] & ~before[k]).any() for k in before), "masks only grow"
    notes = [y.note for y in torchprune.report(model).layers if y.name.endswith("down_proj")]
    assert notes == ["it has a mask of other zeros: not refitted"] * 2


@pytest.mark.parametrize("name", CNNS)
def test_channels_of_convolutions(name: str) -> None:
    torch.manual_seed(0)
    model, data = awake(CNNS[name]()), image_batches()
    torchprune.sparsify(model, ChannelSpec(0.5), data, progress=False)
    masked = outputs(model, data[0])
    plan = plan_shrink(model, data[0])
    assert plan.removals
    assert close(outputs(shrink(model, plan), data[0]), masked, 2e-4)
    before, after = plan.flops
    assert after < 0.75 * before


def test_layers_are_those_that_change_least() -> None:
    model = llama(num_hidden_layers=4)
    with torch.no_grad():
        for block in (1, 2):  # they hardly do anything
            model.model.layers[block].self_attn.o_proj.weight *= 0.01
            model.model.layers[block].mlp.down_proj.weight *= 0.01
    data = tokens(count=2)
    torchprune.sparsify(model, LayerSpec(2), data, progress=False)
    assert plan_shrink(model, data[0]).blocks == ["model.layers.1", "model.layers.2"]
    assert len({y.note for y in torchprune.report(model).layers}) == 2
    torchprune.densify(model)
    assert not torchprune.masks(model)


def test_layers_by_loss_are_those_whose_absence_costs_least() -> None:
    model, data = llama(num_hidden_layers=4), tokens(count=2)

    def loss_without(blocks: list[int]) -> float:
        small = copy.deepcopy(model)
        for block in blocks:
            for module in small.model.layers[block].modules():
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.weight)
        with torch.no_grad():
            return sum(float(small(b, labels=b).loss) for b in data)

    first = min(range(4), key=lambda block: loss_without([block]))
    rest = [block for block in range(4) if block != first]
    second = min(rest, key=lambda block: loss_without([first, block]))
    torchprune.sparsify(model, LayerSpec(2, score="loss"), data, progress=False)
    names = [f"model.layers.{block}" for block in sorted((first, second))]
    assert plan_shrink(model, data[0]).blocks == names


def test_biases_of_a_block_are_masked_too() -> None:
    family = FAMILIES["gpt2"]
    model, data = family.make(), family.data()
    torchprune.sparsify(model, LayerSpec(1), data, progress=False)
    masks = torchprune.masks(model)
    assert sum(key.endswith(".bias") for key in masks) == 4
    assert not any(mask.any() for mask in masks.values())
    again = torchprune.apply_masks(family.make(), masks)
    assert close(outputs(again, data[0]), outputs(model, data[0]), 0)


def test_programs_are_told_to_shrink_the_model() -> None:
    model = FAMILIES["mlp"].make()
    batch = FAMILIES["mlp"].data()[0]
    program = torch.export.export(model, (batch,))
    with pytest.raises(SpecError, match="sparsify and shrink the model, then export it"):
        torchprune.sparsify(program, NeuronSpec(), [batch])


def test_the_law_for_other_test_suites_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchprune.testing import assert_shrinks, removal

    family = FAMILIES["llama"]
    model, data = family.make(), family.data()
    with pytest.raises(AssertionError, match="nothing to remove"):
        assert_shrinks(model, data[0])
    torchprune.sparsify(model, NeuronSpec(0.5), data, progress=False)
    small = assert_shrinks(model, data[0])
    assert small.config.intermediate_size == 24
    assert torchprune.masks(model), "the model itself keeps its masks"

    def careless(net: nn.Module, plan: Any) -> nn.Module:
        shrink(net, plan)
        with torch.no_grad():
            net.model.layers[0].mlp.up_proj.weight[0] = 9.0
        return net

    monkeypatch.setattr(removal, "shrink", careless)
    with pytest.raises(AssertionError, match="output 0: apart by"):
        assert_shrinks(model, data[0])
    monkeypatch.setattr(removal, "shrink", lambda net, plan: net)
    with pytest.raises(AssertionError, match="parameters, planned"):
        assert_shrinks(model, data[0])
