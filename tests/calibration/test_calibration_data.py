"""Calibration data: forms of batches, padding, memory, models that write their own."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from by_hand import (
    Spec,
    assert_as_it_was,
    fingerprint,
    prune,
)
from families import FAMILIES, llama, tokens
from torch import Tensor, nn

import torchprune
from torchprune import ADMMSpec, Reconstruct, SparseGPTSpec, WandaSpec
from torchprune.errors import CalibrationError, SpecError

# -- data -----------------------------------------------------------------------------------------


class Keyed(nn.Module):
    """A model that takes its inputs by position or by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.two(self.one(x if shift is None else x + shift).relu())


def test_batches_come_in_any_form() -> None:
    from transformers import BatchEncoding

    xs, shift = torch.randn(3, 4, 8), torch.ones(8)
    forms: dict[str, list[Any]] = {
        "tensor": [x + shift for x in xs],
        "tuple": [(x, shift) for x in xs],
        "list": [[x, shift] for x in xs],
        "dict": [{"x": x, "shift": shift} for x in xs],
        "encoding": [BatchEncoding({"x": x, "shift": shift}) for x in xs],
    }
    model, found = Keyed(), {}
    for form, data in forms.items():
        other = copy.deepcopy(model)
        prune(other, WandaSpec(), data)
        found[form] = torchprune.masks(other)
    for form, kept in found.items():
        for name, mask in found["tensor"].items():
            assert torch.equal(kept[name], mask), (form, name)


def test_data_may_be_a_generator_or_endless() -> None:
    model, data = FAMILIES["mlp"].make(), FAMILIES["mlp"].data(count=4)
    copies = [copy.deepcopy(model) for _ in range(2)]
    prune(model, WandaSpec(), data)
    prune(copies[0], WandaSpec(), (x for x in data))
    drawn = []

    def endless() -> Iterator[Tensor]:
        while True:
            drawn.append(data[len(drawn) % 4])
            yield drawn[-1]

    prune(copies[1], WandaSpec(), endless(), max_batches=4)
    for other in copies:
        for name, mask in torchprune.masks(model).items():
            assert torch.equal(torchprune.masks(other)[name], mask)
    assert len(drawn) <= 5
    assert any("first 4 batches" in note for note in torchprune.report(copies[1]).notes)
    assert torchprune.report(model).notes == []


def test_a_loader_of_tokenised_text() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [t[0].tolist() for t in tokens(count=6, rows=1)]
    masks = [[1] * 12 for _ in rows]
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": masks})
    loader = torch.utils.data.DataLoader(dataset.with_format("torch"), batch_size=2)
    model = FAMILIES["llama"].make()
    other = copy.deepcopy(model)
    prune(model, WandaSpec(), loader)
    prune(other, WandaSpec(), [torch.tensor(rows[i : i + 2]) for i in (0, 2, 4)])
    assert {y.tokens for y in torchprune.report(model).layers} == {72}
    for name, mask in torchprune.masks(other).items():
        assert torch.equal(torchprune.masks(model)[name], mask)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(2, 16), r"one tensor \(2, 16\).*for one batch: \[data\]"),
        ("some text", "data is a str; texts need the model's tokenizer"),
        ({"input_ids": torch.ones(2, 16)}, "data is a dict; data must be an iterable of batches"),
        (7, "data is a int; data must be an iterable of batches"),
        ([], "holds no batches"),
        (iter(()), "holds no batches"),
        (
            ["text", "more text"],
            r"a batch is text \(str\); .*tokenizer=tokenizer\), or .*text_batches",
        ),
        ([None], "a batch is a NoneType"),
    ],
    ids=["tensor", "str", "dict", "int", "empty", "exhausted", "strings", "none"],
)
def test_data_that_cannot_be_read(data: Any, message: str) -> None:
    model = FAMILIES["mlp"].make()
    before = fingerprint(model)
    with pytest.raises(CalibrationError, match=message):
        prune(model, WandaSpec(), data)
    assert_as_it_was(model, before)


def test_max_batches_must_be_positive() -> None:
    with pytest.raises(CalibrationError, match="max_batches must be at least 1, got 0"):
        prune(FAMILIES["mlp"].make(), WandaSpec(), FAMILIES["mlp"].data(), max_batches=0)


# -- padding --------------------------------------------------------------------------------------


class PerToken(nn.Module):
    """A model without mixing between tokens, that knows no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.one(x)


@pytest.mark.parametrize("flat", [False, True])
def test_padding_rows_do_not_count_at_all(flat: bool) -> None:
    model, x = PerToken(), torch.randn(2, 6, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    other = copy.deepcopy(model)
    padded = torch.where(mask[..., None].bool(), x, 1e4)
    batch = {"x": padded.flatten(0, 1) if flat else padded, "attention_mask": mask}
    prune(model, SparseGPTSpec(), [batch])
    prune(other, SparseGPTSpec(), [x[mask.bool()]])
    assert torch.equal(model.one.weight, other.one.weight)
    assert torchprune.report(model).layers[0].tokens == 9


def padded_tokens(side: str) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Sequences of several lengths as padded batches, and one by one."""
    plain = [tokens(seed, 1, rows=1, length=n)[0] for seed, n in enumerate([12, 5, 9, 7])]
    batches = []
    for pair in (plain[:2], plain[2:]):
        width = max(t.shape[1] for t in pair)
        ids = torch.zeros(2, width, dtype=torch.long)
        mask = torch.zeros(2, width, dtype=torch.long)
        for row, t in enumerate(pair):
            place = slice(0, t.shape[1]) if side == "right" else slice(width - t.shape[1], width)
            ids[row, place], mask[row, place] = t[0], 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches, plain


def agreement(one: nn.Module, two: nn.Module) -> float:
    """Share of mask entries that agree."""
    first, second = torchprune.masks(one), torchprune.masks(two)
    same = sum(int((first[name] == second[name]).sum()) for name in first)
    return same / sum(mask.numel() for mask in first.values())


def test_padding_of_a_language_model_does_not_count() -> None:
    batches, plain = padded_tokens("right")
    one, two, three = (FAMILIES["llama"].make() for _ in range(3))
    prune(one, WandaSpec(), batches)
    prune(two, WandaSpec(), plain)
    prune(three, WandaSpec(), [batch["input_ids"] for batch in batches])
    assert {y.tokens for y in torchprune.report(one).layers} == {33}
    assert agreement(one, two) > 0.999  # up to the rounding of attention over another width
    assert agreement(three, two) < 0.99  # it would show


def test_padding_on_both_sides_of_an_encoder_decoder() -> None:
    model = FAMILIES["t5"].make()
    (batch, _), _ = padded_tokens("right")
    target = tokens(5, 1, length=6)[0]
    mask = torch.ones_like(target)
    mask[0, 2:] = 0
    prune(
        model,
        WandaSpec(),
        [{**batch, "decoder_input_ids": target, "decoder_attention_mask": mask}],
    )
    read = {y.name: y.tokens for y in torchprune.report(model).layers}
    encoder, decoder = 17, 8
    for name, count in read.items():
        crossing = name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert count == (encoder if name.startswith("encoder") or crossing else decoder), name


def test_a_batch_that_is_all_padding_adds_nothing() -> None:
    one, two = PerToken(), PerToken()
    two.load_state_dict(one.state_dict())
    x, yes, no = torch.randn(2, 6, 8), torch.ones(2, 6), torch.zeros(2, 6)
    real = {"x": x, "attention_mask": yes}
    prune(one, WandaSpec(), [real, {"x": x * 9, "attention_mask": no}])
    prune(two, WandaSpec(), [real])
    assert torch.equal(torchprune.masks(one)["one.weight"], torchprune.masks(two)["one.weight"])


# -- memory ---------------------------------------------------------------------------------------


def wide_llama() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return llama(hidden_size=64, intermediate_size=96).eval()


@pytest.mark.parametrize("method", [WandaSpec, SparseGPTSpec])
def test_holding_activations_in_sixteen_bits(method: type[Spec]) -> None:
    data = tokens(count=4, rows=4, length=32)
    one, two = wide_llama(), wide_llama()
    prune(one, method(), data)
    prune(two, method(), data, hold=torch.bfloat16)
    whole, half = (torchprune.report(m).peak_held_bytes for m in (one, two))
    assert 0 < half < 0.75 * whole
    assert 0.95 < agreement(one, two) < 1.0
    assert torchprune.report(two).sparsity == 0.5


@pytest.mark.parametrize(
    "spec",
    [
        WandaSpec(),
        ADMMSpec(alpha=0.25, steps=1, ramp=1),
        ADMMSpec(reconstruct=Reconstruct(1), steps=1, ramp=1),
        ADMMSpec(reconstruct=Reconstruct(1, alpha=0.5), steps=1, ramp=1),
    ],
    ids=["wanda", "dense runs", "training", "training halfway"],
)
def test_what_waits_grows_with_the_batches(spec: Spec) -> None:
    peaks = []
    for count in (4, 32):
        model = wide_llama()
        prune(model, spec, tokens(count=count, rows=4, length=32))
        peaks.append(torchprune.report(model).peak_held_bytes)
    assert 7 * peaks[0] < peaks[1] <= 8 * peaks[0]


TABLE_OF_NOBODY = """
import torch, torchprune

class Constant(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.one, self.two = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.read = lambda: table

    def forward(self, x):
        table = self.read()
        return self.two(self.one(x) + table)

table = torch.randn(64, 64)
before = table.clone()
data = list(torch.randn(3, 64, 64))
torchprune.sparsify(
    Constant(table), torchprune.WandaSpec(), data, progress=False, hold=torch.bfloat16
)
assert torch.equal(table, before)
"""


def test_holding_never_touches_tensors_that_no_module_owns() -> None:
    # In a process of its own: a storage emptied under a running batch would end the whole suite.
    done = subprocess.run([sys.executable, "-c", TABLE_OF_NOBODY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


TABLES_BY_LENGTH = """
import torch, torchprune

class Tables(torch.nn.Module):
    def __init__(self, cache):
        super().__init__()
        self.one, self.two = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.cache = cache

    def forward(self, x):
        if len(x) not in self.cache:
            self.cache[len(x)] = torch.full((len(x), 64), 1.001)
        return self.two(self.one(x) + self.cache[len(x)])

model = Tables({})
data = [torch.randn(n, 64) for n in (96, 64, 96, 64)]
torchprune.sparsify(model, torchprune.WandaSpec(), data, progress=False, hold=torch.bfloat16)
for table in model.cache.values():
    assert (table == torch.tensor(1.001)).all(), table
"""


def test_holding_never_touches_caches_made_on_the_way() -> None:
    script = TABLES_BY_LENGTH.replace(
        "return self", "table = self.cache[len(x)]\n        return self"
    )
    for code in (TABLES_BY_LENGTH, script):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


class Nested(nn.Module):
    """Takes its tensors in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.two(self.one(inputs["x"])) + inputs["x"]


def test_holding_never_touches_the_callers_nested_inputs() -> None:
    data = [({"x": x},) for x in torch.randn(3, 64, 64)]
    before = copy.deepcopy(data)
    prune(Nested(), WandaSpec(), data, hold=torch.bfloat16)
    for (now,), (then,) in zip(data, before, strict=True):
        assert torch.equal(now["x"], then["x"])


@pytest.mark.parametrize("hold", [torch.float32, torch.int8, "bfloat16"])
def test_hold_takes_sixteen_bit_floats(hold: Any) -> None:
    with pytest.raises(SpecError, match=r"hold must be None, torch\.bfloat16 or torch\.float16"):
        prune(FAMILIES["mlp"].make(), WandaSpec(), FAMILIES["mlp"].data(), hold=hold)


# -- without data ---------------------------------------------------------------------------------


def test_a_language_model_calibrates_on_its_own_text() -> None:
    model = FAMILIES["llama"].make().train()
    copies = [copy.deepcopy(model) for _ in range(2)]
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    prune(model, WandaSpec())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model.model.layers[0].mlp.training
    torch.manual_seed(6)
    prune(copies[0], WandaSpec())
    prune(copies[1], WandaSpec(), seed=1)
    assert agreement(model, copies[0]) == 1.0
    assert agreement(model, copies[1]) < 1.0
    assert any("sampled from the model itself" in n for n in torchprune.report(model).notes)
    assert torchprune.report(model).sparsity == 0.5


@pytest.mark.parametrize("family", ["bert", "t5", "mlp", "vit"])
def test_models_that_cannot_write_need_data(family: str) -> None:
    model = FAMILIES[family].make()
    before = fingerprint(model)
    with pytest.raises(
        CalibrationError, match=f"needs calibration data for a {type(model).__name__}"
    ):
        prune(model, WandaSpec())
    assert_as_it_was(model, before)


# -- odd models -----------------------------------------------------------------------------------


def test_a_compiled_model_is_calibrated_in_plain_python() -> None:
    model = FAMILIES["mlp"].make()
    other = copy.deepcopy(model)
    data = FAMILIES["mlp"].data()
    prune(torch.compile(model, backend="eager"), WandaSpec(), data)
    prune(other, WandaSpec(), data)
    assert agreement(model, other) == 1.0


def test_checkpointed_activations_do_not_disturb() -> None:
    model = FAMILIES["llama"].make()
    other = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    model.train()
    prune(model, WandaSpec(), tokens())
    prune(other, WandaSpec(), tokens())
    assert agreement(model, other) == 1.0


def test_a_progress_bar_counts_layers(capsys: pytest.CaptureFixture[str]) -> None:
    torchprune.sparsify(FAMILIES["mlp"].make(), WandaSpec(), FAMILIES["mlp"].data())
    assert "3/3" in capsys.readouterr().err
    prune(FAMILIES["mlp"].make(), WandaSpec(), FAMILIES["mlp"].data())
    assert capsys.readouterr().err == ""


def test_nothing_is_warned_about_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(FAMILIES["llama"].make(), SparseGPTSpec(), tokens())


class Keeps(nn.Module):
    """Its forward has its input, a parameter and two activations at hand where the last waits."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        size = self.one.bias
        y = self.one(x)
        z = torch.relu(y)
        result: Tensor = self.two(z) + x + y.sum() + size.sum()
        return result


def test_only_activations_count_as_held() -> None:
    model = Keeps()
    torchprune.sparsify(model, WandaSpec(), [torch.randn(5, 8) for _ in range(3)], progress=False)
    assert torchprune.report(model).peak_held_bytes == 3 * 2 * (5 * 16 * 4)
