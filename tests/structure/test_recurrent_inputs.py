"""What a recurrent net reads may go: the layers before it, and its weights of inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchprune
from torchprune import NeuronSpec
from torchprune.graph.groups import structure_of


class Sequences(nn.Module):
    """A layer before a recurrent net, and one after it."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.inside, self.core = nn.Linear(6, 16), kind(16, 5, **options)
        width = options.get("proj_size") or 5
        self.out = nn.Linear(2 * width if options.get("bidirectional") else width, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.core(self.inside(x).relu())[0])
        return made


class Cells(nn.Module):
    """Steps one after the other."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.inside, self.core = nn.Linear(6, 16), cell(16, 5)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in self.inside(x).relu().unbind(1):
            state = self.core(step, state)
        out: Tensor = state[0] if isinstance(state, tuple) else state
        return out


NETS: dict[str, Any] = {
    "LSTM": lambda: Sequences(nn.LSTM, batch_first=True),
    "two layers, both directions": lambda: Sequences(nn.LSTM, num_layers=2, bidirectional=True),
    "projected, without biases": lambda: Sequences(nn.LSTM, proj_size=4, bias=False),
    "GRU": lambda: Sequences(nn.GRU, bidirectional=True, batch_first=True),
    "tanh": lambda: Sequences(nn.RNN, num_layers=2),
    "relu": lambda: Sequences(nn.RNN, nonlinearity="relu"),
    "LSTM cells": lambda: Cells(nn.LSTMCell),
    "GRU cells": lambda: Cells(nn.GRUCell),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("refit", [False, True], ids=["as it is", "refitted"])
def test_the_layer_before_it_gets_narrower(name: str, refit: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, data = NETS[name]().eval(), [torch.randn(4, 7, 6) for _ in range(3)]
    spec = NeuronSpec(0.5, refit=refit, round_to=1)
    torchprune.sparsify(net, spec, data, progress=False)
    with torch.no_grad():
        want = net(data[0])
        torchprune.shrink(net, torchprune.plan_shrink(net, data[0]))
        assert torch.allclose(net(data[0]), want, atol=1e-6)
    assert net.inside.out_features == net.core.input_size == 8
    torchprune.save(net, tmp_path / "net")
    again = torchprune.load_into(NETS[name]().eval(), tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(again(data[0]), net(data[0]))
    net(data[0]).sum().backward()
    assert net.core.state_dict().keys() == NETS[name]().core.state_dict().keys()


def test_what_is_inside_stays() -> None:
    structure = structure_of(Sequences(nn.LSTM).eval(), torch.randn(4, 7, 6))
    assert [(g.kind, g.count) for g in structure.groups] == [("neurons", 16)]
    frozen = {(f.key, f.axis) for f in structure.frozen}
    assert {("core.weight_ih_l0", 0), ("core.weight_hh_l0", 1), ("out.weight", 1)} <= frozen
