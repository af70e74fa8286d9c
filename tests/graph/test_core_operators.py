"""Core ATen: every operator is accounted for, and what a rule lets go, computing lets go too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from core_calls import CALLS, CUT
from torch import Tensor
from torch.utils import _pytree as pytree

from torchprune.graph.context import Context
from torchprune.graph.labels import Labels, axes_of
from torchprune.graph.rules import follow
from torchprune.graph.values import Value, filled

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("operators", ROOT / "tools" / "operators.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_core_operator_is_missing_and_the_page_is_what_is_made(table: ModuleType) -> None:
    found = table.core_operators()
    assert len(found) > 150
    assert [name for name, op in found.items() if table.account(op)[0] == "missing"] == []
    page = ROOT / "docs" / "notes" / "operators.md"
    assert page.read_text("utf-8") == table.page(), "run tools/operators.py"


def test_every_core_operator_with_a_rule_of_its_own_is_tried_here(table: ModuleType) -> None:
    own = {name for name, op in table.core_operators().items() if table.account(op)[0] == "rule"}
    assert own <= set(CALLS)


def test_an_operator_without_rule_or_reason_would_be_seen(table: ModuleType) -> None:
    assert table.account(torch.ops.aten.linalg_qr.default)[0] == "missing"


NOTHING_GOES = {"any.default", "mean.default", "prod.default"}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_rule_lets_go_computing_lets_go(name: str) -> None:
    """Without some indices an operator gives what it gave, without what the rule says of them."""
    torch.manual_seed(0)
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload)
    given, call = CALLS[name]
    tensors = [one() if callable(one) else torch.rand(one, dtype=torch.float64) for one in given]
    labels = Labels()
    cut = CUT.get(name, {})
    given_tags = [
        tuple(filled(labels, t.shape, {*range(t.dim())} - {cut.get(place)}))
        for place, t in enumerate(tensors)
    ]
    made = _followed(labels, operator, call, tensors, given_tags)
    resolved = labels.resolve()
    classes, frozen = resolved.classes, resolved.frozen
    own = torch.cat([tag.reshape(-1) for tags in given_tags for tag in tags])
    names = classes[own][~frozen[own]].unique()
    assert bool(len(names)) != (name in NOTHING_GOES)
    want = pytree.tree_leaves(call(operator, *tensors))
    for seed in range(3):
        chance = torch.rand(len(names), generator=torch.Generator().manual_seed(seed))
        gone = torch.zeros(len(classes), dtype=torch.bool)
        gone[names[chance < 0.4]] = True
        gone = gone[classes]
        less = [_without(t, tags, gone) for t, tags in zip(tensors, given_tags, strict=True)]
        if any(not t.numel() for t in less):
            continue
        got = pytree.tree_leaves(call(operator, *less))
        for one, other, value in zip(got, want, made, strict=True):
            torch.testing.assert_close(one, _without(other, value.tags, gone), equal_nan=True)


def _followed(
    labels: Labels,
    operator: Any,
    call: Any,
    tensors: list[Tensor],
    given: list[tuple[Tensor, ...]],
) -> list[Value]:
    """What the rule makes of the one call of an operator in it."""
    values = {id(t): Value(tuple(t.shape), tags) for t, tags in zip(tensors, given, strict=True)}
    noted: list[Any] = []

    def note(*args: Any, **named: Any) -> Any:
        noted.append((args, named))
        return operator(*args, **named)

    out = [leaf for leaf in pytree.tree_leaves(call(note, *tensors)) if isinstance(leaf, Tensor)]
    ((args, named),) = noted
    held, tree = pytree.tree_flatten((args, named))
    args_of, named_of = pytree.tree_unflatten([values.get(id(leaf), leaf) for leaf in held], tree)
    shapes = [tuple(t.shape) for t in out]
    context = Context(labels, "a test", shapes, example=(args, named))
    made = follow(context, operator, args_of, named_of)
    return list(made) if isinstance(made, tuple) else [made]


def _without(tensor: Tensor, tags: tuple[Tensor, ...], gone: Tensor) -> Tensor:
    """A tensor less the indices that carry what goes; it must be a rectangle."""
    for tag in tags:
        kept = ~gone[tag]
        for axis in axes_of(tag):
            others = [a for a in range(tag.dim()) if a != axis]
            own = kept.any(dim=others) if others else kept
            tensor = tensor.index_select(axis, own.nonzero().flatten())
            kept = kept.index_select(axis, own.nonzero().flatten())
        assert kept.all()
    return tensor
