"""A block that runs again starts from what its first run started from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune import SparseGPTSpec, WandaSpec
from torchprune.calibration.batches import Batch
from torchprune.calibration.replay import Replays, private
from torchprune.errors import CalibrationError
from torchprune.specs.options import Reconstruct
from torchprune.specs.spec import Spec

SPECS: dict[str, Spec] = {
    "block": WandaSpec(sequential="block"),
    "block with a gram": SparseGPTSpec(sequential="block", damping=0.1),
    "reconstruct": WandaSpec(reconstruct=Reconstruct(epochs=1, alpha=0.0)),
    "reconstruct to dense": WandaSpec(reconstruct=Reconstruct(epochs=1, alpha=0.5)),
    "alpha": SparseGPTSpec(alpha=0.5, damping=0.1),
}
QUIET: dict[str, Any] = {"progress": False}


def state(model: nn.Module) -> dict[str, Tensor]:
    return torchprune.fold(model).state_dict()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


def pruned(family: Family, spec: Spec, data: list[Any]) -> dict[str, Tensor]:
    return state(torchprune.sparsify(family.make(), spec, data, **QUIET))


# -- caches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spec", "padded"),
    [
        *(("llama", spec, padded) for spec in SPECS for padded in (False, True)),
        ("gpt2", "block", True),
        ("mixtral", "block", True),
        ("t5", "reconstruct", True),
        ("t5", "block", False),
    ],
)
def test_a_cache_changes_nothing(name: str, spec: str, padded: bool) -> None:
    family = FAMILIES[name]
    plain = [b if isinstance(b, dict) else {"input_ids": b} for b in family.data(count=2)]
    if padded:
        seen = torch.ones_like(plain[0]["input_ids"])
        seen[1, -4:] = 0
        plain = [{**batch, "attention_mask": seen} for batch in plain]
    expected = pruned(family, SPECS[spec], plain)
    same(expected, pruned(family, SPECS[spec], [{**batch, "use_cache": True} for batch in plain]))


@pytest.mark.parametrize("name", ["layer", "block", "reconstruct", "alpha"])
def test_a_given_cache_is_read_and_left_as_it_was(name: str) -> None:
    from transformers import DynamicCache

    family, spec = FAMILIES["llama"], SPECS.get(name, WandaSpec())
    given = []
    for ids in family.data(count=2):
        cache = DynamicCache()
        with torch.no_grad():
            family.make()(ids[:, :5], past_key_values=cache, use_cache=True)
        given.append({"input_ids": ids[:, 5:], "past_key_values": cache, "use_cache": True})
    fresh = copy.deepcopy(given)
    first = pruned(family, spec, given)
    for batch, before in zip(given, fresh, strict=True):
        for layer, old in zip(
            batch["past_key_values"].layers, before["past_key_values"].layers, strict=True
        ):
            assert torch.equal(layer.keys, old.keys)
    same(first, pruned(family, spec, given))
    without = [{"input_ids": batch["input_ids"]} for batch in given]
    other = pruned(family, spec, without)
    assert any(not torch.equal(first[key], other[key]) for key in first), "the cache is not read"


# -- blocks that write ----------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def start(self, x: Tensor, store: dict[str, Any]) -> Tensor:
        return x

    def forward(self, x: Tensor, store: dict[str, Any]) -> Tensor:
        x = self.start(x, store)
        return x + self.b(torch.relu(self.a(x)))


class Pure(Block):
    def start(self, x: Tensor, store: dict[str, Any]) -> Tensor:
        return x * torch.linspace(1, 2, 16)


class InPlace(Block):
    def start(self, x: Tensor, store: dict[str, Any]) -> Tensor:
        return x.mul_(torch.linspace(1, 2, 16))


class Plain(Block):
    def start(self, x: Tensor, store: dict[str, Any]) -> Tensor:
        return x + 1


class Stored(Block):
    """Reads how often it was called from where it keeps that, as a cache's length is read."""

    def start(self, x: Tensor, store: dict[str, Any]) -> Tensor:
        before = store.get(id(self), 0)
        store[id(self)] = before + 1
        return x + 1 + before


class Buffered(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def start(self, x: Tensor, store: dict[str, Any]) -> Tensor:
        before = float(self.calls)
        self.calls += 1
        return x + 1 + before


class Attribute(Block):
    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def start(self, x: Tensor, store: dict[str, Any]) -> Tensor:
        x = x + 1 if self.kept is None else torch.cat([self.kept, x])[: len(x)]
        self.kept = x.clone()
        return x


class Net(nn.Module):
    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        store: dict[str, Any] = {}
        x = self.first(x)
        for block in self.blocks:
            x = block(x, store)
        return x


def vectors(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(20, 16, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("spec", list(SPECS)[:3])
@pytest.mark.parametrize(
    ("kind", "pure", "count"),
    [(InPlace, Pure, 3), (Stored, Plain, 3), (Buffered, Plain, 1), (Attribute, Plain, 1)],
)
def test_what_a_block_writes_is_undone(
    kind: type[Block], pure: type[Block], count: int, spec: str
) -> None:
    one, two = Net(pure), Net(kind)
    for model in (one, two):
        torchprune.sparsify(model, SPECS[spec], vectors(count), **QUIET)
    expected, found = state(one), state(two)
    same({key: value for key, value in expected.items() if key in found}, found)


@pytest.mark.parametrize("inference", [False, True])
def test_inputs_written_in_inference_mode(inference: bool) -> None:
    one, two = Net(Pure), Net(InPlace)
    with torch.inference_mode(inference):
        for model in (one, two):
            torchprune.sparsify(model, WandaSpec(sequential="block"), vectors(2), **QUIET)
    same(state(one), state(two))


class Sometimes(Block):
    def start(self, x: Tensor, store: dict[str, Any]) -> Tensor:
        return x.mul_(2) if len(x) > 20 else x


def test_a_write_that_the_first_run_did_not_show_is_an_error() -> None:
    model = Net(Sometimes)
    before = copy.deepcopy(model.state_dict())
    data = [*vectors(1), torch.randn(21, 16)]
    with pytest.raises(CalibrationError, match=r"writes in place to args\.0 on some batches"):
        torchprune.sparsify(model, WandaSpec(sequential="block"), data, **QUIET)
    same(before, model.state_dict())


# -- the snapshot itself --------------------------------------------------------------------------


class Store:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Store):
        return _described(vars(value))
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    return value


leaves_ = st.one_of(st.integers(), st.none(), st.builds(lambda: torch.zeros(3)))
values = st.recursive(
    leaves_,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.builds(lambda a, b: Store(a=a, b=b), inner, inner),
        st.tuples(inner),
    ),
    max_leaves=8,
)


def _scribbled(value: Any, draw: Callable[[int], int]) -> None:
    """Change a value everywhere, in place."""
    if isinstance(value, Tensor):
        value.add_(1 + draw(2))
    elif isinstance(value, Store):
        _scribbled(vars(value), draw)
    elif isinstance(value, dict):
        for item in value.values():
            _scribbled(item, draw)
        if value and draw(2):
            value.pop(next(iter(value)))
        value["new"] = draw(9)
    elif isinstance(value, list | tuple):
        for item in value:
            _scribbled(item, draw)
        if isinstance(value, list):
            value.append(draw(9))


@given(given_=values, seed=st.integers(0, 99), times=st.integers(1, 3))
def test_everything_reached_from_a_call_comes_back(given_: Any, seed: int, times: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: int(torch.randint(n, (), generator=generator))  # noqa: E731
    before = _described(given_)
    start = Replays("block", nn.Identity()).start((given_,), {"again": given_})
    for _ in range(times):
        _scribbled(given_, draw)
        start.restore()
        assert _described(given_) == before


def test_nothing_is_copied_of_what_is_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Tensor] = []
    clone = Tensor.clone
    block, x, store = Plain(), torch.randn(4, 16), {"mask": torch.ones(4)}
    replays = Replays("block", block)
    start = replays.start((x, store), {})
    block(x, store)
    start.restore()
    monkeypatch.setattr(Tensor, "clone", lambda t, **kw: copies.append(t) or clone(t, **kw))
    start = replays.start((x, store), {})
    block(x, store)
    start.restore()
    assert not copies


def test_private_copies_objects_and_leaves_tensors() -> None:
    x, store = torch.ones(2), Store(kept=[torch.zeros(2)])
    batch = Batch((x,), {"store": store, "both": [x, store]}).private()
    assert batch.args[0] is x
    assert batch.kwargs["both"][0] is x
    assert batch.kwargs["store"] is not store
    assert private(3) == 3
