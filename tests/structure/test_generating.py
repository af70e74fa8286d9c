"""Models without some blocks: what counts blocks follows, and generating with a cache works."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, llama
from torch import Tensor, nn
from zoo import build

import torchprune
from torchprune import LayerSpec
from torchprune.errors import ShrinkError
from torchprune.structure.resize import drop_blocks


def described(model: nn.Module) -> tuple[Any, ...]:
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        copy.deepcopy(model.config.to_dict()),
        [(name, type(m), getattr(m, "layer_idx", None)) for name, m in model.named_modules()],
    )


def assert_as_it_was(model: nn.Module, before: tuple[Any, ...]) -> None:
    now = described(model)
    assert now[1:] == before[1:]
    assert now[0].keys() == before[0].keys()
    assert all(torch.equal(now[0][key], value) for key, value in before[0].items())


def without(model: nn.Module, ids: Tensor, *blocks: str) -> nn.Module:
    spec = LayerSpec(drop=len(blocks), targets=list(blocks))
    torchprune.sparsify(model, spec, [{"input_ids": ids}], progress=False)
    return torchprune.shrink(model, torchprune.plan_shrink(model, {"input_ids": ids}))


def by_cache(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of all tokens, the last two read one by one."""
    with torch.no_grad():
        out = model(input_ids=ids[:, :-2], use_cache=True)
        parts = [out.logits]
        for at in (-2, -1):
            last = ids[:, at : at + 1 or None]
            out = model(input_ids=last, past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("kind", "block", "types"),
    [
        ("granitemoehybrid", "model.layers.0", ["full_attention"]),
        ("lfm2_moe", "model.layers.0", ["conv", "full_attention", "conv"]),
        ("lfm2_moe", "model.layers.1", ["conv", "full_attention", "conv"]),
        ("afmoe", "model.layers.0", ["sliding_attention"]),
    ],
)
def test_a_hybrid_reads_its_cache_after_a_block_went(
    kind: str, block: str, types: list[str]
) -> None:
    built = build(kind)
    ids = built.data(1)[0]["input_ids"]
    model = without(built.model, ids, block)
    assert model.config.layer_types == types
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(by_cache(model, ids), whole, rtol=1e-4, atol=1e-5)
    again = type(model)(model.config)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, whole)


@pytest.mark.parametrize("kind", ["granitemoehybrid", "jamba"])
def test_what_cannot_generate_any_more_is_refused(kind: str) -> None:
    """Its cache asks the first block of attention for its length."""
    built = build(kind)
    ids = built.data(1)[0]["input_ids"]
    spec = LayerSpec(drop=1, targets="model.layers.1")
    torchprune.sparsify(built.model, spec, [{"input_ids": ids}], progress=False)
    plan = torchprune.plan_shrink(built.model, {"input_ids": ids})
    before = described(built.model)
    with pytest.raises(ShrinkError, match=r"without model\.layers\.1 .* generates with its cache"):
        torchprune.shrink(built.model, plan)
    assert_as_it_was(built.model, before)


def test_other_logits_from_the_cache_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a block's place in the cache was not counted anew."""
    model, ids = llama(num_hidden_layers=4).eval(), FAMILIES["llama"].data(count=1)[0]
    torchprune.sparsify(model, LayerSpec(drop=1, targets="model.layers.1"), [ids], progress=False)
    plan = torchprune.plan_shrink(model, ids)
    before = described(model)

    def one_place(some: nn.Module, blocks: Any) -> Any:
        found = drop_blocks(some, blocks)
        for module in model.modules() if some is model else ():
            if hasattr(module, "layer_idx"):
                module.layer_idx = 0
        return found

    monkeypatch.setattr("torchprune.structure.without_blocks.drop_blocks", one_place)
    with pytest.raises(ShrinkError, match="cache"):
        torchprune.shrink(model, plan)
    assert_as_it_was(model, before)


# -- what counts ----------------------------------------------------------------------------------


class Part(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.whereabouts, self.nth, self.heads = place, place + 1, 4
        self.shift = 3 * place


class Owner(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(Part(i), nn.ReLU()) for i in range(count))
        self.kinds = list("abcdef"[:count])
        self.sizes = (1, 2)


@pytest.mark.parametrize("gone", [[0], [2, 3], [1, 4], [5]])
def test_places_and_lists_follow_by_what_they_are(gone: list[int]) -> None:
    model = Owner(6)
    kept = [i for i in range(6) if i not in gone]
    assert drop_blocks(model, [f"parts.{i}" for i in gone]) == {"parts": (6, set(gone))}
    parts = [block[0] for block in model.parts]
    assert [p.whereabouts for p in parts] == list(range(len(kept)))
    assert [p.nth for p in parts] == list(range(1, len(kept) + 1))
    assert [p.heads for p in parts] == [4] * len(kept)
    assert [p.shift for p in parts] == [3 * i for i in kept]
    assert model.kinds == ["abcdef"[i] for i in kept]
    assert model.sizes == (1, 2)
