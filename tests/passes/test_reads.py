"""Reads of a graph: the rows of each, times the part of the parameter, are what its node gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import exported, parameters_of, values_of
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from torchprune.calibration.recurrent import is_recurrent, watched
from torchprune.masking.parts import Part
from torchprune.passes.reads import Read, reads_in

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.export

Forward = Callable[[Any, Tensor], Tensor]


class Spelled(nn.Module):
    """Products with the same few weights, each in one spelling. All have inputs of size 4."""

    def __init__(self, spellings: dict[str, Forward]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 4))
        self.e = nn.Parameter(torch.randn(3, 4, 4))
        self.k = nn.Parameter(torch.randn(6, 2, 3))
        self.d = nn.Parameter(torch.randn(4, 2, 3))
        self._spellings = spellings

    def forward(self, x: Tensor) -> list[Tensor]:
        return [spelling(self, x) for spelling in self._spellings.values()]


SPELLINGS: dict[str, Forward] = {
    "linear": lambda m, x: F.linear(x, m.w),
    "transposed": lambda m, x: x @ m.w.T,
    "stored turned": lambda m, x: x @ m.e[0],
    "weight first": lambda m, x: m.w @ x[0].T,
    "chunk": lambda m, x: F.linear(x, m.w.chunk(3)[1]),
    "unequal split": lambda m, x: F.linear(x, m.w.split([6, 2, 4])[2]),
    "view and unbind": lambda m, x: x @ m.w.view(3, 4, 4).unbind(0)[2].mT,
    "rows by index": lambda m, x: F.linear(x, m.w[4:8]),
    "every third row": lambda m, x: F.linear(x, m.w[::3]),
    "columns": lambda m, x: F.linear(x[..., :2], m.w[:, 2:]),
    "a copy": lambda m, x: F.linear(x, m.w.contiguous().clone()),
    "another dtype": lambda m, x: F.linear(x.float(), m.w.to(torch.float32)).double(),
    "mm": lambda m, x: torch.mm(x[0], m.w.t()),
    "addmm": lambda m, x: torch.addmm(x.new_zeros(12), x[0], m.w.t()),
    "mv": lambda m, x: torch.mv(m.w, x[0, 0]),
    "bmm": lambda m, x: torch.bmm(x[:1].expand(3, 5, 4), m.e),
    "baddbmm": lambda m, x: torch.baddbmm(x.new_zeros(3, 5, 4), x[:1].expand(3, 5, 4), m.e.mT),
    "a stack for each of a batch": lambda m, x: x[:, None] @ m.e,
    "a stack for one matrix": lambda m, x: x[0] @ m.e.mT,
    "a stack for one vector": lambda m, x: x[0, 0] @ m.e,
    "a matrix for a batch": lambda m, x: x[:, None] @ m.w.T,
    "tensordot": lambda m, x: torch.tensordot(x, m.e[1], dims=1),
    "inner": lambda m, x: torch.inner(x, m.w),
    "einsum": lambda m, x: torch.einsum("bti,oi->bto", x, m.w),
    "einsum with dots": lambda m, x: torch.einsum("...i,oi->...o", x, m.w),
    "einsum without arrow": lambda m, x: torch.einsum("bti,oi", x, m.w),
    "einsum to heads": lambda m, x: torch.einsum("bti,hoi->bhto", x, m.e),
    "einsum from heads": lambda m, x: torch.einsum(
        "bthi,hio->bto", x[:, :, None].expand(2, 5, 3, 4), m.e
    ),
    "einsum of experts": lambda m, x: torch.einsum("eti,eio->eto", x[:1].expand(3, 5, 4), m.e),
    "conv": lambda m, x: F.conv1d(x[..., :2].mT, m.d),
    "conv of groups": lambda m, x: F.conv1d(x.mT, m.k, groups=2, padding=1, stride=2),
    "conv, same": lambda m, x: F.conv1d(x.mT, m.k, groups=2, padding="same", dilation=2),
    "conv of images": lambda m, x: F.conv2d(x[:, None], m.e[:, None]),
}


def forms(model: nn.Module, x: Tensor) -> list[ExportedProgram]:
    program = exported(model.double(), x, dynamic=False)
    return [program, program.run_decompositions()]


def matrices(part: Part, weight: Tensor) -> Tensor:
    """(groups, rows, cols) of a part of a parameter."""
    places = torch.full((1, 1, 1), part.offset)
    for axis in part.axes:
        at = ("group", "row", "col").index(axis.role)
        along = torch.arange(axis.size).mul(axis.step).view(-1, *[1] * (2 - at))
        places = (places.unsqueeze(at + 1) + along).flatten(at, at + 1)
    return weight.flatten()[places]


def found_in(program: ExportedProgram) -> dict[str, list[Read]]:
    named = parameters_of(program)
    held = {node: program.state_dict[name] for node, name in named.items()}
    reads = reads_in(program.graph_module.graph, held)
    return {named[node]: some for node, some in reads.items()}


def sorted_values(tensor: Tensor) -> Tensor:
    return tensor.detach().double().flatten().sort().values


def test_rows_times_parts_are_what_the_products_give() -> None:
    model, x = Spelled(SPELLINGS), torch.randn(2, 5, 4).double()
    for program, vectors in zip(forms(model, x), (0, 2), strict=True):  # which become mul and sum
        values = values_of(program, x)
        count = 0
        for name, reads in found_in(program).items():
            for read in reads:
                stack = matrices(read.part, program.state_dict[name]).detach()
                rows = read.rows(values)
                assert len(rows) == len(stack), read.node
                made = [r.double() @ w.T for r, w in zip(rows, stack, strict=True)]
                made = torch.cat([m.flatten() for m in made])
                given = values[read.node]
                torch.testing.assert_close(
                    sorted_values(made), sorted_values(given), rtol=1e-5, atol=1e-5
                )
                count += 1
        assert count == len(SPELLINGS) - vectors


OTHERS: dict[str, Forward] = {
    "value by value": lambda m, x: x * m.w[0],
    "only rows": lambda m, x: torch.outer(x[0, 0], m.w[0]),
    "two weights": lambda m, x: x * (m.w[:4] @ m.e[0]).sum(),
    "an index": lambda m, x: F.linear(x, m.w.index_select(0, torch.arange(4))),
    "a lookup": lambda m, x: F.embedding(x.long().clamp(0, 3), m.w),
    "three operands": lambda m, x: torch.einsum("bti,oi,bt->bto", x, m.w, x[..., 0]),
}


def test_what_is_no_product_of_inputs_and_a_part_is_none() -> None:
    model, x = Spelled(OTHERS), torch.randn(2, 5, 4).double()
    (program, _) = forms(model, x)
    assert found_in(program) == {}


def test_reads_of_the_same_rows_have_one_source() -> None:
    alike: dict[str, Forward] = {
        "a": lambda m, x: F.linear(x, m.w[:4]),
        "b": lambda m, x: F.linear(x, m.w[4:8]),
        "c": lambda m, x: F.conv1d(x.mT, m.k, groups=2),
        "d": lambda m, x: F.conv1d(x.mT, m.k[2:], groups=2),
        "e": lambda m, x: F.linear(x + 1, m.w[8:]),
    }
    program, _ = forms(Spelled(alike), torch.randn(2, 5, 4).double())
    reads = found_in(program)
    a, b, e = (read.source for read in reads["w"])
    assert a == b != e
    c, d = (read.x for read in reads["k"])
    assert c is d


NETS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(4, 3, 2, bidirectional=True, proj_size=2),
    "GRU": lambda: nn.GRU(4, 3, 2, batch_first=True),
    "RNN": lambda: nn.RNN(4, 3, bias=False),
}


@pytest.mark.parametrize("net", NETS)
def test_recurrent_nets_are_read_as_they_are_watched(net: str) -> None:
    model, x = NETS[net](), torch.randn(2, 5, 4).double()
    program, unrolled = forms(model, x)
    reads = found_in(program)
    assert set(reads) == {name for name, p in model.named_parameters() if p.dim() == 2}
    seen: dict[int, Tensor] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, f: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not is_recurrent(f):
                return f(*args, **(kwargs or {}))
            return watched(f, args, kwargs or {}, lambda w, r: seen.update({id(w): r()}))

    with Watch(), torch.no_grad():
        model(x)
    whole, steps = values_of(program, x), values_of(unrolled, x)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            (read,) = reads[name]
            (rows,) = read.rows(whole)
            torch.testing.assert_close(rows, seen[id(weight)])
            if "hr" not in name:
                parts = [rows for read in found_in(unrolled)[name] for rows in read.rows(steps)]
                torch.testing.assert_close(sorted_values(torch.cat(parts)), sorted_values(rows))
