"""The dense model's runs beside the batches, and the cross moments taken from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from by_hand import assert_as_it_was, fingerprint, inputs_of, prune
from families import FAMILIES, tokens
from torch import Tensor, nn

import torchprune
from torchprune import ADMMSpec, SparseGPTSpec, WandaSpec
from torchprune.calibration.batches import read_batches
from torchprune.calibration.lockstep import Calibration
from torchprune.calibration.moments import Moments
from torchprune.masking.targets import make_plan
from torchprune.methods.solve import Solver

DENSE_LAYERS = ["llama", "gpt2", "opt", "bert", "t5", "vit"]


def zero_half(weight: Tensor) -> None:
    """A change no method makes, and no dense run must see."""
    weight.data[: max(1, len(weight) // 2)] = 0


@pytest.mark.parametrize(
    ("name", "hold"),
    [*((name, None) for name in DENSE_LAYERS), ("llama", torch.bfloat16)],
    ids=str,
)
def test_cross_moments_pair_each_input_with_the_dense_models(
    name: str, hold: torch.dtype | None
) -> None:
    """At each stop: what the layer reads now, and what the untouched model reads there."""
    family = FAMILIES[name]
    model, data = family.make(), family.data()
    dense = copy.deepcopy(model)
    plan = make_plan(model, WandaSpec())
    batches = read_batches(data, model, 10).batches
    met = 0
    with Calibration(
        model, plan.targets, batches, gram=True, blocks=plan.blocks, cross=True, hold=hold
    ) as calibration:
        for stop in calibration.stops():
            for target, moments in stop:
                layer = target.layer
                if moments.cross is not None:
                    now = copied_inputs(model, layer.name, data)
                    before = copied_inputs(dense, layer.name, data)
                    expected = sum(
                        b.double().T @ n.double() for b, n in zip(before, now, strict=True)
                    )
                    tolerance = 1e-4 if hold is None else 3e-2
                    scale = float(expected.abs().max()) + 1e-6
                    missed = float((moments.cross[0].double() - expected).abs().max())
                    assert missed <= tolerance * scale, layer.name
                    met += 1
            for target, _ in stop:
                zero_half(target.weight)
    assert met == len(plan.targets)


def copied_inputs(model: nn.Module, name: str, data: list[Any]) -> list[Tensor]:
    """A layer's inputs as rows, from a whole run of a copy (the model itself is in use)."""
    other = copy.deepcopy(model)
    for module in other.modules():
        module._forward_pre_hooks.clear()
        vars(module).pop("forward", None)
    found = inputs_of(other, [name], data, slice(0, 1))[name]
    return [x.reshape(-1, x.shape[-1]) for x in found]


def test_where_nothing_is_pruned_the_cross_moment_is_the_second_moment() -> None:
    family = FAMILIES["llama"]
    model, data = family.make(), family.data()
    plan = make_plan(model, WandaSpec())
    batches = read_batches(data, model, 10).batches
    with Calibration(
        model, plan.targets, batches, gram=True, blocks=plan.blocks, cross=True
    ) as calibration:
        for stop in calibration.stops():
            for _, moments in stop:
                assert moments.cross is not None
                assert moments.gram is not None
                torch.testing.assert_close(moments.cross, moments.gram, rtol=1e-4, atol=1e-4)


def test_every_layer_computes_twice_a_batch_and_no_more() -> None:
    family = FAMILIES["llama"]
    model, data = family.make(), family.data()
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_hook(
                lambda *_, name=name: calls.__setitem__(name, calls.get(name, 0) + 1)
            )
    prune(model, ADMMSpec(alpha=0.5), data)
    last = max(calls)
    for name, count in calls.items():
        if name != last and not name.endswith("layers.1.mlp.down_proj"):
            assert count == 2 * len(data), name


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_routed_experts_count_their_own_rows(name: str) -> None:
    """Other tokens may come to an expert in the dense run: rows do not correspond."""
    family = FAMILIES[name]
    model, data = family.make(), family.data()
    plan = make_plan(model, WandaSpec())
    batches = read_batches(data, model, 10).batches
    fused = 0
    with Calibration(
        model, plan.targets, batches, gram=True, blocks=plan.blocks, cross=True
    ) as calibration:
        for stop in calibration.stops():
            for target, moments in stop:
                if target.view.kind.startswith("experts"):
                    assert moments.cross is not None
                    assert moments.gram is not None
                    torch.testing.assert_close(moments.cross, moments.gram, rtol=1e-4, atol=1e-4)
                    fused += 1
                zero_half(target.weight)
    assert fused == 4


class Chosen(nn.Module):
    """Rows go to one of two layers by the sign of what an earlier layer gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = ((x[:, 0] > 0) == bool(i)).nonzero().flatten()
            if len(rows):
                out[rows] = expert(x[rows])
        result: Tensor = self.last(out)
        return result


def test_batches_routed_otherwise_than_their_twins_still_end() -> None:
    torch.manual_seed(1)
    data = [torch.randn(3, 8) for _ in range(12)] + [torch.randn(1, 8) for _ in range(12)]
    model = Chosen()
    prune(model, ADMMSpec(0.5, alpha=0.5, targets="*"), data)
    assert set(torchprune.masks(model)) == {
        "first.weight",
        "experts.0.weight",
        "experts.1.weight",
        "last.weight",
    }
    for mask in torchprune.masks(model).values():
        assert (mask.sum(1) == 4).all()


def test_rows_that_a_router_chose_are_not_paired() -> None:
    torch.manual_seed(1)
    model, data = Chosen(), [torch.randn(7, 8) for _ in range(4)]
    plan = make_plan(model, WandaSpec(targets="*"))
    batches = read_batches(data, model, 10).batches
    paired = {}
    with Calibration(model, plan.targets, batches, gram=True, blocks={}, cross=True) as calibration:
        for stop in calibration.stops():
            for target, moments in stop:
                assert moments.cross is not None
                assert moments.gram is not None
                paired[target.name] = not torch.allclose(moments.cross, moments.gram, rtol=1e-3)
                target.weight.data[1:] *= -0.5  # the router reads row 0 and chooses as before
    assert paired == {"first": False, "experts.0": False, "experts.1": False, "last": True}


class Reused(nn.Module):
    """One layer used twice in a forward: the second use is after it was pruned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.layer(torch.relu(self.layer(x))))
        return result


def test_a_layer_used_twice_is_dense_both_times_in_the_dense_run() -> None:
    data = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    model, dense = Reused(), Reused()
    spec = ADMMSpec(0.5, alpha=1.0)
    prune(model, spec, data)
    moments = Moments.empty(1, 8, torch.device("cpu"), gram=True, cross=True)
    with torch.no_grad():
        for x in data:
            now, before = (m.layer(torch.relu(m.layer(x))) for m in (model, dense))
            moments.add([now], dense=[before])
    moments.finish()
    weight = dense.last.weight.detach()
    expected = Solver(spec, moments, "last").solve(0, [weight], spec.goal, [None], [None])[0]
    assert torch.equal(torchprune.masks(model)["last.weight"], expected.keep)
    torch.testing.assert_close(model.last.weight.detach(), expected.weight, rtol=1e-3, atol=1e-4)


class Late(nn.Module):
    """One layer is used again, at the end, by batches of more than four rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.relu(self.one(x)))
        if len(x) > 4:
            x = self.one(torch.relu(x))
        result: Tensor = self.three(x)
        return result


def test_a_dense_run_that_comes_to_a_pruned_layer_goes_no_further() -> None:
    """What follows would not be dense: those batches count their own rows instead."""
    data = [torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows)) for rows in (3, 6)]
    model, dense = Late(), Late()
    spec = ADMMSpec(0.5, alpha=1.0)
    prune(model, spec, data)
    moments = Moments.empty(1, 8, torch.device("cpu"), gram=True, cross=True)
    with torch.no_grad():
        small, large = (model.two(torch.relu(model.one(x))) for x in data)
        moments.add([small], dense=[dense.two(torch.relu(dense.one(data[0])))])
        moments.add([model.one(torch.relu(large))])
    moments.finish()
    weight = dense.three.weight.detach()
    expected = Solver(spec, moments, "three").solve(0, [weight], spec.goal, [None], [None])[0]
    torch.testing.assert_close(model.three.weight.detach(), expected.weight, rtol=1e-3, atol=1e-4)


def test_alpha_changes_what_weights_become_but_only_after_something_was_pruned() -> None:
    family = FAMILIES["llama"]
    zero, half = family.make(), family.make()
    prune(zero, ADMMSpec(), family.data())
    prune(half, ADMMSpec(alpha=0.5), family.data())
    first = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(
        half.get_submodule(first).weight, zero.get_submodule(first).weight, rtol=1e-3, atol=1e-5
    )
    later = "model.layers.1.mlp.down_proj"
    assert not torch.equal(half.get_submodule(later).weight, zero.get_submodule(later).weight)


@pytest.mark.parametrize("batch", [0, 1])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(batch: int) -> None:
    family = FAMILIES["llama"]
    model, data = family.make(), family.data()
    before = fingerprint(model)
    count = 0

    def fail(*_: object) -> None:
        nonlocal count
        count += 1
        if count > 4 + batch:
            raise RuntimeError("the model's own error")

    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="the model's own error"):
        prune(model, SparseGPTSpec(alpha=0.5, refine="pcg"), data)
    handle.remove()
    assert_as_it_was(model, before)


def test_padding_does_not_count_in_the_cross_moment() -> None:
    family = FAMILIES["llama"]
    ids = tokens()[0]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    other = ids.clone()
    other[:, 8:] = 7
    results = []
    for batch in (ids, other):
        model = family.make()
        prune(model, ADMMSpec(alpha=0.5), [{"input_ids": batch, "attention_mask": mask}])
        results.append({k: v.clone() for k, v in model.state_dict().items()})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-3, atol=1e-5)
