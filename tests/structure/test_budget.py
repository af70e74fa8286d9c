"""One budget over kinds of units: met after `shrink`, exactly, by about the best choice."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cnns import MobileNet, awake, image_batches
from families import FAMILIES
from structures import close, outputs
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import BudgetSpec, ChannelSpec, HeadSpec, LayerSpec, NeuronSpec, plan_shrink, shrink
from torchprune.allocation import unit_costs
from torchprune.allocation.unit_budget import UnitBudget
from torchprune.calibration.batches import Batch
from torchprune.errors import CalibrationError, SpecError, TargetError
from torchprune.graph.groups import Group
from torchprune.reports.report import RunRecord
from torchprune.structure import prune_units
from torchprune.structure.offers import Decision, Offers, Way, offers_of, way_of
from torchprune.structure.unit_choices import Choice

ALL = (NeuronSpec(round_to=4), HeadSpec, LayerSpec)


class Block(nn.Module):
    """Adds to what it is given."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), nn.ReLU()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Residual(nn.Sequential):
    """A plain net of such blocks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(5, 8), *(Block(8, 12) for _ in range(3)), nn.Linear(8, 4))


def rows(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, 5, generator=generator) for _ in range(count)]


def family(name: str) -> Callable[[], tuple[nn.Module, list[Any]]]:
    return lambda: (FAMILIES[name].make(), FAMILIES[name].data(count=5))


def mobile() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    return awake(MobileNet()), image_batches()


NETS = {
    "llama": (family("llama"), ALL),
    "gpt2": (family("gpt2"), (HeadSpec, NeuronSpec)),
    "bert": (family("bert"), ALL),
    "resnet": (family("resnet"), (ChannelSpec(round_to=2),)),
    "mobilenet": (mobile, (ChannelSpec(round_to=1), NeuronSpec)),
    "mlp": (family("mlp"), (NeuronSpec(refit=False),)),
}


CASES = [
    ("llama", "parameters", 0.85),
    ("llama", "parameters", 0.55),
    ("llama", "flops", 0.7),
    ("gpt2", "flops", 0.8),
    ("gpt2", "parameters", 0.75),
    ("bert", "parameters", 0.9),
    ("resnet", "parameters", 0.5),
    ("resnet", "flops", 0.6),
    ("mobilenet", "parameters", 0.7),
    ("mobilenet", "flops", 0.4),
    ("mlp", "parameters", 0.6),
    ("mlp", "flops", 0.3),
]
IN_SHORT = ("llama-parameters-0.55", "gpt2-flops-0.8", "mobilenet-parameters-0.7", "mlp-flops-0.3")


class Case:
    """A net, what it may hold, and what may go."""

    def __init__(self, name: str, amount: str, share: float) -> None:
        self.name, self.amount, self.share = name, amount, share
        self.make, over = NETS[name]
        self.spec = BudgetSpec(**{amount: share}, over=over)

    def __str__(self) -> str:
        return f"{self.name}-{self.amount}-{self.share}"


@pytest.mark.parametrize("case", sample([Case(*c) for c in CASES], *IN_SHORT), ids=str)
def test_a_budget_is_met_exactly_by_what_shrinks(case: Case) -> None:
    model, data = case.make()
    dense = copy.deepcopy(model)
    torchprune.sparsify(model, case.spec, data, progress=False)
    masked, plan = outputs(model, data[0]), plan_shrink(model, data[0])
    before, after = plan.parameters if case.amount == "parameters" else plan.flops
    assert after <= case.share * before
    shrink(model, plan)
    assert close(outputs(model, data[0]), masked, 2e-4)
    assert sum(p.numel() for p in model.parameters()) == plan.parameters[1]
    # by the books, of the dense model: this is what stays, and no step more could
    offers = offers_of(dense, case.spec, [_batch(data[0])], RunRecord(spec=case.spec))
    ways = [in_order(choice, offers) for choice in offers.choices]
    account = offers.account(offers.ledger(case.amount), ways)
    gone = {places_of(r.group): r.before - r.after for r in plan.removals}
    steps = [
        way.steps.tolist().index(gone.get(places_of(c.group), 0))
        for way, c in zip(ways, offers.choices, strict=True)
    ]
    offers.start(account, plan.blocks)
    for at, step in enumerate(steps):
        account.go(at, step)
    assert account.total == after
    assert {r.group.kind for r in plan.removals} <= {s.kind for s in case.spec.units}
    for at in offers.beyond(plan.blocks):
        if steps[at]:
            along = account.along(at)
            assert account.total + float(along[steps[at] - 1] - along[steps[at]]) > (
                case.share * before
            )


def places_of(group: Group) -> frozenset[tuple[str, int]]:
    """What tells a group from others of the same name."""
    return frozenset((member.key, member.axis) for member in group.members)


def in_order(choice: Choice, offers: Offers) -> Way:
    """Units of a group are alike here, so that any order tells the same."""
    score = torch.arange(choice.group.count).float()
    order, steps = way_of(score, choice.spec, offers.already(choice.group))
    return Way(order, steps, torch.zeros(len(steps)).double())


def _batch(data: Any) -> Batch:
    return Batch((), data) if isinstance(data, dict) else Batch((data,), {})


def found(model: nn.Module, spec: BudgetSpec, data: list[Tensor]) -> tuple[UnitBudget, Decision]:
    batches = [_batch(d) for d in data]
    offers = offers_of(model, spec, batches, RunRecord(spec=spec))
    ways = [
        w for w in unit_costs.unit_costs(offers, batches, None, progress=False) if w is not None
    ]
    ledger = offers.ledger(spec.amount)
    budget = UnitBudget(spec, offers, ways, ledger, batches, None, False)
    return budget, budget.decided()[0]


@pytest.mark.parametrize("share", [0.85, 0.6])
def test_the_choice_costs_about_what_the_best_of_all_does(share: float) -> None:
    """Every choice of blocks and steps that meets the budget, refitted and measured."""
    model, data = Residual().eval(), rows()
    spec = BudgetSpec(parameters=share, over=(NeuronSpec(round_to=4), LayerSpec))
    budget, decision = found(model, spec, data)
    offers, costs = budget.offers, []
    account = offers.account(offers.ledger("parameters"), budget.ways)
    names = list(offers.blocks)
    for blocks in itertools.chain(*(itertools.combinations(names, n) for n in range(3))):
        inside = set(offers.beyond(blocks))
        ranges = [range(len(w.steps) if at in inside else 1) for at, w in enumerate(budget.ways)]
        for steps in itertools.product(*ranges):
            offers.start(account, blocks)
            for at, step in enumerate(steps):
                account.go(at, step)
            if account.total <= budget.limit:
                costs.append(budget._cost(Decision(steps, blocks)))
    assert len(costs) > 5
    assert budget._cost(decision) <= 1.5 * min(costs)
    assert sorted(costs).index(budget._cost(decision)) < len(costs) / 5


def test_the_same_data_give_the_same_masks_and_the_report_tells_what_went() -> None:
    data, runs = rows(), []
    spec = BudgetSpec(parameters=0.5, over=(NeuronSpec(round_to=4), LayerSpec))
    for _ in range(2):
        model = Residual().eval()
        torchprune.sparsify(model, spec, data, progress=False)
        runs.append((torchprune.masks(model), torchprune.report(model).notes))
    (one, notes), (other, again) = runs
    assert all(torch.equal(mask, other[key]) for key, mask in one.items())
    assert notes == again
    text = "\n".join(notes)
    assert "parameters stay of" in text
    assert "of 3 blocks; " in text
    assert "predicted to cost" in text
    assert "in the end, refitted on all data" in text
    assert (
        "over=(torchprune.NeuronSpec(round_to=4), torchprune.LayerSpec())"
        in (torchprune.report(model).calls[0])
    )


def test_blocks_alone_meet_a_budget_by_as_few_as_possible() -> None:
    model, data = Residual().eval(), rows(2)
    whole = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model[1].parameters())
    share = (whole - 1.5 * block) / whole
    torchprune.sparsify(model, BudgetSpec(parameters=share, over=LayerSpec), data, progress=False)
    assert len(plan_shrink(model, data[0]).blocks) == 2


def state_of(model: nn.Module) -> tuple[list[str], list[Tensor], list[Any]]:
    state = model.state_dict()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    own = [(p.requires_grad, p.grad) for p in model.parameters()]
    held = [sorted(vars(m)) for m in model.modules()]
    return list(state), [value.clone() for value in state.values()], [hooks, own, held]


@pytest.mark.parametrize(("where", "late"), [("costs", 0), ("trial", 0), ("trial", 5)])
def test_a_call_that_fails_leaves_all_kinds_as_they_were(
    where: str, late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = Residual().eval(), rows()
    names, values, rest = state_of(model)
    place, name = (unit_costs, "curve_of") if where == "costs" else (prune_units, "refit")
    calls, true = [], getattr(place, name)

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) > late:
            raise CalibrationError("as asked")
        return true(*args, **options)

    monkeypatch.setattr(place, name, failing)
    spec = BudgetSpec(parameters=0.6, over=(NeuronSpec(round_to=4), LayerSpec))
    with pytest.raises(CalibrationError, match="as asked"):
        torchprune.sparsify(model, spec, data, progress=False)
    after, now, others = state_of(model)
    assert after == names
    assert all(torch.equal(a, b) for a, b in zip(values, now, strict=True))
    assert others == rest
    assert torchprune.masks(model) == {}


def test_a_budget_that_cannot_be_met_says_how_far_one_can_go() -> None:
    model, data = Residual().eval(), rows(2)
    whole = sum(p.numel() for p in model.parameters())
    spec = BudgetSpec(parameters=0.1, over=(NeuronSpec(round_to=4), LayerSpec))
    with pytest.raises(SpecError, match="cannot be met in this Residual") as error:
        torchprune.sparsify(model, spec, data, progress=False)
    assert torchprune.masks(model) == {}
    least = float(str(error.value).split("LayerSpec, ")[1].split()[0])
    for share, met in ((least + 1e-3, True), (least - 1e-3, False)):
        budget = BudgetSpec(parameters=share, over=spec.over)
        if met:
            torchprune.sparsify(model, budget, data, progress=False)
            assert plan_shrink(model, data[0]).parameters[1] <= share * whole
        else:
            with pytest.raises(SpecError, match="cannot be met"):
                torchprune.sparsify(Residual().eval(), budget, data, progress=False)


def test_kinds_that_a_model_has_not_are_left_out() -> None:
    model, data = Residual().eval(), rows(2)
    torchprune.sparsify(model, BudgetSpec(parameters=0.9, over=ALL), data, progress=False)
    assert plan_shrink(model, data[0])
    with pytest.raises(TargetError, match="nothing of this Residual may go for HeadSpec"):
        torchprune.sparsify(Residual(), BudgetSpec(flops=0.9, over=HeadSpec), data, progress=False)
    spec = BudgetSpec(flops=0.9, over=NeuronSpec(ignore="x"))
    with pytest.raises(TargetError, match="matches none"):
        torchprune.sparsify(Residual(), spec, data, progress=False)


def test_what_is_masked_already_counts() -> None:
    model, data = Residual().eval(), rows(2)
    torchprune.sparsify(model, NeuronSpec(0.5, round_to=2), data, progress=False)
    done = plan_shrink(model, data[0]).parameters
    spec = BudgetSpec(parameters=done[1] / done[0], over=NeuronSpec(round_to=2))
    torchprune.sparsify(model, spec, data, progress=False)
    assert plan_shrink(model, data[0]).parameters == done
    spec = BudgetSpec(parameters=0.9 * done[1] / done[0], over=NeuronSpec(round_to=2))
    torchprune.sparsify(model, spec, data, progress=False)
    assert plan_shrink(model, data[0]).parameters[1] <= 0.9 * done[1]


def test_files_and_densify(tmp_path: Any) -> None:
    model, data = FAMILIES["llama"].make(), FAMILIES["llama"].data()
    dense = copy.deepcopy(model.state_dict())
    over = (NeuronSpec(round_to=4, targets="*mlp*"), HeadSpec(score="l2"), LayerSpec(ignore="*.0"))
    spec = BudgetSpec(parameters=0.7, over=over)
    torchprune.sparsify(model, spec, data, progress=False, keep_dense=True)
    torchprune.save(model, tmp_path / "saved")
    loaded = torchprune.load(tmp_path / "saved")
    assert str(torchprune.report(loaded)) == str(torchprune.report(model))
    assert torchprune.report(loaded).calls == torchprune.report(model).calls
    torchprune.densify(model)
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of parameters, flops, latency_ms, got none"),
        ({"parameters": 0.5, "flops": 0.5}, "got parameters and flops"),
        ({"parameters": 1}, "the share that may stay, below 1"),
        ({"flops": 0.0}, "above 0, got 0.0"),
        ({"latency_ms": True}, "latency_ms must be a number"),
        ({"latency_ms": 1, "runtime": "tensorrt"}, "runtime must be"),
        ({"parameters": 0.5, "over": ()}, "over is empty"),
        ({"parameters": 0.5, "over": (torchprune.WandaSpec,)}, "over holds NeuronSpec"),
        ({"parameters": 0.5, "over": (HeadSpec, HeadSpec(round_to=2))}, "heads twice"),
        ({"parametres": 0.5}, "did you mean 'parameters'"),
        (
            {
                "parameters": 0.5,
                "over": (
                    NeuronSpec(reconstruct=True),
                    HeadSpec(reconstruct=torchprune.Reconstruct(epochs=1)),
                ),
            },
            "must be the same",
        ),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(options: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        BudgetSpec(**options)


def test_over_holds_instances_afterwards() -> None:
    spec = BudgetSpec(flops=0.5, over=[NeuronSpec, HeadSpec(round_to=2)])
    assert spec.over == (NeuronSpec(), HeadSpec(round_to=2))
    assert spec == BudgetSpec(flops=0.5, over=(NeuronSpec(), HeadSpec(round_to=2)))
