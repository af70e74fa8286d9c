"""Training a block's kept weights: what changes, what must not, and that it never makes worse."""

from __future__ import annotations

import copy
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import assert_as_it_was, fingerprint, prune
from families import FAMILIES, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import output
from torch import Tensor, nn

import torchprune
from torchprune import ADMMSpec, MagnitudeSpec, NeuronSpec, Reconstruct, SparseGPTSpec, WandaSpec
from torchprune.calibration.block_calls import Call, Unit
from torchprune.errors import CalibrationError
from torchprune.methods.precision import has_bfloat16
from torchprune.methods.reconstruct import Gain, reconstruct

SHORT = Reconstruct(epochs=2)


def unit_of(seed: int, calls: int, rows: int = 16) -> tuple[Unit, list[tuple[Tensor, Tensor]]]:
    """Two layers with half their weights gone, and what they gave before, on calls of theirs."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
    xs = [torch.randn(1, rows, 8) for _ in range(calls)]
    with torch.no_grad():
        wanted = [module(x) for x in xs]
    weights = []
    for layer in (module[0], module[2]):
        keep = torch.rand(layer.weight.shape) > 0.5
        layer.weight.data = layer.weight.data.where(keep, 0)
        weights.append((layer.weight, keep))
    pairs = enumerate(zip(xs, wanted, strict=True))
    made = [Call((x,), {}, [y], [None], i) for i, (x, y) in pairs]
    return Unit("unit", module, [], made), weights


def missed(unit: Unit, calls: list[Call]) -> float:
    """Mean over calls and tokens of the squared error as a share of the token's square, float64."""
    total = 0.0
    with torch.no_grad():
        for call in calls:
            out, wanted = unit.module(*call.args).double(), call.wanted[0].double()
            counts = call.counts[0]
            share = (out - wanted).square().sum(-1) / wanted.square().sum(-1)
            total += float(share.mean() if counts is None else share[counts].mean())
    return total / len(calls)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    calls=st.integers(1, 6),
    rate=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]),
    batches=st.integers(1, 3),
    held_out=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_what_comes_back_is_never_worse_on_what_was_held_out(
    seed: int, calls: int, rate: float, batches: int, held_out: float
) -> None:
    unit, weights = unit_of(seed, calls)
    options = Reconstruct(3, rate, batches, held_out)
    count = min(calls - 1, round(held_out * calls))
    judging = unit.calls[calls - count :] if count else unit.calls
    before = missed(unit, judging)
    biases = [unit.module[i].bias.detach().clone() for i in (0, 2)]
    gain = reconstruct(unit, weights, options)
    after = missed(unit, judging)
    assert after <= before * (1 + 1e-5)
    assert gain.before == pytest.approx(before, rel=1e-3)
    assert gain.after == pytest.approx(after, rel=1e-3)
    assert (gain.epochs == 0) == (gain.after == gain.before)
    for weight, keep in weights:
        assert not weight.detach()[~keep].any()
        assert not torch.signbit(weight.detach()[~keep]).any()
        assert weight.grad is None
    for i, bias in zip((0, 2), biases, strict=True):
        assert torch.equal(unit.module[i].bias, bias), "only kept weights learn"


def test_it_comes_near_the_least_squares_of_a_linear_unit() -> None:
    """One layer whose tokens all have the same square: the loss is a least squares of its rows."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(400, 8) @ torch.randn(8, 8)
    wanted = x @ layer.weight.detach().T
    x = x / wanted.norm(dim=1, keepdim=True)
    wanted = wanted / wanted.norm(dim=1, keepdim=True)
    keep = torch.rand(4, 8) > 0.5
    layer.weight.data *= keep
    best = torch.zeros(4, 8, dtype=torch.float64)
    for row in range(4):
        at = keep[row].nonzero().flatten()
        best[row, at] = torch.linalg.lstsq(
            x[:, at].double(), wanted[:, row : row + 1].double()
        ).solution[:, 0]
    least = float((x.double() @ best.T - wanted.double()).square().sum(1).mean())
    calls = [
        Call((a[None],), {}, [b[None]], [None], i)
        for i, (a, b) in enumerate(zip(x.split(40), wanted.split(40), strict=True))
    ]
    unit = Unit("layer", layer, [], calls)
    gain = reconstruct(unit, [(layer.weight, keep)], Reconstruct(60, 0.05, held_out=0.0))
    assert gain.before > 1.5 * least
    assert least * 0.999 <= gain.after < 1.02 * least


def test_tokens_that_do_not_count_teach_nothing() -> None:
    results = []
    for noise in (0.0, 5.0):
        unit, weights = unit_of(0, 4)
        for call in unit.calls:
            call.counts = [torch.arange(16).view(1, 16) < 10]
            call.wanted[0][:, 10:] += noise
        reconstruct(unit, weights, SHORT)
        results.append([weight.detach().clone() for weight, _ in weights])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_steps_are_not_lost_in_sixteen_bits(dtype: torch.dtype) -> None:
    unit, weights = unit_of(1, 4)
    unit.module.to(dtype)
    for call in unit.calls:
        call.args = (call.args[0].to(dtype),)
    found = [(unit.module[i].weight, keep) for i, (_, keep) in zip((0, 2), weights, strict=True)]
    gain = reconstruct(unit, found, Reconstruct(30, 1e-3, held_out=0.0))
    assert gain.after < 0.95 * gain.before
    assert all(weight.dtype == dtype for weight, _ in found)
    assert not any(weight.detach()[~keep].any() for weight, keep in found)


def test_outputs_that_are_not_finite_are_refused() -> None:
    unit, weights = unit_of(0, 3)
    unit.calls[2].wanted[0][0, 0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="unit: its outputs are not finite"):
        reconstruct(unit, weights, Reconstruct(held_out=0.3))


def test_nothing_to_learn_from_changes_nothing() -> None:
    unit, weights = unit_of(0, 1)
    unit.calls.clear()
    before = [weight.detach().clone() for weight, _ in weights]
    assert reconstruct(unit, weights, SHORT) == Gain(0.0, 0.0, 0)
    assert all(torch.equal(w, b) for (w, _), b in zip(weights, before, strict=True))


# -- through sparsify ------------------------------------------------------------------------------

FAMILY_NAMES = ["llama", "gemma", "mixtral", "gpt2", "opt", "bert", "t5", "vit", "resnet"]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_families_keep_their_counts_and_come_nearer(name: str) -> None:
    family = FAMILIES[name]
    data = family.data(count=6)
    plain, trained = family.make(), family.make()
    dense = family.make()
    prune(plain, WandaSpec(), data)
    prune(trained, WandaSpec(reconstruct=Reconstruct(6, 0.02, alpha=0.0)), data)
    before, after = torchprune.report(plain), torchprune.report(trained)
    assert [y.zeros for y in after.layers] == [y.zeros for y in before.layers]
    assert all(y.zeros == y.size // 2 for y in after.layers)
    assert "reconstructed" in after.notes[-1]
    wanted = [output(dense, b) for b in data]

    def distance(model: nn.Module) -> float:
        return sum(
            float((output(model, b) - w).square().sum()) for b, w in zip(data, wanted, strict=True)
        )

    assert distance(trained) < distance(plain)


def test_numbers_reported_are_those_of_the_model() -> None:
    """The last block's error on the held-out batch, by hand: a whole run of both models."""
    family = FAMILIES["llama"]
    data = family.data(count=8)
    dense, model = family.make(), family.make()
    prune(model, ADMMSpec(reconstruct=Reconstruct(2, 0.01, held_out=0.125)), data)
    (note,) = torchprune.report(model).notes

    def hidden(m: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return list(m.model(data[7], output_hidden_states=True).hidden_states)

    # hidden_states holds each block's input; the last entry is after the final norm.
    found: list[Tensor] = []
    for m in (dense, model):
        m.model.layers[1].register_forward_hook(
            lambda _, __, out: found.append(out if isinstance(out, Tensor) else out[0])
        )
        first = hidden(m)[1]
        found.insert(len(found) - 1, first)
    first_dense, last_dense, first_now, last_now = found

    def share(now: Tensor, wanted: Tensor) -> float:
        return float(((now - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())

    mean = (share(first_now, first_dense) + share(last_now, last_dense)) / 2
    assert float(note.split("-> ")[1].split(" ")[0]) == pytest.approx(mean, rel=1e-2)


@pytest.mark.parametrize(
    "spec",
    [SparseGPTSpec(pattern="2:4", reconstruct=SHORT), NeuronSpec(0.5, reconstruct=SHORT)],
    ids=["weights", "neurons"],
)
def test_the_same_call_gives_the_same_bits(spec: Any) -> None:
    family = FAMILIES["llama"]
    states = []
    for _ in range(2):
        model = family.make()
        torch.manual_seed(len(states))  # whatever the caller's generator holds
        prune(model, spec, family.data(count=4))
        states.append(model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    other = family.make()
    seeded = Reconstruct(epochs=2, seed=5)
    prune(
        other,
        type(spec)(
            **({"pattern": "2:4"} if isinstance(spec, SparseGPTSpec) else {"sparsity": 0.5}),
            reconstruct=seeded,
        ),
        family.data(count=4),
    )
    assert not all(torch.equal(v, other.state_dict()[k]) for k, v in states[0].items())


@pytest.mark.parametrize(
    "spec",
    [
        MagnitudeSpec(reconstruct=SHORT),
        ADMMSpec(alpha=0.5, reconstruct=SHORT),
        NeuronSpec(0.5, reconstruct=SHORT),
        NeuronSpec(0.5, refit=False, reconstruct=SHORT),
    ],
    ids=["magnitude", "admm", "neurons", "neurons without refit"],
)
def test_what_was_trained_can_be_taken_back(spec: Any) -> None:
    family = FAMILIES["llama"]
    model, dense = family.make(), family.make()
    prune(model, spec, family.data(count=4), keep_dense=True)
    assert not torch.equal(
        model.model.layers[1].mlp.down_proj.weight, dense.model.layers[1].mlp.down_proj.weight
    )
    torchprune.densify(model)
    for key, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize(
    "spec",
    [WandaSpec(reconstruct=SHORT), NeuronSpec(0.5, reconstruct=SHORT)],
    ids=["weights", "neurons"],
)
def test_without_the_dense_weights_there_is_no_way_back(spec: Any) -> None:
    family = FAMILIES["llama"]
    model = family.make()
    prune(model, spec, family.data(count=4))
    with pytest.raises(torchprune.errors.MaskError, match="keep_dense=True"):
        torchprune.densify(model)


@pytest.mark.parametrize(
    "spec",
    [WandaSpec(reconstruct=SHORT), NeuronSpec(0.5, reconstruct=SHORT)],
    ids=["weights", "neurons"],
)
def test_an_error_while_training_leaves_the_model_as_it_was(
    spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["llama"]
    model = family.make()
    before = fingerprint(model)
    steps, real = [0], torch.optim.Adam.step

    def step(self: Any, *args: Any) -> Any:
        steps[0] += 1
        if steps[0] > 9:  # in the second block
            raise RuntimeError("out of memory")
        return real(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(RuntimeError, match="out of memory"):
        prune(model, spec, family.data(count=4))
    assert_as_it_was(model, before)


def test_callers_in_inference_mode_are_served() -> None:
    family = FAMILIES["llama"]
    one, other = family.make(), family.make()
    prune(one, WandaSpec(reconstruct=SHORT), family.data(count=3))
    with torch.inference_mode():
        data = family.data(count=3)
        prune(other, WandaSpec(reconstruct=SHORT), data)
    for key, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
        assert not other.state_dict()[key].is_inference()


def test_activations_held_in_sixteen_bits_are_at_hand_again() -> None:
    """As if blocks had read rounded inputs, and not freed ones."""
    family = FAMILIES["llama"]
    data = [torch.cat([t] * 24) for t in family.data(count=4)]  # large enough to be packed
    exact, held = family.make(), family.make()
    spec = ADMMSpec(0.5, alpha=0.5, reconstruct=SHORT)
    prune(exact, spec, data)
    prune(held, spec, data, hold=torch.bfloat16)
    dense = family.make()
    wanted = [output(dense, b) for b in data]
    missed_by = [
        sum(float((output(m, b) - w).square().sum()) for b, w in zip(data, wanted, strict=True))
        for m in (exact, held)
    ]
    assert missed_by[1] < 1.2 * missed_by[0]


def test_a_model_without_blocks_is_one_unit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    dense = copy.deepcopy(model)
    data = [torch.randn(32, 8) for _ in range(5)]
    plain = prune(copy.deepcopy(model), WandaSpec(), data)
    trained = prune(model, WandaSpec(reconstruct=Reconstruct(10, 0.02)), data)
    fresh = torch.randn(200, 8)
    with torch.no_grad():
        wanted = dense(fresh)
        assert float((trained(fresh) - wanted).square().sum()) < 0.8 * float(
            (plain(fresh) - wanted).square().sum()
        )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_gradients_are_left_behind(name: str) -> None:
    """Neither of what learns nor of norms and biases, and the caller's own stay."""
    model = FAMILIES[name].make()
    own, *others = model.parameters()
    own.grad = torch.ones_like(own)
    prune(model, WandaSpec(reconstruct=SHORT), tokens(count=4))
    assert torch.equal(own.grad, torch.ones_like(own))
    assert all(p.grad is None for p in others)
    assert all(p.requires_grad for p in others)


def test_what_cannot_change_costs_no_gradients() -> None:
    """A norm before all that learns: nothing flows back to it."""
    torch.manual_seed(0)
    flows: list[bool] = []

    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            flows.append(out.requires_grad)
            return out

    module = nn.Sequential(Norm(8), nn.Linear(8, 6))
    calls = [Call((torch.randn(1, 5, 8),), {}, [torch.randn(1, 5, 6)], [None], i) for i in range(4)]
    weight, bias = module[1].weight, module[1].bias.detach().clone()
    gain = reconstruct(Unit("", module, [], calls), [(weight, weight > 0)], SHORT)
    assert gain.after < gain.before
    assert flows
    assert not any(flows)
    assert torch.equal(module[1].bias, bias)


def test_padding_teaches_nothing() -> None:
    family = FAMILIES["llama"]
    results = []
    for filler in (5, 9):
        model, data = family.make(), []
        for ids in tokens(count=4):
            mask = torch.ones_like(ids)
            mask[:, 8:] = 0
            data.append(
                {"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask}
            )
        prune(model, ADMMSpec(reconstruct=SHORT), data)
        results.append({k: v.clone() for k, v in model.state_dict().items()})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-3, atol=1e-4)


def test_structures_are_still_removed_exactly() -> None:
    family = FAMILIES["llama"]
    model, data = family.make(), family.data(count=4)
    prune(model, NeuronSpec(0.5, reconstruct=SHORT), data)
    masked = output(model, data[0])
    torchprune.shrink(model, torchprune.plan_shrink(model, data[0]))
    torch.testing.assert_close(output(model, data[0]), masked, rtol=1e-5, atol=1e-5)


class Spy(nn.Module):
    """A layer that notes in which dtype it gives its outputs, and whether gradients are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(8, 6), set[tuple[torch.dtype, bool]]()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        self.seen.add((out.dtype, out.requires_grad))
        return out


@pytest.mark.parametrize(
    ("mixed", "able", "learning"),
    [(True, True, torch.bfloat16), (True, False, torch.float32), (False, True, torch.float32)],
)
def test_gradients_are_mixed_where_that_is_fast_and_judging_never(
    mixed: bool, able: bool, learning: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchprune.methods.reconstruct.pays_in_bfloat16", lambda device: able)
    spy = Spy()
    calls = [Call((torch.randn(1, 5, 8),), {}, [torch.randn(1, 5, 6)], [None], i) for i in range(4)]
    weight = spy.layer.weight
    keep = torch.rand(weight.shape) > 0.5
    weight.data *= keep
    gain = reconstruct(Unit("", spy, [], calls), [(weight, keep)], Reconstruct(mixed=mixed))
    assert gain.after < gain.before
    assert spy.seen == {(learning, True), (torch.float32, False)}
    assert weight.dtype == torch.float32
    assert not weight.detach()[~keep].any()


@pytest.mark.parametrize("mixed", [True, False])
def test_a_callers_autocast_remembers_no_weights(mixed: bool) -> None:
    unit, weights = unit_of(0, 4)
    with torch.autocast("cpu", torch.bfloat16):
        unit.module(*unit.calls[0].args)
        gain = reconstruct(unit, weights, Reconstruct(mixed=mixed))
        assert torch.is_autocast_cache_enabled()
        after = missed(unit, unit.calls)
    assert gain.after == pytest.approx(after, rel=1e-3)
    assert gain.after < 0.9 * gain.before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_other_dtypes_learn_in_their_own(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchprune.methods.reconstruct.pays_in_bfloat16", lambda device: True)
    spy = Spy().to(dtype)
    calls = [Call((torch.randn(1, 5, 8).to(dtype),), {}, [torch.randn(1, 5, 6)], [None], 0)]
    weight = spy.layer.weight
    reconstruct(Unit("", spy, [], calls), [(weight, torch.ones(6, 8) > 0)], Reconstruct(1))
    assert spy.seen == {(dtype, True), (dtype, False)}


def test_only_devices_built_for_it_count_as_fast() -> None:
    assert not has_bfloat16(torch.device("meta"))
    flags = Path("/proc/cpuinfo")
    if flags.exists() and platform.machine() == "x86_64":
        here = set(flags.read_text().split())
        assert has_bfloat16(torch.device("cpu")) == bool(here & {"avx512_bf16", "amx_bf16"})
