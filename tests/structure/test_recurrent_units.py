"""Recurrent nets get narrower: what they read may go, and the cells themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune import NeuronSpec
from torchprune.graph.groups import structure_of


class Sequences(nn.Module):
    """A layer before a recurrent net, and one after it."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.inside, self.core = nn.Linear(6, 16), kind(16, 10, **options)
        width = options.get("proj_size") or 10
        self.out = nn.Linear(2 * width if options.get("bidirectional") else width, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.core(self.inside(x).relu())[0])
        return made


class Last(Sequences):
    """Read at the last step, by the state that it leaves."""

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.core(self.inside(x).relu())
        hidden = state[0] if isinstance(state, tuple) else state
        made: Tensor = self.out(hidden[-self.core.num_layers :].sum(0))
        return made


class Started(Sequences):
    """With initial states of its own making, which `hidden_size` sizes, or that are learned."""

    def __init__(self, *, learned: bool = False, **options: Any) -> None:
        super().__init__(nn.LSTM, **options)
        self.start = nn.Parameter(torch.randn(1, 1, 10)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        start = x.new_zeros(1, x.shape[1], self.core.hidden_size)
        h = start if self.start is None else self.start.expand(1, x.shape[1], -1).contiguous()
        made: Tensor = self.out(self.core(self.inside(x).relu(), (h, start))[0])
        return made


class Cells(nn.Module):
    """Steps one after the other."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.inside, self.core = nn.Linear(6, 16), cell(16, 10)  # type: ignore[call-arg]
        self.out = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in self.inside(x).relu().unbind(1):
            state = self.core(step, state)
        made: Tensor = self.out(state[0] if isinstance(state, tuple) else state)
        return made


NETS: dict[str, Any] = {
    "LSTM": lambda: Sequences(nn.LSTM, batch_first=True),
    "two layers, both directions": lambda: Sequences(nn.LSTM, num_layers=2, bidirectional=True),
    "projected, without biases": lambda: Sequences(nn.LSTM, proj_size=6, bias=False),
    "projected, both directions": lambda: Sequences(nn.LSTM, proj_size=6, bidirectional=True),
    "GRU": lambda: Sequences(nn.GRU, bidirectional=True, batch_first=True),
    "tanh": lambda: Sequences(nn.RNN, num_layers=2),
    "relu": lambda: Sequences(nn.RNN, nonlinearity="relu"),
    "its last state": lambda: Last(nn.LSTM, num_layers=2),
    "its last state, GRU": lambda: Last(nn.GRU),
    "states given": lambda: Started(),
    "states learned": lambda: Started(learned=True),
    "LSTM cells": lambda: Cells(nn.LSTMCell),
    "GRU cells": lambda: Cells(nn.GRUCell),
    "tanh cells": lambda: Cells(nn.RNNCell),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("refit", [False, True], ids=["as it is", "refitted"])
def test_it_and_the_layer_before_it_get_narrower(name: str, refit: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, data = NETS[name]().eval(), [torch.randn(4, 7, 6) for _ in range(3)]
    spec = NeuronSpec(0.5, refit=refit, round_to=1)
    torchprune.sparsify(net, spec, data, progress=False)
    with torch.no_grad():
        want = net(data[0])
        torchprune.shrink(net, torchprune.plan_shrink(net, data[0]))
        assert torch.allclose(net(data[0]), want, atol=1e-6)
    assert net.inside.out_features == net.core.input_size == 8
    assert net.core.hidden_size == 5
    assert getattr(net.core, "proj_size", 0) == (3 if "projected" in name else 0)
    longer = torch.randn(2, 9, 6)
    torchprune.save(net, tmp_path / "net")
    again = torchprune.load_into(NETS[name]().eval(), tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(again(longer), net(longer))
    net(data[0]).sum().backward()
    assert net.core.state_dict().keys() == NETS[name]().core.state_dict().keys()
    assert f"{net.core}" == f"{again.core}"


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@given(
    kind=st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    layers=st.integers(1, 3),
    both=st.booleans(),
    bias=st.booleans(),
    gone=st.sets(st.integers(0, 9), min_size=1, max_size=9),
    seed=st.integers(0, 99),
)
def test_cells_that_are_zero_go_and_no_others(
    kind: type[nn.RNNBase], layers: int, both: bool, bias: bool, gone: set[int], seed: int
) -> None:
    torch.manual_seed(seed)
    options = {"num_layers": layers, "bidirectional": both, "bias": bias}
    net = Sequences(kind, **options).eval()
    keep = torch.ones(10)
    keep[list(gone)] = 0
    with torch.no_grad():  # nobody listens to them
        for name, weight in net.core.named_parameters():
            if name.startswith("weight_hh") or (
                name.startswith("weight_ih_l") and "l0" not in name
            ):
                weight *= keep.repeat(weight.shape[1] // 10)
        net.out.weight *= keep.repeat(net.out.in_features // 10)
        x = torch.randn(5, 2, 6)
        want = net(x)
        torchprune.shrink(net, torchprune.plan_shrink(net, x))
        assert net.core.hidden_size == 10 - len(gone)
        assert torch.allclose(net(x), want, atol=1e-6)


def test_states_that_the_caller_sees_keep_their_width() -> None:
    net = nn.LSTM(6, 10).eval()
    x = torch.randn(4, 7, 6)
    assert structure_of(net, x).groups == []
    given = torch.zeros(1, 7, 10)

    class Resumed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.out = nn.GRU(6, 10), nn.Linear(10, 3)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            made: Tensor = self.out(self.core(x, h)[0])
            return made

    structure = structure_of(Resumed().eval(), (x, given))
    assert structure.groups == []
    assert ("core.weight_hh_l0", 1) in {(f.key, f.axis) for f in structure.frozen}


def test_weights_of_another_make_are_left() -> None:
    net = Sequences(nn.GRU)
    nn.utils.parametrizations.weight_norm(net.core, "weight_hh_l0")
    structure = structure_of(net.eval(), torch.randn(4, 7, 6))
    assert [(g.kind, g.count) for g in structure.groups] in ([("neurons", 16)], [])
