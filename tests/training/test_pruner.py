"""`Pruner`: when masks change, what is left alone, how training goes on after a kill."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import torchprune
from torchprune import MagnitudeSpec, Pruner, SparseGPTSpec, Swaps, WandaSpec
from torchprune.errors import CalibrationError, MaskError, SpecError, TargetError
from torchprune.reports.report import runs_of
from torchprune.training import (
    SET,
    Constant,
    Cubic,
    Linear,
    MagnitudeRegrowth,
    OneShot,
    RigL,
    StraightThrough,
)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 8))


def batches(count: int = 3) -> list[Tensor]:
    own = torch.Generator().manual_seed(7)
    return [torch.randn(16, 8, generator=own) for _ in range(count)]


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    model(torch.randn(6, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def share(model: nn.Module) -> float:
    found = torchprune.masks(model).values()
    return 1 - sum(int(m.sum()) for m in found) / sum(m.numel() for m in found)


# -- when ------------------------------------------------------------------------------------------


def test_nothing_happens_before_the_start_and_after_the_end() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, MagnitudeSpec(0.5), Linear(0.25, 0.5, start=3, end=7, every=2))
    changes = []
    for step in range(1, 12):
        learn(model, optimizer, step)
        if pruner.step(optimizer):
            changes.append(step)
        assert share(model) == pruner.sparsity == pruner.schedule(step)
    assert changes == [3, 5, 7]


def test_a_call_without_a_new_step_does_nothing() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = Pruner(model, MagnitudeSpec(0.5), OneShot(0.5, at=2))
    assert not pruner.step(optimizer)  # no step was made
    learn(model, optimizer, 1)
    assert not pruner.step(optimizer)
    assert not pruner.step(optimizer)
    assert pruner.steps == 1
    learn(model, optimizer, 2)
    assert pruner.step()  # it saw the optimizer at work
    assert not pruner.step()
    assert pruner.steps == 2


def test_steps_of_other_models_do_not_count() -> None:
    model, other = net(), net()
    optimizer, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
    pruner = Pruner(model, MagnitudeSpec(0.5), OneShot(0.5, at=9))
    learn(model, optimizer, 0)
    pruner.step()
    learn(other, theirs, 0)
    pruner.step()
    assert pruner.steps == 1


def test_loops_without_an_optimizer_of_torch_count_calls() -> None:
    model = net()
    pruner = Pruner(model, MagnitudeSpec(0.5), OneShot(0.5, at=3))
    for _ in range(3):
        for p in model.parameters():
            p.data -= 0.01  # no version counter tells of this
        pruner.step()
    assert pruner.steps == 3
    assert share(model) == 0.5


def test_compiled_optimizers_count() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = torch.compile(optimizer.step, backend="aot_eager")
    pruner = Pruner(model, MagnitudeSpec(0.5), Linear(0.0, 0.5, start=1, end=4))
    for step in range(1, 7):
        model(torch.randn(6, 8)).square().mean().backward()
        run()
        optimizer.zero_grad(set_to_none=False)
        pruner.step(optimizer)
        assert not pruner.step(optimizer)
        assert pruner.steps == step
        for key, mask in torchprune.masks(model).items():
            weight = model.get_submodule(key.removesuffix(".weight")).weight
            assert bool((weight[~mask] == 0).all())


def test_the_number_of_a_step_may_be_told() -> None:
    model = net()
    pruner = Pruner(model, MagnitudeSpec(0.5), Linear(0.0, 0.5, start=0, end=100, every=10))
    assert pruner.step(at=35)
    assert pruner.sparsity == pytest.approx(0.15)
    assert not pruner.step(at=35)
    assert not pruner.step(at=39)
    assert pruner.step(at=1000)
    with pytest.raises(SpecError, match="not before the last one, 1000; got 3"):
        pruner.step(at=3)
    assert share(model) == 0.5


def test_any_callable_is_a_schedule() -> None:
    model = net()
    pruner = Pruner(model, MagnitudeSpec(0.5), lambda step: 0.25 if step < 2 else 0.5)
    assert share(model) == 0.25
    assert [pruner.step() for _ in range(3)] == [False, True, False]
    assert share(model) == 0.5


@pytest.mark.parametrize("level", [0.7, -0.1, 1.0, "half", True])
def test_a_schedule_that_asks_for_too_much_is_refused(level: Any) -> None:
    model = net()
    pruner = Pruner(model, MagnitudeSpec(0.5), lambda step: 0.25 if step < 2 else level)
    pruner.step()
    with pytest.raises(SpecError, match=r"schedule\(2\)"):
        pruner.step()
    assert share(model) == 0.25


# -- what ------------------------------------------------------------------------------------------


def test_layers_with_overrides_get_there_in_proportion() -> None:
    model = net()
    spec = MagnitudeSpec(0.5, overrides={"0": 0.75, "3": "2:4"})
    pruner = Pruner(model, spec, Linear(0.0, 0.5, start=0, end=10))
    pruner.step(at=5)
    masks = torchprune.masks(model)
    assert int((~masks["0.weight"]).sum()) == int(128 * 0.375)
    assert int((~masks["3.weight"]).sum()) == 32  # half of what 2:4 prunes
    groups = (~masks["3.weight"]).reshape(-1, 4).sum(1)
    assert int(groups.max()) == 2
    pruner.step(at=10)
    masks = torchprune.masks(model)
    assert int((~masks["0.weight"]).sum()) == 96
    assert bool((masks["3.weight"].reshape(-1, 4).sum(1) == 2).all())


def test_masks_that_are_there_only_grow() -> None:
    model = torchprune.sparsify(net(), MagnitudeSpec(0.25))
    before = torchprune.masks(model)
    pruner = Pruner(model, MagnitudeSpec(0.5), Linear(0.0, 0.5, start=0, end=10))
    for key, mask in torchprune.masks(model).items():
        assert torch.equal(mask, before[key])
    for _ in range(10):
        pruner.step()
        for key, mask in torchprune.masks(model).items():
            assert bool((mask <= before[key]).all())
    assert share(model) == 0.5


def test_without_a_schedule_all_is_pruned_at_once() -> None:
    model = net()
    pruner = Pruner(model, MagnitudeSpec(pattern="2:4"))
    assert share(model) == pruner.sparsity == 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_it_prunes_what_sparsify_prunes(seed: int) -> None:
    """At one blow, for methods with data and without."""
    for spec in (
        MagnitudeSpec(0.6, scope="global"),
        WandaSpec(pattern="2:4"),
        SparseGPTSpec(0.5),
        WandaSpec(0.5, refine="pcg"),
    ):
        model = net(seed)
        twin = copy.deepcopy(model)
        data = batches() if spec.needs_data else None
        Pruner(model, spec, data=data)
        torchprune.sparsify(twin, spec, data, progress=False)
        for a, b in zip(
            torchprune.fold(model).parameters(), torchprune.fold(twin).parameters(), strict=True
        ):
            assert torch.equal(a, b)


def test_data_are_read_anew_and_the_loader_s_shuffle_is_left_alone() -> None:
    def run(spec: Any) -> tuple[list[Tensor], nn.Module]:
        model = net()
        loader = DataLoader(torch.cat(batches()), batch_size=8, shuffle=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(3)
        schedule = Linear(0.0, 0.5, start=1, end=9, every=2)
        pruner = Pruner(model, spec, schedule, data=loader if spec.needs_data else None)
        seen = []
        for _ in range(2):
            for x in loader:
                seen.append(x)
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                pruner.step(optimizer)
        return seen, model

    plain, _ = run(MagnitudeSpec(0.5))
    seen, model = run(WandaSpec(0.5))
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert share(model) == 0.5
    report = torchprune.report(model)
    assert all(layer.tokens == 48 and layer.error is not None for layer in report.layers)
    assert len(runs_of(model)) == 1  # of the last change, not of each


def test_uneven_shares_are_kept_on_the_way() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)])
    data = [torch.randn(64, 16) * torch.linspace(0.1, 3, 16) for _ in range(3)]
    spec = WandaSpec(0.6, scope="layer", allocation=torchprune.LeastError(spread=0.2))
    twin = torchprune.sparsify(copy.deepcopy(model), spec, data, progress=False)
    wanted = {k: int((~m).sum()) for k, m in torchprune.masks(twin).items()}
    pruner = Pruner(model, spec, Linear(0.0, 0.6, start=0, end=3), data=data)
    for _ in range(3):
        pruner.step()
    counts = {k: int((~m).sum()) for k, m in torchprune.masks(model).items()}
    assert counts == wanted
    assert len(set(counts.values())) > 1


def test_gradual_pruning_of_a_transformers_model_by_its_own_text() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids = [torch.randint(64, (2, 16)) for _ in range(2)]
    pruner = Pruner(model, WandaSpec(pattern="2:4"), Cubic(0.0, 0.5, 0, 4, 2), data=ids)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(5):
        model(ids[0], labels=ids[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(optimizer)
    keep = torchprune.masks(model)
    assert len(keep) == 14
    for mask in keep.values():
        assert bool((mask.reshape(-1, 4).sum(1) == 2).all())


# -- going on --------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "gradual": lambda: {"spec": MagnitudeSpec(0.5), "schedule": Cubic(0.0, 0.5, 2, 14, 3)},
    "rigl": lambda: {
        "spec": MagnitudeSpec(pattern="2:4"),
        "schedule": Constant(0.5, end=15, every=3),
        "regrow": RigL(),
    },
    "set": lambda: {
        "spec": MagnitudeSpec(0.5),
        "schedule": Constant(0.5, end=15, every=2),
        "regrow": SET(),
    },
    "back": lambda: {
        "spec": MagnitudeSpec(0.5),
        "schedule": Linear(0.0, 0.5, 0, 12, 3),
        "regrow": MagnitudeRegrowth(),
    },
    "straight": lambda: {
        "spec": MagnitudeSpec(pattern="2:4"),
        "schedule": Constant(0.5),
        "regrow": StraightThrough(),
    },
    "wanda": lambda: {
        "spec": WandaSpec(0.5),
        "schedule": Cubic(0.0, 0.5, 2, 14, 3),
        "data": batches(),
    },
    "uneven": lambda: {
        "spec": WandaSpec(0.5, scope="layer", allocation="error"),
        "schedule": Linear(0.0, 0.5, 2, 14, 3),
        "data": batches(),
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kill", [1, 7, 8, 9, 16])
def test_save_kill_resume_is_an_uninterrupted_run(kind: str, kill: int) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.2)
        return model, optimizer, Pruner(model, **KINDS[kind]())

    def go_on(parts: Any, first: int, last: int) -> None:
        model, optimizer, pruner = parts
        for step in range(first, last):
            learn(model, optimizer, step)
            pruner.step(optimizer)

    whole = start()
    go_on(whole, 0, 18)
    part = start()
    go_on(part, 0, kill)
    saved = [copy.deepcopy(one.state_dict()) for one in part]
    saved[2] = json.loads(json.dumps(saved[2]))  # a JSON file holds it
    again = start()
    for one, state in zip(again, saved, strict=True):
        one.load_state_dict(state)
    assert again[2].steps == kill
    go_on(again, kill, 18)
    for key, value in whole[0].state_dict().items():
        other = again[0].state_dict()[key]
        assert torch.equal(value, other), key
    assert repr(whole[1].state_dict()) == repr(again[1].state_dict())
    assert whole[2].state_dict() == again[2].state_dict()


def test_foreign_states_are_refused() -> None:
    pruner = Pruner(net(), MagnitudeSpec(0.5), OneShot(0.5, at=3))
    for state in ({}, {"step": "3", "sparsity": 0.1, "levels": {}}, {"step": 3}):
        with pytest.raises(SpecError, match=r"expected what Pruner.state_dict"):
            pruner.load_state_dict(state)
    with pytest.raises(SpecError, match="saved levels are of other layers"):
        pruner.load_state_dict({"step": 1, "sparsity": 0.1, "levels": {"9.weight": 0.5}})
    assert pruner.steps == 0


# -- what it leaves alone --------------------------------------------------------------------------


def test_parameters_stay_the_same_objects_and_keys_come_at_once() -> None:
    model = net()
    before = {id(p) for p in model.parameters()}
    pruner = Pruner(model, MagnitudeSpec(0.5), Linear(0.0, 0.5, start=2, end=8))
    keys = list(model.state_dict())
    buffers = {name: b.data_ptr() for name, b in model.named_buffers()}
    for _ in range(9):
        pruner.step()
    assert {id(p) for p in model.parameters()} == before
    assert list(model.state_dict()) == keys
    assert {name: b.data_ptr() for name, b in model.named_buffers()} == buffers


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: (MagnitudeSpec(0.5), OneShot(0.6)), SpecError, "ends at 0.6 .* sparsity is 0.5"),
    (lambda: (MagnitudeSpec(0.5), 0.5), SpecError, "schedule must be a callable"),
    (lambda: (MagnitudeSpec, OneShot(0.5)), SpecError, "the class MagnitudeSpec"),
    (
        lambda: (torchprune.NeuronSpec(0.5), OneShot(0.5)),
        SpecError,
        "NeuronSpec; to prune whole units",
    ),
    (
        lambda: (SparseGPTSpec(pattern="2:4"), Linear(0.0, 0.5, 0, 9)),
        SpecError,
        "decides on whole groups of 2:4",
    ),
    (
        lambda: (WandaSpec(pattern="2:4", refine=Swaps()), Linear(0.0, 0.5, 0, 9)),
        SpecError,
        "decides on whole groups",
    ),
    (lambda: (MagnitudeSpec(0.5, targets="nine"), OneShot(0.5)), TargetError, "nine"),
    (lambda: (WandaSpec(0.5), OneShot(0.5)), CalibrationError, "needs calibration data"),
    (lambda: (WandaSpec(0.5), OneShot(0.5), RigL()), SpecError, "RigL .* needs data"),
    (lambda: (MagnitudeSpec(0.5), OneShot(0.5), "rigl"), SpecError, "regrow must be"),
    (lambda: (MagnitudeSpec(0.5), Constant(0.5), RigL()), SpecError, "give it one"),
    (lambda: (MagnitudeSpec(0.5), lambda s: 0.5, SET()), SpecError, "give it one of torchprune"),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_refused_calls_leave_the_model_as_it_was(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    spec, schedule, *regrow = make()
    with pytest.raises(error, match=message):
        Pruner(model, spec, schedule, regrow=regrow[0] if regrow else None)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert not torchprune.report(model).layers
    assert not runs_of(model)


def test_an_error_of_a_later_change_leaves_all_as_it_was() -> None:
    model = net()
    data: list[Any] = batches()
    pruner = Pruner(model, WandaSpec(0.5), Linear(0.0, 0.5, start=1, end=5), data=data)
    pruner.step()
    pruner.step()
    before = copy.deepcopy(model.state_dict())
    data[1] = torch.full((16, 8), torch.nan)
    with pytest.raises(CalibrationError):
        pruner.step()
    assert pruner.steps == 2
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    data[1] = data[0]
    assert pruner.step()
    assert pruner.steps == 3


def test_masks_from_before_that_do_not_fit_are_refused() -> None:
    model = torchprune.sparsify(net(), MagnitudeSpec(0.25), reversible=False)
    with pytest.raises(SpecError, match=r"0: it carries a mask of another kind already: .*densify"):
        Pruner(model, MagnitudeSpec(0.5), Constant(0.5), regrow=StraightThrough())
    with pytest.raises(SpecError, match="the values under its mask are gone"):
        Pruner(model, MagnitudeSpec(0.5), Constant(0.5), regrow=MagnitudeRegrowth())
    with pytest.raises(SpecError, match=r"already 0.25 sparse and 0.1 was asked"):
        Pruner(model, MagnitudeSpec(0.1), Constant(0.1))
    assert share(model) == 0.25


def test_a_folded_model_has_no_masks_to_change() -> None:
    model = net()
    pruner = Pruner(model, MagnitudeSpec(0.5), Linear(0.0, 0.5, start=0, end=5))
    pruner.step()
    torchprune.fold(model)
    with pytest.raises(MaskError, match="its mask is gone; make a new Pruner"):
        pruner.step()


def test_copies_hear_nothing() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, MagnitudeSpec(0.5), Constant(0.5, end=9, every=1), regrow=RigL())
    twin = copy.deepcopy(model)
    twin(torch.randn(3, 8)).sum().backward()
    learn(model, optimizer, 0)
    before = torchprune.masks(twin)
    assert pruner.step(optimizer)
    assert all(torch.equal(before[k], m) for k, m in torchprune.masks(twin).items())


def test_warnings_come_once() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6), nn.Linear(6, 4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner = Pruner(model, MagnitudeSpec(pattern="2:4"), Linear(0.0, 0.5, start=0, end=5))
        for _ in range(6):
            pruner.step()
    told = [str(w.message) for w in caught]
    assert len(told) == len(set(told))


def test_repr_tells_where_it_is() -> None:
    pruner = Pruner(net(), MagnitudeSpec(0.5), OneShot(0.5))
    assert repr(pruner) == "Pruner(magnitude, OneShot(sparsity=0.5, at=0), step 0, sparsity 0.5)"
