"""Recurrent operators, watched: the rows of each weight are those of a loop over the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

from torchprune.calibration.recurrent import Rows, is_recurrent, watched, weights_in

Sequences = list[list[Tensor]]
KINDS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "tanh": nn.RNN, "relu": nn.RNN}


@dataclass(frozen=True)
class Case:
    """A recurrent net, and what it reads."""

    kind: str
    layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    projection: int
    lengths: tuple[int, ...]
    packed: bool
    initial: bool
    seed: int

    def net(self) -> nn.RNNBase:
        torch.manual_seed(self.seed)
        options: dict[str, Any] = {"proj_size": self.projection} if self.kind == "LSTM" else {}
        if self.kind in ("tanh", "relu"):
            options["nonlinearity"] = self.kind
        return KINDS[self.kind](
            3,
            5,
            self.layers,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            dropout=0.5 if self.layers > 1 else 0.0,
            dtype=torch.float64,
            **options,
        ).eval()

    def inputs(self) -> tuple[Tensor | PackedSequence, Any]:
        size = len(self.lengths)
        x = torch.randn(max(self.lengths), size, 3, dtype=torch.float64)
        given: Tensor | PackedSequence = x.transpose(0, 1) if self.batch_first else x
        if self.packed:
            lengths, first = torch.tensor(self.lengths), self.batch_first
            given = pack_padded_sequence(given, lengths, first, enforce_sorted=False)
        states = self.layers * (2 if self.bidirectional else 1)
        h = torch.randn(states, size, self.projection or 5, dtype=torch.float64)
        c = torch.randn(states, size, 5, dtype=torch.float64)
        hx = (h, c) if self.kind == "LSTM" else h
        return given, (hx if self.initial else None)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(sorted(KINDS)))
    return Case(
        kind,
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 3)) if kind == "LSTM" else 0,
        tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 1 << 20)),
    )


class Watch(TorchFunctionMode):
    """Prunes each weight of a recurrent call when it is told of it, and keeps the rows."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.shared: list[Rows] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not is_recurrent(function):
            return function(*args, **(kwargs or {}))
        self.weights = [id(w) for w in weights_in(function, args, kwargs or {})]
        return watched(function, args, kwargs or {}, self.reach)

    def reach(self, weight: Tensor, rows: Rows) -> Tensor | None:
        self.shared.append(rows)
        self.seen.append((weight, rows().clone()))
        new = pruned(weight)
        if not self.in_place:
            return new
        weight.copy_(new)
        return None


def pruned(weight: Tensor) -> Tensor:
    """Without its smaller half."""
    return torch.where(weight.abs() > weight.abs().median(), weight, 0)


# -- by hand ---------------------------------------------------------------------------------------


def step(case: Case, given: list[Tensor], x: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
    """One step of one sequence: the new h (not projected) and c."""
    (w_ih, w_hh), b = given[:2], given[2:4] if case.bias else [torch.zeros(())] * 2
    a, r = w_ih @ x + b[0], w_hh @ h + b[1]
    if case.kind in ("tanh", "relu"):
        return [(a + r).tanh() if case.kind == "tanh" else (a + r).relu(), c]
    if case.kind == "GRU":
        (ar, az, an), (hr, hz, hn) = a.chunk(3), r.chunk(3)
        n, z = (an + (ar + hr).sigmoid() * hn).tanh(), (az + hz).sigmoid()
        return [(1 - z) * n + z * h, c]
    i, f, g, o = (a + r).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return [o.sigmoid() * c.tanh(), c]


@dataclass(frozen=True)
class Way:
    """One direction of one layer on all sequences, with these weights."""

    case: Case
    given: list[Tensor]
    sequences: list[list[Tensor]]
    h0: Tensor
    c0: Tensor
    back: bool

    def ran(self) -> tuple[Sequences, Sequences, Sequences]:
        """What comes out, the states before each step, and the outputs before projection."""
        every: list[tuple[list[Tensor], ...]] = []
        for xs, h, c in zip(self.sequences, self.h0, self.c0, strict=True):
            out, before, whole = [], [], []
            for x in xs[::-1] if self.back else xs:
                before.append(h)
                h, c = step(self.case, self.given, x, h, c)
                whole.append(h)
                h = self.given[-1] @ h if self.case.projection else h
                out.append(h)
            every.append((out[::-1] if self.back else out, before, whole))
        out, before, whole = zip(*every, strict=True)
        return list(out), list(before), list(whole)


def by_hand(
    case: Case, net: nn.RNNBase, sequences: Sequences, h0: Tensor, c0: Tensor
) -> tuple[list[Tensor], Sequences]:
    """The rows of each weight in the order in which it is told of, and each sequence's outputs."""
    found: list[Tensor] = []
    ways = 2 if case.bidirectional else 1
    for number, names in enumerate(net._all_weights):
        if number % ways == 0:
            reads, made = sequences, []
        given = [getattr(net, name).detach().clone() for name in names]
        way = Way(case, given, reads, h0[number], c0[number], number % ways == 1)
        found.append(rows_of(reads))
        given[0] = pruned(given[0])
        found.append(rows_of(way.ran()[1]))
        given[1] = pruned(given[1])
        if case.projection:
            found.append(rows_of(way.ran()[2]))
            given[-1] = pruned(given[-1])
        made.append(way.ran()[0])
        sequences = [
            [torch.cat(parts) for parts in zip(*of_ways, strict=True)]
            for of_ways in zip(*made, strict=True)
        ]
    return found, sequences


def rows_of(sequences: Sequences) -> Tensor:
    return torch.stack([row for s in sequences for row in s])


def in_some_order(rows: Tensor) -> Tensor:
    """Rows sorted by what they hold."""
    return rows[sorted(range(len(rows)), key=lambda i: rows[i].round(decimals=9).tolist())]


@settings(max_examples=60)
@given(cases(), st.booleans())
def test_each_weight_multiplies_what_a_loop_over_the_steps_says(case: Case, in_place: bool) -> None:
    net, (x, hx) = case.net(), case.inputs()
    lengths = case.lengths if case.packed else [max(case.lengths)] * len(case.lengths)
    whole = pad_packed_sequence(x)[0] if isinstance(x, PackedSequence) else x
    steps = whole.transpose(0, 1) if case.batch_first and not case.packed else whole
    sequences = [[steps[t, b] for t in range(n)] for b, n in enumerate(lengths)]
    zero = torch.zeros(case.layers * (1 + case.bidirectional), len(lengths), 5).double()
    h0, c0 = (hx if case.kind == "LSTM" else (hx, zero)) if case.initial else (zero, zero)
    h0 = h0[..., : case.projection] if case.projection else h0
    expected, outputs = by_hand(case, net, sequences, h0, c0)
    with Watch(in_place=in_place) as watch, torch.no_grad():
        found, _ = net(x, hx)
    assert [id(weight) for weight, _ in watch.seen] == watch.weights
    for (_, rows), like in zip(watch.seen, expected, strict=True):
        torch.testing.assert_close(in_some_order(rows), in_some_order(like))
    if isinstance(found, PackedSequence):
        found, _ = pad_packed_sequence(found)
    elif case.batch_first:
        found = found.transpose(0, 1)
    for b, sequence in enumerate(outputs):
        torch.testing.assert_close(found[: len(sequence), b], torch.stack(sequence))


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_nobody_changes_gives_the_same_bits(kind: str) -> None:
    case = Case(kind, 2, True, True, True, 0, (3, 3), False, False, 0)
    net, (x, _) = case.net(), case.inputs()

    class Only(Watch):
        def reach(self, weight: Tensor, rows: Rows) -> None:
            rows()

    with torch.no_grad():
        expected = net(x)
        with Only(in_place=True):
            found = net(x)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_both_directions_of_a_layer_read_the_same_rows() -> None:
    case = Case("GRU", 2, True, True, False, 0, (4, 2), True, False, 0)
    with Watch(in_place=True) as watch, torch.no_grad():
        case.net()(*case.inputs())
    forward, _, backward, _, above, _, above_backward, _ = watch.shared
    assert forward is backward
    assert above is above_backward
    assert above is not forward


def test_rows_that_nobody_asks_for_are_not_computed() -> None:
    case = Case("LSTM", 3, False, True, False, 0, (4,), False, False, 0)
    calls: list[Any] = []

    class Counting(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            calls.append(function)
            return function(*args, **(kwargs or {}))

    net, (x, _) = case.net(), case.inputs()
    initial = torch.zeros(3, 1, 5).double()
    args = (x, [initial, initial], net._flat_weights, True, 3, 0.0, False, False, False)
    with Counting(), torch.no_grad():
        watched(torch.lstm, args, {}, lambda weight, rows: None)
    assert calls.count(torch.lstm) == 1


CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell, lambda i, h: nn.RNNCell(i, h, nonlinearity="relu")]


@pytest.mark.parametrize("make", CELLS)
@pytest.mark.parametrize("given", ["batch and state", "batch", "one row"])
@pytest.mark.parametrize("in_place", [True, False])
def test_cells_read_their_input_and_their_state(make: Any, given: str, in_place: bool) -> None:
    cell, x, h = make(3, 5), torch.randn(2, 3), torch.randn(2, 5)
    lstm = isinstance(cell, nn.LSTMCell)
    state = (h, torch.randn(2, 5)) if lstm else h
    args = {"batch and state": (x, state), "batch": (x,), "one row": (x[0],)}[given]
    read = (x, h) if given == "batch and state" else (x, torch.zeros(2, 5))
    expected = [rows[:1] if given == "one row" else rows for rows in read]
    with Watch(in_place=in_place) as watch, torch.no_grad():
        found = cell(*args)
    assert [id(w) for w, _ in watch.seen] == [id(cell.weight_ih), id(cell.weight_hh)]
    for (weight, rows), like in zip(watch.seen, expected, strict=True):
        assert torch.equal(rows, like)
        assert bool((weight == 0).any()) == in_place
        weight.data = pruned(weight.detach())
    with torch.no_grad():
        again = cell(*args)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_calls_by_keyword_are_understood() -> None:
    case = Case("GRU", 1, False, True, False, 0, (3, 2), True, False, 0)
    net, (x, _) = case.net(), case.inputs()
    assert isinstance(x, PackedSequence)
    shared: dict[str, Any] = {
        "hx": torch.zeros(1, 2, 5).double(),
        "params": net._flat_weights,
        "has_biases": True,
        "num_layers": 1,
        "dropout": 0.0,
        "train": False,
        "bidirectional": False,
    }
    padded = {"input": torch.randn(4, 2, 3).double(), **shared, "batch_first": False}
    packed = {"data": x.data, "batch_sizes": x.batch_sizes, **shared}
    for kwargs, rows in ((padded, 8), (packed, 5)):
        seen: list[int] = []
        with torch.no_grad():
            found = watched(torch.gru, (), kwargs, lambda _, r, seen=seen: seen.append(len(r())))
            assert torch.equal(found[0], torch.gru(**kwargs)[0])
        assert seen == [rows, rows]
