"""Text that a language model adds to its own calibration data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from by_hand import assert_as_it_was, fingerprint, prune
from families import FAMILIES, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchprune
from torchprune import BestSpec, Reconstruct
from torchprune.calibration.batches import Batch
from torchprune.calibration.synthesis import continuations, windows_of
from torchprune.reports.report import runs_of


def ids_of(batch: Batch) -> Tensor:
    return batch.args[0] if batch.args else batch.kwargs["input_ids"]


def begins_with_a_piece(text: Tensor, windows: list[Tensor], piece: int) -> bool:
    start = text[:piece].tolist()
    return any(
        start == window[at : at + piece].tolist()
        for window in windows
        for at in range(len(window) - piece + 1)
    )


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    rows=st.integers(1, 3),
    count=st.integers(1, 20),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 9),
)
def test_continuations_begin_with_pieces_of_the_given_windows(
    lengths: list[int], rows: int, count: int, side: str, seed: int
) -> None:
    model = FAMILIES["llama"].make()
    real = [tokens(seed + i, 1, rows=1, length=n)[0][0] for i, n in enumerate(lengths)]
    widest = max(lengths)
    ids, mask = torch.zeros(len(real), widest, dtype=torch.int64), torch.zeros(len(real), widest)
    for i, window in enumerate(real):
        place = slice(0, len(window)) if side == "right" else slice(widest - len(window), None)
        ids[i, place], mask[i, place] = window, 1
    batches = [
        Batch((), {"input_ids": i, "attention_mask": m})
        for i, m in zip(ids.split(rows), mask.split(rows), strict=True)
    ]
    found = windows_of(batches)
    assert [w.tolist() for w in found] == [w.tolist() for w in real if len(w) > 1]
    made = continuations(model, batches, count, seed=seed, progress=False)
    if not found:
        assert made == []
        return
    assert sum(len(b.kwargs["input_ids"]) for b in made) == count
    assert all(len(b.kwargs["input_ids"]) == min(rows, len(real)) for b in made[:-1])
    long_ones = [w for w in found if 2 * len(w) >= widest]
    piece = min(map(len, long_ones)) // 2
    for batch in made:
        assert batch.kwargs["attention_mask"].all()
        assert batch.kwargs["attention_mask"].dtype == mask.dtype
        for text in batch.kwargs["input_ids"]:
            assert len(text) == widest
            assert begins_with_a_piece(text, long_ones, piece)


def test_continuations_take_the_form_of_what_was_given() -> None:
    model = FAMILIES["llama"].make().train()
    ids = tokens(count=1, rows=2, length=12)[0]
    forms: list[tuple[Batch, set[str]]] = [
        (Batch((ids,), {}), set()),
        (Batch((ids.int(),), {"attention_mask": torch.ones_like(ids)}), {"attention_mask"}),
        (Batch((), {"input_ids": ids, "labels": ids}), {"input_ids"}),
    ]
    torch.manual_seed(3)
    state, before = torch.get_rng_state(), fingerprint(model)
    texts = []
    for batch, names in forms:
        one, other = continuations(model, [batch], 3, progress=False)
        assert len(one.args) == len(batch.args)
        assert set(one.kwargs) == names
        texts.append(torch.cat([ids_of(one), ids_of(other)]))
        model(*one.args, **one.kwargs)
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert_as_it_was(model, before)
    again = continuations(model, [forms[0][0]], 3, seed=1, progress=False)
    assert not torch.equal(torch.cat([ids_of(b) for b in again]), texts[0])


def test_a_models_own_ways_of_generating_do_not_count() -> None:
    """Chat models come with penalties and cuts that are for answers, not for text as it is."""
    model = FAMILIES["llama"].make()
    given_ids = [Batch((ids,), {}) for ids in tokens(count=2)]
    plain = continuations(model, given_ids, 4, progress=False)
    for name, value in {
        "repetition_penalty": 9.0,
        "temperature": 0.1,
        "top_k": 1,
        "top_p": 0.1,
        "num_beams": 2,
    }.items():
        setattr(model.generation_config, name, value)
    again = continuations(model, given_ids, 4, progress=False)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(ids_of(one), ids_of(other))


def test_a_model_that_fails_to_write_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].make().train()

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(model), "generate", fail)
    for data in (None, tokens()):
        before = fingerprint(model)
        with pytest.raises(RuntimeError, match="out of memory"):
            prune(model, BestSpec(effort="max"), data)
        assert_as_it_was(model, before)
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "batch",
    [
        Batch((torch.randn(2, 12),), {}),
        Batch((torch.ones(12, dtype=torch.int64),), {}),
        Batch((torch.ones(2, 12, dtype=torch.int64), torch.ones(2, 12)), {}),
        Batch((), {"inputs_embeds": torch.randn(2, 12, 8)}),
        Batch((), {"inputs_embeds": torch.ones(2, 12, dtype=torch.int64)}),
        Batch((), {"input_ids": torch.ones(2, 12).long(), "position_ids": torch.ones(2, 12)}),
        Batch((), {"input_ids": torch.ones(2, 12).long(), "attention_mask": torch.ones(2, 4, 4)}),
    ],
)
def test_other_batches_are_not_continued(batch: Batch) -> None:
    assert windows_of([Batch((torch.ones(2, 12, dtype=torch.int64),), {}), batch]) == []
    assert continuations(FAMILIES["llama"].make(), [batch], 3, progress=False) == []


# -- the most effort ------------------------------------------------------------------------------


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in torchprune.fold(model).state_dict().items()}


def assert_same_weights(one: Any, other: Any) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


def test_max_puts_continuations_before_the_given_windows() -> None:
    """And is judged by what it would be judged by without them."""
    model = FAMILIES["llama"].make()
    other = copy.deepcopy(model)
    data = tokens(count=8, rows=2)
    prune(model, BestSpec(effort="max", pattern="2:4"), data, seed=4)
    own = continuations(other, [Batch((ids,), {}) for ids in data], 112, seed=4, progress=False)
    share = Reconstruct(held_out=1 / 64)
    assert round(share.held_out * 64) == round(Reconstruct().held_out * 8) == 1
    spec = BestSpec(pattern="2:4", alpha=0.25, reconstruct=share)
    prune(other, spec, [*map(ids_of, own), *data])
    assert_same_weights(model, other)
    notes = torchprune.report(model).notes
    assert "112 calibration windows more were sampled as continuations of 16" in notes


def test_max_where_nothing_can_be_added_uses_what_is_given() -> None:
    plenty = tokens(count=32, rows=4)
    cases = {"llama": plenty, "bert": None, "vit": None, "t5": None}
    for name, given_data in cases.items():
        family = FAMILIES[name]
        model = family.make()
        other = copy.deepcopy(model)
        data = given_data or family.data(count=4)
        prune(model, BestSpec(effort="max"), data)
        prune(other, BestSpec(alpha=0.25), data)
        assert_same_weights(model, other)
        noted = any("no text was added" in note for note in torchprune.report(model).notes)
        assert noted == (given_data is None), name


def test_max_without_data_samples_all_windows() -> None:
    model = FAMILIES["llama"].make()
    prune(model, BestSpec(effort="max", reconstruct=Reconstruct(epochs=1)))
    assert torchprune.report(model).sparsity == 0.5
    assert runs_of(model)[0].batches == 128
