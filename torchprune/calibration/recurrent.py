"""Recurrent operators: what each of their weights multiplies, in the order in which it is used.

`torch.lstm`, `gru`, `rnn_tanh` and `rnn_relu` take all layers, directions and time steps in one
call, so nobody sees the products inside. `watched` tells of every weight of such a call before it
is used, layer by layer and direction by direction, with the rows that it multiplies:

- `weight_ih`: the layer's inputs, each time step of each sequence (of a packed batch: no padding);
- `weight_hh`: the hidden states of the steps before, from the initial ones on;
- `weight_hr` (of an LSTM with projections): the cells' outputs before they are projected.

Whoever is told of a weight may change it: what comes after is computed with the new one. In the end
torch's own operator gives the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, cast

import torch
from torch import _VF, Tensor

Rows = Callable[[], Tensor]
"""Gives (rows, cols), computed when first asked for. Weights that read the same share one."""

Reach = Callable[[Tensor, Rows], Tensor | None]
"""Is told of a weight, and of its rows, which must be asked for before the weight changes.

It may write to the weight, or give another to go on with.
"""

_REST = ("has_biases", "num_layers", "dropout", "train", "bidirectional")
_PADDED = ("input", "hx", "params", *_REST, "batch_first")
_PACKED = ("data", "batch_sizes", "hx", "params", *_REST)
_CELL = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
_OPERATORS = (_VF.lstm, _VF.gru, _VF.rnn_tanh, _VF.rnn_relu)
_CELLS = (_VF.lstm_cell, _VF.gru_cell, _VF.rnn_tanh_cell, _VF.rnn_relu_cell)
OPERATORS = frozenset((*_OPERATORS, *_CELLS))
"""All of torch's recurrent operators and cells."""


def is_recurrent(function: Any) -> bool:
    """Whether this is one of torch's recurrent operators or cells."""
    return function in OPERATORS  # asked of every function that a model calls


def weights_in(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The matrices of a call, each (outputs, inputs), in the order in which `watched` tells."""
    if function in _CELLS:
        given = _named(_CELL, args, kwargs)
        return [given["w_ih"], given["w_hh"]]
    call = _Call(function, args, kwargs)
    return [call.params[at] for place in call.places() for at in place.matrices]


def feeding_back(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[bool]:
    """Of each of these matrices, whether what it gives comes back to it a step later."""
    if function in _CELLS:
        return [False, True]
    call = _Call(function, args, kwargs)
    return [at > 0 for place in call.places() for at in range(len(place.matrices))]


def watched(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], reach: Reach) -> Any:
    """What the call gives, after `reach` was told of each of its matrices."""
    if function in _CELLS:
        return _watched_cell(function, _named(_CELL, args, kwargs), reach)
    call = _Call(function, args, kwargs)
    for at, rows in _reads(call) if len(call.sizes) else ():
        new = reach(call.params[at], rows)
        if new is not None:
            call.params[at] = new
    return call.result()


def rows_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], number: int) -> Tensor:
    """What the matrix of this number (in `weights_in`) multiplies, with all weights as they are."""
    read: Iterator[tuple[Any, Rows]]
    if function in _CELLS:
        read = _cell_reads(_named(_CELL, args, kwargs))
    else:
        read = _reads(_Call(function, args, kwargs))
    _, rows = next(islice(read, number, None))
    return rows()


def _reads(call: _Call) -> Iterator[tuple[int, Rows]]:
    """The call's matrices by their places, each with its rows by the weights as they are then."""
    inputs: Rows = _Once(call.first_inputs)
    for layer in range(call.layers):
        outputs = []
        for place in call.places(layer):
            steps = call.steps(place, inputs)
            made = (inputs, _Once(steps.states_before), _Once(steps.unprojected))
            yield from zip(place.matrices, made, strict=False)
            outputs.append(_Once(steps.outputs))
        inputs = _Once(partial(_side_by_side, outputs))


def _watched_cell(function: Any, given: dict[str, Any], reach: Reach) -> Any:
    for name, rows in _cell_reads(given):
        new = reach(given[name], rows)
        given[name] = given[name] if new is None else new
    return function(*(given[name] for name in _CELL if name in given))


def _cell_reads(given: Mapping[str, Any]) -> Iterator[tuple[str, Rows]]:
    state = given["hx"] if isinstance(given["hx"], Tensor) else given["hx"][0]
    for name, read in (("w_ih", given["input"]), ("w_hh", state)):
        yield name, _Once(partial(read.reshape, -1, read.shape[-1]))


def _named(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _side_by_side(parts: Sequence[Rows]) -> Tensor:
    return torch.cat([part() for part in parts], dim=1)


def _without_cudnn() -> AbstractContextManager[None]:
    """It wants a net's weights, all of them, in one piece of memory."""
    return torch.backends.cudnn.flags(enabled=False)


class _Once:
    """Rows that are computed once, when first asked for."""

    def __init__(self, make: Rows) -> None:
        self._make = make

    @cached_property
    def _rows(self) -> Tensor:
        return self._make()

    def __call__(self) -> Tensor:
        return self._rows


@dataclass(frozen=True)
class _Place:
    """One direction of one layer.

    Attributes:
        number: its place among the initial states.
        params: where its weights and biases stand among those of the call.
        matrices: where its matrices do: input, hidden, and the projection if there is one.
    """

    number: int
    backwards: bool
    params: range
    matrices: tuple[int, ...]


class _Call:
    """One call of an operator, whichever way it was spelled.

    Inside, sequences always lie as in a packed batch: (rows, features), step by step.
    """

    def __init__(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        padded = "batch_first" in kwargs or (len(args) > 3 and isinstance(args[3], bool))
        self._names = _PADDED if padded else _PACKED
        self._given = given = _named(self._names, args, kwargs)
        self.function = function
        self.params: list[Tensor] = list(given["params"])
        self.biases, self.layers = bool(given["has_biases"]), int(given["num_layers"])
        self._directions = 2 if given["bidirectional"] else 1

    def places(self, *layers: int) -> Iterator[_Place]:
        """The directions of these layers, or of all, in the order in which they run."""
        each = len(self.params) // (self.layers * self._directions)
        projection = each % 2  # weights come in pairs, and so do biases
        for layer in layers or range(self.layers):
            for direction in range(self._directions):
                number = layer * self._directions + direction
                params = range(number * each, (number + 1) * each)
                matrices = (params[0], params[1], *([params[-1]] if projection else []))
                yield _Place(number, direction == 1, params, matrices)

    @property
    def initial(self) -> list[Tensor]:
        """The states that the first step starts from: (layers and directions, sequences, size)."""
        hx = self._given["hx"]
        return [hx] if isinstance(hx, Tensor) else list(hx)

    @cached_property
    def sizes(self) -> Tensor:
        """How many sequences there are at each step, int64."""
        if "batch_sizes" in self._given:
            return cast(Tensor, self._given["batch_sizes"])
        steps, sequences, _ = self._by_time().shape
        return torch.full((steps,), sequences, dtype=torch.int64, device="cpu")

    def _by_time(self) -> Tensor:
        x: Tensor = self._given["input"]
        return x.transpose(0, 1) if self._given["batch_first"] else x

    def first_inputs(self) -> Tensor:
        """What the first layer reads."""
        x: Tensor = self._given["data"] if "data" in self._given else self._by_time()
        return x.reshape(-1, x.shape[-1])

    def steps(self, place: _Place, inputs: Rows) -> _Steps:
        """What one direction of a layer runs on."""
        return _Steps(self, place, inputs, [state[place.number] for state in self.initial])

    def result(self) -> Any:
        """What the operator gives, with the weights as they are now."""
        changed = any(a is not b for a, b in zip(self.params, self._given["params"], strict=True))
        given = self._given | {"params": self.params}
        with _without_cudnn() if changed else nullcontext():
            return self.function(*(given[name] for name in self._names))


@dataclass(frozen=True)
class _Steps:
    """One direction of one layer over time; what it gives is by the weights as they are then."""

    call: _Call
    place: _Place
    inputs: Rows
    initial: list[Tensor]

    def outputs(self) -> Tensor:
        """(rows, size): the hidden states, in the order of the inputs."""
        return self._in_order(self._run())

    def states_before(self) -> Tensor:
        """(rows, size): the hidden state that each step starts from, in the order it runs in."""
        return self._shifted(self._run(), self.initial[0])

    def unprojected(self) -> Tensor:
        """(rows, hidden): what an LSTM's cells give before it is projected."""
        w_ih, w_hh, *rest = self._params()
        biases = rest[:2] if self.call.biases else [None, None]
        gates = torch.nn.functional.linear(self._in_order(self.inputs()), w_ih, biases[0])
        gates += torch.nn.functional.linear(self.states_before(), w_hh, biases[1])
        keep, forget, new, give = gates.chunk(4, dim=1)
        added, forget = keep.sigmoid() * new.tanh(), forget.sigmoid()
        cell, cells = self.initial[1], []
        for a, f in zip(*(x.split(self._sizes) for x in (added, forget)), strict=True):
            cell = f * cell[: len(f)] + a
            cells.append(cell)
        return give.sigmoid() * torch.cat(cells).tanh()

    @property
    def _sizes(self) -> list[int]:
        sizes: list[int] = self.call.sizes.tolist()
        return sizes

    def _params(self) -> list[Tensor]:
        return [self.call.params[at] for at in self.place.params]

    def _run(self) -> Tensor:
        """The hidden states, in the order in which the steps run."""
        states = [state.unsqueeze(0).contiguous() for state in self.initial]
        hx = states if len(states) > 1 else states[0]
        once = (self.call.biases, 1, 0.0, False, False)  # one layer, no dropout, one direction
        x = self._in_order(self.inputs())
        with _without_cudnn():
            rows: Tensor = self.call.function(x, self.call.sizes, hx, self._params(), *once)[0]
        return rows

    def _shifted(self, states: Tensor, first: Tensor) -> Tensor:
        """The state before each step instead of that after it."""
        before, blocks = [first], states.split(self._sizes)
        before += blocks[:-1]
        return torch.cat([b[:size] for b, size in zip(before, self._sizes, strict=True)])

    def _in_order(self, rows: Tensor) -> Tensor:
        """From the order of the inputs to that in which the steps run, or back."""
        if not self.place.backwards:
            return rows
        sizes = self.call.sizes
        sequences = torch.arange(int(sizes[0]))
        lengths = (sizes.unsqueeze(1) > sequences).sum(0)
        starts = sizes.cumsum(0) - sizes
        step = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        sequence = torch.arange(len(step)) - starts[step]
        opposite = starts[lengths[sequence] - 1 - step] + sequence
        return rows[opposite.to(rows.device)]
