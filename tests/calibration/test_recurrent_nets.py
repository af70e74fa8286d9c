"""Recurrent nets are pruned by what their weights multiply, layer by layer, as a loop would."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import QUIET
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


class Net(nn.Module):
    """A recurrent net on sequences of these lengths, and a layer behind it."""

    def __init__(self, net: nn.RNNBase, lengths: list[int] | None = None) -> None:
        super().__init__()
        self.net, self.lengths = net, lengths
        width = (net.proj_size or net.hidden_size) * (2 if net.bidirectional else 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.lengths is None:
            return self.head(self.net(x)[0])
        packed = pack_padded_sequence(x, self.lengths, self.net.batch_first, enforce_sorted=False)
        return self.head(self.net(packed)[0].data)


def wanda(weight: Tensor, x: Tensor) -> Tensor:
    """The mask of half of each row, by hand."""
    score = weight.abs() * x.double().square().sum(0).sqrt().float()
    order = score.argsort(dim=1, stable=True)[:, weight.shape[1] // 2 :]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)


Sequences = list[Tensor]
"""Each (steps, batch, features)."""


def ran(net: nn.LSTM, layer: int, xs: Sequences) -> tuple[Tensor, Sequences]:
    """The hidden states before each step of a layer, one row each, and those after it."""
    w_ih, w_hh, b_ih, b_hh = (
        getattr(net, f"{name}_l{layer}").detach()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    before, after = [], []
    for x in xs:
        h = c = torch.zeros(x.shape[1], net.hidden_size)
        states = []
        for step in x:
            before.append(h)
            i, f, g, o = (step @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        after.append(torch.stack(states))
    return torch.cat(before), after


def by_hand(net: nn.LSTM, xs: Sequences, *, dense: bool) -> dict[str, Tensor]:
    """Masks of a one-way LSTM, one weight after the other, or all by the dense net."""
    masks: dict[str, Tensor] = {}
    for layer in range(net.num_layers):
        inputs = torch.cat([x.flatten(0, 1) for x in xs])
        for kind in ("ih", "hh"):
            name = f"weight_{kind}_l{layer}"
            weight = getattr(net, name)
            rows = inputs if kind == "ih" else ran(net, layer, xs)[0]
            masks[name] = wanda(weight.detach(), rows)
            if not dense:
                weight.data = weight.data * masks[name]
        xs = ran(net, layer, xs)[1]
    return masks


@pytest.mark.parametrize("sequential", ["layer", "none"])
def test_masks_of_an_lstm_are_those_of_a_loop(sequential: str) -> None:
    net = nn.LSTM(8, 8, num_layers=3)
    data = list(torch.randn(3, 5, 4, 8))
    expected = by_hand(copy.deepcopy(net), data, dense=sequential == "none")
    torchprune.sparsify(net, WandaSpec(sequential=sequential), data, **QUIET)
    found = torchprune.masks(net)
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name


NETS: dict[str, Any] = {
    "lstm": lambda: Net(nn.LSTM(8, 8, 2, batch_first=True)),
    "projected": lambda: Net(nn.LSTM(8, 8, 2, proj_size=4, bidirectional=True)),
    "gru": lambda: Net(nn.GRU(8, 8, 2, bias=False, bidirectional=True)),
    "rnn": lambda: Net(nn.RNN(8, 8, nonlinearity="relu")),
    "packed": lambda: Net(nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True), [5, 2, 4]),
    "packed gru": lambda: Net(nn.GRU(8, 8, batch_first=True), [1, 5, 5]),
}
SPECS = [
    WandaSpec(),
    WandaSpec(sequential="none"),
    WandaSpec(pattern="2:4"),
    SparseGPTSpec(),
    SparseGPTSpec(sequential="layer", scope="row"),
    MagnitudeSpec(),
]


@pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec.label} {spec.goal.pattern} {spec.sequential}"
)
@pytest.mark.parametrize("name", NETS)
def test_every_weight_of_every_net_is_pruned_by_every_method(name: str, spec: Any) -> None:
    model, data = NETS[name]().eval(), list(torch.randn(3, 3, 5, 8))
    dense = copy.deepcopy(model)
    given = [] if isinstance(spec, MagnitudeSpec) else [data]
    torchprune.sparsify(model, spec, *given, **QUIET)
    masks = torchprune.masks(model)
    assert set(masks) == {n for n, p in dense.named_parameters() if p.dim() == 2}
    for layer in torchprune.report(model).layers:
        key = layer.name if layer.name in masks else f"{layer.name}.weight"
        assert layer.zeros == int((~masks[key]).sum())
    with torch.no_grad():
        before = model(data[0])
        assert not torch.equal(before, dense(data[0]))
        torchprune.fold(model)
        assert torch.equal(model(data[0]), before)
    for key, mask in masks.items():
        assert torch.equal(model.get_parameter(key) != 0, mask)
        assert 0.4 < float((~mask).float().mean()) <= 0.5, key


@settings(max_examples=15)
@given(st.integers(0, 99))
def test_padding_behind_packed_sequences_does_not_count(seed: int) -> None:
    torch.manual_seed(seed)
    lengths = torch.randint(1, 6, (3,)).tolist()
    lengths[0] = 5
    model, x = Net(nn.LSTM(8, 8, batch_first=True), lengths), torch.randn(3, 5, 8)
    other, y = copy.deepcopy(model), x.clone()
    for row, length in zip(y, lengths, strict=True):
        row[length:] = 1000.0
    torchprune.sparsify(model, WandaSpec(), [x], **QUIET)
    torchprune.sparsify(other, WandaSpec(), [y], **QUIET)
    for one, two in zip(*(torchprune.masks(m).values() for m in (model, other)), strict=True):
        assert torch.equal(one, two)


def test_solvers_lose_less_than_magnitude_in_every_weight() -> None:
    def size(weight: Tensor, moments: Any) -> Tensor:
        return weight.abs()

    model, data = NETS["lstm"](), [torch.randn(16, 12, 8) * torch.arange(8.0) for _ in range(4)]
    errors = {}
    for name, spec in (
        ("magnitude", torchprune.ScoreSpec(score=size, sequential="none")),
        ("wanda", WandaSpec(sequential="none")),
        ("sparsegpt", SparseGPTSpec(sequential="none", scope="row")),
    ):
        pruned = torchprune.sparsify(copy.deepcopy(model), spec, data, **QUIET)
        errors[name] = {y.name: y.error for y in torchprune.report(pruned).layers}
    for name, error in errors["magnitude"].items():
        assert errors["wanda"][name] < error * 1.05, name
        assert errors["sparsegpt"][name] < error * 1.05, name
    total = {name: sum(own.values()) for name, own in errors.items()}
    assert total["sparsegpt"] < total["wanda"] < total["magnitude"]


@pytest.mark.parametrize("spec", [MagnitudeSpec(), SparseGPTSpec(), WandaSpec(scope="layer")])
def test_rows_that_come_back_keep_their_shares_in_a_layers_count(spec: Any) -> None:
    """Ranked as a whole, the recurrent weights of a real speech encoder left its embeddings a
    cosine of 0.4 to what they were, and 0.8 to 0.9 so."""
    assert spec.scope == "layer"
    model, data = nn.Sequential(NETS["projected"](), nn.Linear(4, 4)), list(torch.randn(3, 5, 3, 8))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(torch.rand(len(weight)).view(-1, *[1] * (weight.dim() - 1)))
    given = [] if isinstance(spec, MagnitudeSpec) else [data]
    torchprune.sparsify(model, spec, *given, **QUIET)
    notes = {layer.name: layer.note for layer in torchprune.report(model).layers}
    for name, mask in torchprune.masks(model).items():
        even = bool((mask.sum(1) == mask.shape[1] // 2).all())
        assert even == ("hh" in name or "hr" in name), name
        assert ("each row keeps its share" in notes.get(name, "")) == even, name


class Cells(nn.Module):
    """A loop over cells: each weight is read once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.LSTMCell(8, 8), nn.GRUCell(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state, other = None, torch.zeros(len(x), 8)
        for step in x.unbind(1):
            state = self.first(step, state)
            other = self.second(state[0], other)
        return self.head(other)


def test_cells_in_a_loop_are_counted_at_every_step() -> None:
    model, data = Cells(), list(torch.randn(3, 2, 5, 8))
    dense = copy.deepcopy(model)
    torchprune.sparsify(model, WandaSpec(), data, **QUIET)
    states: dict[str, list[Tensor]] = {"first": [], "second": []}
    reads: dict[str, list[Tensor]] = {"first": [], "second": []}
    with torch.no_grad():
        for x in data:
            state = (torch.zeros(2, 8), torch.zeros(2, 8))
            other = torch.zeros(2, 8)
            for step in x.unbind(1):
                states["first"].append(state[0])
                reads["first"].append(step)
                state = dense.first(step, state)
                states["second"].append(other)
                reads["second"].append(state[0])
                other = dense.second(state[0], other)
    masks = torchprune.masks(model)
    for name in ("first", "second"):
        cell = dense.get_submodule(name)
        for weight, rows in (("weight_ih", reads), ("weight_hh", states)):
            expected = wanda(getattr(cell, weight).detach(), torch.cat(rows[name]))
            assert torch.equal(masks[f"{name}.{weight}"], expected), (name, weight)
    assert "head.weight" in masks


def test_a_refused_call_leaves_the_net_as_it_was() -> None:
    model = NETS["lstm"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(torchprune.TorchpruneError, match="weight_ih_l0"):
        torchprune.sparsify(model, WandaSpec(), [torch.full((2, 5, 8), torch.inf)], **QUIET)
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    model.net.flatten_parameters()
    model(torch.randn(2, 5, 8)).sum().backward()


def test_training_keeps_the_zeros_and_densify_brings_the_weights_back() -> None:
    model, data = NETS["gru"](), list(torch.randn(3, 5, 3, 8))
    dense = copy.deepcopy(model.state_dict())
    torchprune.sparsify(model, WandaSpec(), data, **QUIET)
    masks = {name: mask.clone() for name, mask in torchprune.masks(model).items()}
    back = torchprune.densify(copy.deepcopy(model))
    assert all(torch.equal(tensor, dense[name]) for name, tensor in back.state_dict().items())
    assert torch.equal(back(data[0]), back(data[0]))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for x in data:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    torchprune.fold(model)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        assert not torch.equal(weight, dense[name])
