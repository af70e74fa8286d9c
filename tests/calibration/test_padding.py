"""Padding does not count: not its content, and as if each sentence had come by itself."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import inputs_of
from families import FAMILIES, VOCABULARY, bert, llama, mixtral, tokens
from hypothesis import example, given
from hypothesis import strategies as st
from padded import (
    CASES,
    PAD,
    REAL,
    Attention,
    Case,
    Listed,
    Small,
    agreeing,
    assert_nothing_leaks,
    counted,
    padded,
    pruned,
    with_pad_of,
)
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import ADMMSpec, LayerSpec, NeuronSpec, Reconstruct, SparseGPTSpec, WandaSpec
from torchprune.calibration.batches import read_batches
from torchprune.calibration.padding import Padding
from torchprune.errors import CalibrationError

# -- the law over families -------------------------------------------------------------------------


def _exact(case: Case) -> bool:
    return case.name != "convolved wide"  # its padding reaches tokens


SAID = [case for case in CASES if _exact(case)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "case",
    sample(
        SAID, "llama", "deepseek", "sequence first", "convolved", "t5", "bart as long", "listed"
    ),
    ids=str,
)
def test_the_embedding_of_padding_does_not_matter(case: Case, side: str) -> None:
    made = assert_nothing_leaks(case.make(), case.data(side), WandaSpec())
    assert not any("padding" in note for note in torchprune.report(made).notes)


@pytest.mark.parametrize(
    "spec",
    [
        WandaSpec(sequential="block"),
        WandaSpec(sequential="none"),
        SparseGPTSpec(),
        ADMMSpec(alpha=0.25, steps=1, ramp=1),
        SparseGPTSpec(reconstruct=Reconstruct(1)),
        SparseGPTSpec(reconstruct=Reconstruct(1, alpha=0.5)),
        SparseGPTSpec(reconstruct=Reconstruct(1, alpha=1)),
    ],
    ids=["block", "none", "sparsegpt", "alpha", "training", "training halfway", "training dense"],
)
@pytest.mark.parametrize("case", sample(SAID, "listed"), ids=str)
def test_however_it_is_calibrated(case: Case, spec: Any) -> None:
    assert_nothing_leaks(case.make(), case.data("left"), spec)


def test_trained_weights_do_not_depend_on_padding() -> None:
    spec, model = SparseGPTSpec(reconstruct=Reconstruct(2)), FAMILIES["llama"].make()
    one, two = (pruned(with_pad_of(model, s), [padded()], spec) for s in (0.02, 1.0))
    for (name, first), second in zip(
        one.state_dict().items(), two.state_dict().values(), strict=True
    ):
        if "embed" not in name and "head" not in name:
            assert torch.equal(first, second), name


def test_holding_activations_in_sixteen_bits() -> None:
    model = llama(hidden_size=64, intermediate_size=96).eval()
    data = [padded(lengths=(64, 40, 13)), padded(seed=5, lengths=(64, 40, 13))]
    assert_nothing_leaks(model, data, WandaSpec(), hold=torch.bfloat16)


@pytest.mark.parametrize("spec", [NeuronSpec(0.5), LayerSpec(1)], ids=["neurons", "blocks"])
def test_whole_units(spec: Any) -> None:
    model = llama(num_hidden_layers=3).eval()
    assert_nothing_leaks(model, [padded("left"), padded("right", seed=4)], spec)


def test_programs() -> None:
    batch = padded("right")
    model = with_pad_of(bert().eval(), 1.0)
    found = []
    for scale in (0.02, 1.0):
        program = torch.export.export(with_pad_of(model, scale), (), batch)
        made = torchprune.sparsify(program, WandaSpec(), [batch], progress=False)
        found.append(made.state_dict)
    masks = [name for name in found[0] if "mask" in name and "attention" not in name]
    for name in found[0]:
        if "embed" not in name:
            assert torch.equal(found[0][name], found[1][name]), name
    assert masks or len(found[0])


# -- an oracle: sentences one by one ---------------------------------------------------------------


def wanda_by_hand(model: nn.Module, sentences: list[Any]) -> dict[str, Tensor]:
    """Per layer, the squares of what unpadded sentences let it read, of the dense model."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = inputs_of(model, names, sentences)
    return {
        name: sum(x.flatten(0, -2).double().square().sum(0) for x in xs)  # type: ignore[misc]
        for name, xs in found.items()
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("build", [llama, lambda: Small(Listed)], ids=["llama", "listed"])
def test_statistics_are_those_of_the_sentences_alone(
    build: Callable[[], nn.Module], side: str
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = with_pad_of(build().eval(), 1.0)
    batch = padded(side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if isinstance(model, Small):  # a place counts from the left
        model.place.weight.data.zero_()
    alone = [row[keep.bool()][None] for row, keep in zip(ids, mask, strict=True)]
    wanted = wanda_by_hand(model, alone)
    spec = torchprune.ScoreSpec(score=lambda w, x: _noted(w, x, found), sequential="none")
    found: dict[str, Tensor] = {}
    pruned(model, [batch], spec)
    assert len(found) > 8
    for name, square in found.items():
        torch.testing.assert_close(square.double(), wanted[name], rtol=1e-4, atol=1e-7, msg=name)


def _noted(weight: Tensor, moments: Any, found: dict[str, Tensor]) -> Tensor:
    found[moments.layer] = moments.square.clone()
    return weight.abs() * moments.square.sqrt()


@pytest.mark.parametrize("build", [mixtral, lambda: Small(Listed)], ids=["fused", "listed"])
def test_every_token_is_counted_by_as_many_experts_as_it_was_sent_to(
    build: Callable[[], nn.Module],
) -> None:
    model = with_pad_of(build().eval(), 1.0)
    made = pruned(model, [padded(), padded("left", seed=7)], WandaSpec())
    read = counted(made)
    if isinstance(model, Small):
        for block in range(2):
            one, two = (
                sum(n or 0 for name, n in read.items() if f"mix.{block}." in name and name[-1] == i)
                for i in ("0", "2")
            )
            assert one == two == 2 * 2 * REAL
    else:
        experts = {n for name, n in read.items() if "experts" in name}
        assert experts == {2 * 2 * REAL}


@pytest.mark.filterwarnings("ignore:.*no (calibration batch|tokens) reached it")
@pytest.mark.parametrize("seed", sample(range(3), "0"))
def test_experts_that_padding_alone_is_sent_to(seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Small(lambda: Listed(24)).eval()
    data = [padded(lengths=(5, 2), seed=seed)]
    for spec in (WandaSpec(), WandaSpec(sequential="none")):
        made = assert_nothing_leaks(model, data, spec)
        for block in range(2):
            own = [(n or 0) for name, n in counted(made).items() if f"mix.{block}.experts" in name]
            assert sum(own) == 2 * 2 * 7
            assert not all(own)


# -- batches without padding -----------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, **batch: Any) -> Any:
        self.calls += 1
        return self.model(**batch)


@pytest.mark.parametrize("spec", [WandaSpec(), WandaSpec(sequential="none")])
def test_batches_without_padding_run_once(spec: Any) -> None:
    ids = tokens(count=3)
    whole = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    with_mask, without = (Counting(llama()).eval() for _ in range(2))
    without.load_state_dict(with_mask.state_dict())
    torchprune.sparsify(with_mask, spec, whole, progress=False)
    torchprune.sparsify(without, spec, [{"input_ids": x} for x in ids], progress=False)
    assert with_mask.calls == without.calls == 3
    assert agreeing(with_mask, without) == 1.0


def test_a_padded_batch_runs_twice() -> None:
    model = Counting(llama()).eval()
    unpadded = {"input_ids": tokens()[0], "attention_mask": torch.ones(2, 12).long()}
    torchprune.sparsify(model, WandaSpec(), [unpadded, padded()], progress=False)
    assert model.calls == 3


# -- what the user says ----------------------------------------------------------------------------


def _mask_column(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"input_ids": batch["input_ids"], "real": batch["attention_mask"]}


@pytest.mark.parametrize(
    "given",
    ["real", lambda batch: batch["real"], [padded()["attention_mask"].bool()]],
    ids=["a column", "a function", "a list"],
)
def test_the_user_says_what_is_padding(given: Any) -> None:
    data = [_mask_column(padded())]
    made = assert_nothing_leaks(llama().eval(), data, WandaSpec(), token_mask=given)
    assert set(counted(made).values()) == {REAL}


def test_a_mask_of_tokens_that_others_read() -> None:
    batch = {"input_ids": tokens(1, 1, rows=2)[0]}
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, :5] = False  # only the answers, which look back at the questions
    made = pruned(llama().eval(), [batch], WandaSpec(), token_mask=[mask])
    assert set(counted(made).values()) == {14}
    assert torchprune.report(made).notes == []


def test_a_mask_of_the_users_overrides() -> None:
    whole = torch.ones(3, 12, dtype=torch.bool)
    made = pruned(llama().eval(), [padded()], WandaSpec(), token_mask=[whole])
    assert set(counted(made).values()) == {36}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("loss_mask", r"batch 0 has no column 'loss_mask'; it has 'input_ids', 'attention_mask'"),
        ([], "has 0 masks, but there is a batch 0"),
        (lambda batch: batch["input_ids"], r"shape \(3, 12\) and torch.int64; expected"),
        (lambda batch: "all", "is a str, not a tensor"),
    ],
)
def test_masks_that_are_none(given: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        pruned(llama().eval(), [padded()], WandaSpec(), token_mask=given)


def test_padding_that_cannot_be_told_is_said() -> None:
    class Particular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            if not bool((input_ids[attention_mask == 0] == PAD).all()):
                raise ValueError("padding must be zeros")
            return self.model(input_ids=input_ids, attention_mask=attention_mask)

    made = pruned(Particular().eval(), [padded()], WandaSpec())
    (note,) = torchprune.report(made).notes
    assert "all rows counted, padding too" in note
    assert "token_mask" in note
    assert set(counted(made).values()) == {36}


# -- shadows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_shadow_differs_at_the_padding_alone(side: str) -> None:
    model, batch = llama(), padded(side)
    padding = Padding(model, read_batches([batch], model, 1).batches)
    assert padding.shadowed() == [0]
    other = padding.shadow(0).kwargs
    differ = other["input_ids"] != batch["input_ids"]
    assert torch.equal(differ, batch["attention_mask"] == 0)
    assert torch.equal(other["attention_mask"], batch["attention_mask"])
    assert bool(torch.isin(other["input_ids"][differ], batch["input_ids"]).all())


def test_a_shadow_that_a_model_refuses_is_made_anew() -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.tries = llama(), 0

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            self.tries += 1
            if self.tries == 1:
                raise ValueError("no such image")
            return self.model(input_ids=input_ids, attention_mask=attention_mask)

    model = Refuses().eval()
    torchprune.sparsify(model, WandaSpec(), [padded()], progress=False)
    assert set(counted(model).values()) == {REAL}


def test_attention_that_sees_padding_falls_back_on_the_mask() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 16)
            self.attend, self.out = Attention(16), nn.Linear(16, 16)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.out(self.attend(self.embed(input_ids), None))

    made = pruned(copy.deepcopy(Blind()).eval(), [padded()], WandaSpec())
    read = counted(made)
    assert set(read.values()) == {REAL}
    (note,) = torchprune.report(made).notes
    assert note.startswith("attend.out, out: padding reaches")


def test_every_family_takes_padding_or_none() -> None:
    for name in ("gpt2", "opt", "gemma"):
        made = assert_nothing_leaks(FAMILIES[name].make(), [padded("left")], WandaSpec())
        assert set(counted(made).values()) == {REAL}, name


_model = functools.cache(llama)


@given(
    noisy=st.lists(st.booleans(), min_size=24, max_size=24),
    apart=st.sampled_from([0.0, 1e-7, 1.0]),
    seed=st.integers(0, 99),
)
@example(noisy=[row == 17 for row in range(24)], apart=0.0, seed=0)
@example(noisy=[row in (17, 19) for row in range(24)], apart=0.0, seed=0)
def test_rounding_leaves_no_token_out(noisy: list[bool], apart: float, seed: int) -> None:
    """Behind routed experts rows round otherwise in the shadow, also where those of padding hold
    nothing of it, as where a recurrent layer reads zeros there."""
    generator = torch.Generator().manual_seed(seed)
    batch = padded(lengths=(12, 8))
    padding = Padding(_model(), read_batches([batch], _model(), 1).batches)
    rows = torch.randn(24, 16, generator=generator)
    rounding = 1e-7 * torch.randn(24, 16, generator=generator)
    pads = (batch["attention_mask"] == 0).reshape(-1)
    other = rows + rounding * (torch.tensor(noisy) & ~pads).unsqueeze(1)
    other[pads] += apart * torch.randn(4, 16, generator=generator)
    padding.note(0, "x", 0, [other])
    (found,) = padding.tokens(0, "x", 0, [rows], "x", loose=False)
    if found is not None:
        assert bool(found[~pads].all())
    if apart == 1.0:
        assert found is not None
        assert torch.equal(found, ~pads)
