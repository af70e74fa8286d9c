"""What units cost, against brute force: the least error at every number that stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune import BudgetSpec, NeuronSpec
from torchprune.allocation.closeness import Closeness
from torchprune.allocation.output_probes import row_energies
from torchprune.allocation.unit_costs import _masked, _refitted, unit_costs
from torchprune.calibration.batches import Batch
from torchprune.reports.report import RunRecord
from torchprune.structure.offers import Decision, offers_of, way_of
from torchprune.structure.prune_budget import tried

problems = {
    "tokens": st.integers(2, 30),
    "cols": st.integers(1, 7),
    "rows": st.integers(1, 4),
    "seed": st.integers(0, 999),
}


def drawn(tokens: int, cols: int, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w, energy = (
        torch.randn(*shape, generator=generator).double()
        for shape in ((tokens, cols), (rows, cols), (rows,))
    )
    return x, w, energy.square(), torch.randperm(cols, generator=generator)


@given(**problems)
def test_one_factor_gives_the_least_error_at_every_number(**sizes: Any) -> None:
    x, w, energy, leaving = drawn(**sizes)
    gram, damping = x.T @ x / len(x), 0.05
    lost = _refitted(w, gram, energy, leaving, damping)
    ridge = damping * float(gram.diagonal().mean())
    for gone in range(len(leaving) + 1):
        stay = leaving[gone:]
        full = gram + ridge * torch.eye(len(gram)).double()
        new = torch.zeros_like(w)
        if len(stay):  # the minimum of ||X (W - W')||^2 / n + ridge ||W - W'||^2
            new[:, stay] = torch.linalg.solve(full[stay][:, stay], full[stay] @ w.T).T
        each = (((w - new) @ full) * (w - new)).sum(1)
        assert float(lost[gone]) == pytest.approx(float((energy * each).sum()), rel=1e-6, abs=1e-9)


@given(**problems)
def test_without_a_fit_it_is_the_error_of_the_mask(**sizes: Any) -> None:
    x, w, energy, leaving = drawn(**sizes)
    lost = _masked(w, x.T @ x / len(x), energy, leaving)
    most = 0.0
    for gone in range(len(leaving) + 1):
        goes = leaving[:gone]
        each = (x[:, goes] @ w[:, goes].T).square().sum(0) / len(x)
        most = max(most, float((energy * each).sum()))  # more gone is never told as cheaper
        assert float(lost[gone]) == pytest.approx(most, rel=1e-6, abs=1e-9)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 12), st.integers(0, 99))
def test_steps_leave_multiples_and_begin_with_what_is_gone(
    count: int, width: int, gone: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    already = torch.zeros(count, dtype=torch.bool)
    already[torch.randperm(count, generator=generator)[: min(gone, count - 1)]] = True
    score = torch.rand(count, generator=generator)
    spec = NeuronSpec(round_to=width)
    order, steps = way_of(score, spec, already)
    assert sorted(order.tolist()) == list(range(count))
    assert already[order[: int(steps[0])]].all()
    assert int(steps[0]) == int(already.sum())
    rest = score[order[int(steps[0]) :]]
    assert bool((rest.diff() >= 0).all())
    kept = [count - int(step) for step in steps]
    assert all(n % min(width, count) == 0 for n in kept[1:])
    assert kept[-1] == min(kept[0], min(width, count)) or kept[-1] < 2 * width
    assert min(kept) >= 1


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)
        )


@pytest.mark.parametrize("refit", [False, True])
def test_the_last_layer_costs_what_is_measured(refit: bool) -> None:
    """There the model's outputs are the layer's, so that the prediction is no approximation."""
    model = Net()
    batches = [Batch((torch.randn(64, 6),), {}) for _ in range(8)]
    spec = BudgetSpec(
        parameters=0.5, over=NeuronSpec(round_to=3, refit=refit, targets="4", damping=1e-4)
    )
    offers = offers_of(model, spec, batches, RunRecord(spec=spec))
    (way,) = unit_costs(offers, batches, None, progress=False)
    assert way is not None
    closeness = Closeness(model, batches)
    before = [p.clone() for p in model.parameters()]
    for step in range(1, len(way.steps)):
        with tried(offers, [way], Decision((step,), ()), batches, None):
            found = closeness.lost()
        assert float(way.cost[step]) == pytest.approx(found, rel=0.3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert closeness.lost() == 0


def test_energies_rank_rows_by_what_they_do_to_the_outputs() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 1.0, 3.0], [0.0, 1.0, 3.0]]))
    batches = [Batch((torch.randn(50, 5),), {}) for _ in range(4)]
    spec = BudgetSpec(parameters=0.5, over=NeuronSpec(round_to=1))
    offers = offers_of(model, spec, batches, RunRecord(spec=spec))
    (reader,) = offers.choices[0].readers
    from dataclasses import replace

    from torchprune.masking.matrices import view_of
    from torchprune.masking.selection import Layer

    first = replace(
        reader,
        layer=Layer("0", "0.weight", model[0], "weight"),
        view=view_of(model[0], model[0].weight.shape),
    )
    (energy,) = row_energies(model, [first], batches, probes=40, seed=0, progress=False)
    assert energy is not None
    assert float(energy[0, 0]) == 0
    assert float(energy[0, 2] / energy[0, 1]) == pytest.approx(9, rel=1e-4)
    assert torchprune.masks(model) == {}
