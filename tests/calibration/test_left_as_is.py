"""A model is as it was after its graph was read, whatever its forward keeps."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import torchprune
from torchprune.errors import ShrinkError
from torchprune.graph.groups import structure_of

TABLE: Tensor | None = None
TABLES: dict[int, Tensor] = {}


@functools.lru_cache
def cached_table(count: int) -> Tensor:
    return torch.arange(float(count))


class Store:
    """Not a module."""

    def __init__(self) -> None:
        self.table: Tensor | None = None


class Net(nn.Module):
    default: ClassVar[Tensor | None] = None
    shared: ClassVar[dict[int, Tensor]] = {}

    def __init__(self, keep: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 4)
        self.keep, self.count = keep, 0
        self.grid: Any = None
        self.tables: dict[Any, Any] = {"inner": {}}
        self.history: list[Any] = [1]
        self.recent: deque[Any] = deque(maxlen=2)
        self.store = Store()

    def table(self) -> Tensor:
        global TABLE
        made = torch.arange(4.0)
        match self.keep:
            case "attribute":
                self.grid = made if self.grid is None else self.grid
                return self.grid
            case "entry":
                return self.tables.setdefault(16, made)
            case "nested":
                return self.tables["inner"].setdefault(16, made)
            case "list":
                self.history.append(made)
                return self.history[1]
            case "deque":
                self.recent.append(made)
                return self.recent[0]
            case "object":
                self.store.table = made if self.store.table is None else self.store.table
                return self.store.table
            case "class":
                if type(self).default is None:
                    type(self).default = made
                return type(self).default
            case "class dict":
                return self.shared.setdefault(16, made)
            case "global":
                TABLE = made if TABLE is None else TABLE
                return TABLE
            case "global dict":
                return TABLES.setdefault(16, made)
            case "cached function":
                return cached_table(4)
        self.count += 1
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) + self.table()


KEEPS = ["attribute", "entry", "nested", "list", "deque", "object", "class", "class dict"]
KEEPS += ["global", "global dict", "cached function", "count"]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("touched", [False, True], ids=["fresh", "has run"])
def test_reading_the_structure_leaves_nothing_fake(keep: str, touched: bool) -> None:
    Net.default, globals()["TABLE"] = None, None
    Net.shared.clear()
    TABLES.clear()
    cached_table.cache_clear()
    net, x = Net(keep), torch.randn(2, 4)
    if touched:
        net(x)
    before = dict(vars(net))
    entries = list(net.history), dict(net.tables), dict(net.tables["inner"]), list(net.recent)
    structure = structure_of(net, x)
    assert [group.count for group in structure.groups] == [16]
    assert vars(net).keys() == before.keys()
    assert all(vars(net)[name] is value for name, value in before.items())
    now = list(net.history), dict(net.tables), dict(net.tables["inner"]), list(net.recent)
    assert [len(held) for held in now] == [len(held) for held in entries]
    reachable = [net.store.table, Net.default, TABLE, *Net.shared.values(), *TABLES.values()]
    assert not any(isinstance(value, FakeTensor) for value in reachable)
    assert not isinstance(cached_table(4), FakeTensor)
    assert type(net(x)) is Tensor
    assert type(net.train()(x)) is Tensor


@pytest.mark.parametrize("keep", KEEPS)
def test_and_so_does_the_whole_walk(keep: str) -> None:
    Net.default, globals()["TABLE"] = None, None
    Net.shared.clear()
    TABLES.clear()
    cached_table.cache_clear()
    net, x = Net(keep), torch.randn(2, 4)
    torchprune.sparsify(net, torchprune.NeuronSpec(0.5), [x], progress=False)
    plan = torchprune.plan_shrink(net, x)
    net(x)
    assert not any(isinstance(v, FakeTensor) for v in gc_tensors(net))
    assert plan.removals


def gc_tensors(net: Net) -> list[Any]:
    return [net.grid, *net.tables.values(), *net.history, *net.recent, net.store.table]


def test_a_failing_export_leaves_the_model_too() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            made = super().forward(x)
            return made if float(made.sum()) > 0 else -made

    net = Fails("attribute")
    with pytest.raises(ShrinkError, match="cannot capture"):
        structure_of(net, torch.randn(2, 4))
    assert net.grid is None
