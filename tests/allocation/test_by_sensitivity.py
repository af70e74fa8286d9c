"""`allocation=Sensitivity(...)`: the budget exact, costs as measured or predicted, refusals."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import assert_as_it_was, fingerprint
from families import FAMILIES, llama, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchprune
from torchprune import MagnitudeSpec, Sensitivity, SparseGPTSpec, WandaSpec, sensitivity
from torchprune.allocation.cost_curves import cost_at
from torchprune.errors import CalibrationError, CheckpointError, SpecError

QUICK = Sensitivity(levels=3, probes=2)


def zeros_of(model: nn.Module) -> dict[str, int]:
    return {layer.name: layer.zeros for layer in torchprune.report(model).layers}


def pruned(model: nn.Module, spec: Any, data: list[Any]) -> nn.Module:
    return torchprune.sparsify(copy.deepcopy(model), spec, data, progress=False)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", MagnitudeSpec(0.5)),
        ("gpt2", WandaSpec(0.6)),
        ("mixtral", WandaSpec(0.7, scope="layer")),
        ("mlp", WandaSpec(0.5, pattern="block:2x4", scope="layer")),
        ("resnet", WandaSpec(0.6, scope="layer")),
    ],
)
def test_the_budget_is_met_to_the_weight(name, spec):
    family = FAMILIES[name]
    model, data = family.make(), family.data(count=2)
    uniform = zeros_of(pruned(model, spec, data))
    uneven = zeros_of(pruned(model, dataclasses.replace(spec, allocation=QUICK), data))
    assert sum(uneven.values()) == sum(uniform.values())
    assert uneven != uniform


def test_methods_that_change_weights_are_shared_by_their_scores():
    model, data = llama(), tokens(count=2)
    spec = SparseGPTSpec(0.5, allocation=QUICK)
    found, again = (zeros_of(pruned(model, spec, data)) for _ in range(2))
    assert found == again
    assert sum(found.values()) == sum(zeros_of(pruned(model, SparseGPTSpec(0.5), data)).values())


def test_costs_that_were_measured_decide():
    """The second layer is free and the first is dear: all that may move moves."""
    torch.manual_seed(0)
    model, data = (
        nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20)),
        [torch.randn(9, 20)],
    )
    costs = {"0": [(0.2, 1.0), (0.8, 9.0)], "2": [(0.2, 1e-6), (0.8, 2e-6)]}
    options = Sensitivity(result=costs, spread=0.2)
    model = torchprune.sparsify(model, MagnitudeSpec(0.5, scope="layer", allocation=options), data,
                                progress=False)  # fmt: skip
    assert zeros_of(model) == {"0": 120, "2": 280}


def test_a_result_its_file_and_its_costs_say_the_same(tmp_path):
    model, data = llama(), tokens(count=2)
    path = tmp_path / "found.json"
    found = sensitivity(model, data, WandaSpec(), probes=2, path=path, progress=False)
    ways = [found, path, found.costs()]
    shared = [
        zeros_of(pruned(model, WandaSpec(0.5, allocation=Sensitivity(result=y)), data))
        for y in ways
    ]
    assert shared[0] == shared[1] == shared[2]
    assert found.allocation() == Sensitivity(result=found)
    assert len(repr(found.allocation())) < 250
    by_error = Sensitivity(result=path, metric="error")
    assert zeros_of(pruned(model, WandaSpec(0.5, allocation=by_error), data)) != shared[0]


def test_overrides_are_the_same_budget_and_the_same_layers():
    model, data = llama(), tokens(count=2)
    uniform = sum(zeros_of(pruned(model, WandaSpec(0.5), data)).values())
    found = sensitivity(model, data, WandaSpec(), probes=2, progress=False)
    for sparsity in (0.5, 0.45):
        uniform = sum(zeros_of(pruned(model, WandaSpec(sparsity), data)).values())
        spec = WandaSpec(sparsity, overrides=found.overrides(sparsity))
        assert sum(zeros_of(pruned(model, spec, data)).values()) == uniform


def test_layers_of_unknown_cost_keep_the_uniform_sparsity():
    model, data = llama(), tokens(count=2)
    found = sensitivity(model, data, WandaSpec(targets="*.mlp.*"), probes=2, progress=False)
    shared = pruned(model, WandaSpec(0.5, allocation=found.allocation()), data)
    for layer in torchprune.report(shared).layers:
        if "self_attn" in layer.name:
            assert layer.zeros == layer.size // 2
    assert any("8 layers of unknown cost" in note for note in torchprune.report(shared).notes)


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.7]), st.floats(-1, 10)), min_size=4),
    st.floats(0, 0.99),
    st.floats(0, 0.99),
)
def test_curves_rise_and_meet_what_was_measured(points, one, other):
    if len(dict(points)) < 2:
        with pytest.raises(SpecError, match="two sparsities"):
            cost_at(points, one)
        return
    low, high = sorted((one, other))
    assert 0 <= cost_at(points, low) <= cost_at(points, high) * (1 + 1e-9)


def test_between_measured_costs_logarithms_are_linear():
    points = [(0.3, 1.0), (0.5, 4.0), (0.7, 64.0)]
    assert cost_at(points, 0.5) == pytest.approx(4)
    assert cost_at(points, 0.4) == pytest.approx(2)
    assert cost_at(points, 0.8) == pytest.approx(256)
    assert cost_at(points, 0.1) == pytest.approx(0.25)


@pytest.mark.parametrize("cost", ["outputs", "error", "squared"])
def test_every_cost_is_deterministic_and_leaves_the_model(cost):
    model, data = llama(num_hidden_layers=1), tokens(count=2)
    before = fingerprint(model)
    spec = WandaSpec(0.5, allocation=Sensitivity(cost=cost, levels=3, probes=2))
    other = copy.deepcopy(model)
    one, two = pruned(model, spec, data), pruned(other, spec, data)
    assert zeros_of(one) == zeros_of(two)
    assert_as_it_was(model, before)
    assert all(p.grad is None for p in one.parameters())


def test_a_model_without_gradients_is_refused_and_left():
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        @torch.no_grad()
        def forward(self, x):
            return self.two(self.one(x))

    model, data = Cut(), [torch.randn(4, 8)]
    before = fingerprint(model)
    with pytest.raises(CalibrationError, match="do not depend on its layers by gradients"):
        torchprune.sparsify(model, WandaSpec(allocation="sensitivity"), data, progress=False)
    assert_as_it_was(model, before)
    by_error = WandaSpec(allocation=Sensitivity(cost="error"))
    torchprune.sparsify(model, by_error, data, progress=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cost": "size"}, "accepted: 'outputs', 'error', 'squared'"),
        ({"levels": 1}, "levels must be at least 2"),
        ({"probes": 0}, "probes must be"),
        ({"spread": 2}, "spread must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"metric": 3}, "metric must be"),
        ({"result": 3}, "result must be"),
        ({"result": {"a": 3}}, "result must be"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(SpecError, match=said):
        Sensitivity(**options)


def test_costs_of_another_model_and_damaged_files_are_refused(tmp_path: Path):
    model, data = llama(), tokens(count=1)
    before = fingerprint(model)
    path = tmp_path / "found.json"
    path.write_text('{"format": "something"}', "utf-8")
    for result, error, said in (
        ({"other": [(0.3, 1.0), (0.5, 2.0)]}, CalibrationError, "none of its layers"),
        ({"model.layers.0.mlp.up_proj": [(0.3, 1.0)]}, SpecError, "two sparsities"),
        (path, CheckpointError, "no sensitivity"),
        (tmp_path / "nothing.json", CheckpointError, "no regular file"),
    ):
        with pytest.raises(error, match=said):
            torchprune.sparsify(
                model, WandaSpec(allocation=Sensitivity(result=result)), data, progress=False
            )
    assert_as_it_was(model, before)


def test_a_saved_model_remembers_the_rule_and_not_the_costs(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    costs = {"0": [(0.3, 1.0), (0.5, 9.0)], "2": [(0.3, 1.0), (0.5, 2.0)]}
    spec = WandaSpec(0.5, allocation=Sensitivity(result=costs, spread=0.3))
    torchprune.sparsify(model, spec, [torch.randn(9, 8)], progress=False)
    torchprune.save(model, tmp_path / "saved")
    fresh = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    loaded = torchprune.load_into(fresh, tmp_path / "saved")
    assert zeros_of(loaded) == zeros_of(model)
    assert spec != dataclasses.replace(spec, allocation="sensitivity")
