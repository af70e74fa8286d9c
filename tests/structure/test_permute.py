"""Permuting channels before n:m masks: the same function, the same weights, more of them kept."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import assert_as_it_was, fingerprint, prune
from families import FAMILIES, llama, tokens
from hypothesis import given
from hypothesis import strategies as st
from structures import close, outputs
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, RIASpec, SparseGPTSpec, WandaSpec
from torchprune.errors import ShrinkError, SpecError
from torchprune.masking.matrices import view_of
from torchprune.masking.selection import layers_of
from torchprune.methods.permute import best_order, retained
from torchprune.reports.report import runs_of
from torchprune.specs.patterns import NM
from torchprune.structure import reorder as driver
from torchprune.structure.channels import Place

PATTERNS = [NM(1, 2), NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8)]
TWO_FOUR = WandaSpec(pattern="2:4", permute=True)


# -- the search -----------------------------------------------------------------------------------


def kept_of(score: Tensor, pattern: NM) -> float:
    """The oracle of `retained`: every group of every row sorted by itself, in Python's floats."""
    return sum(
        sum(sorted(row[at : at + pattern.m])[-pattern.n :])
        for row in score.double().tolist()
        for at in range(0, len(row), pattern.m)
    )


@st.composite
def scores(draw: st.DrawFn) -> tuple[Tensor, NM]:
    pattern = draw(st.sampled_from(PATTERNS))
    rows, groups = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    score = torch.rand(rows, groups * pattern.m, generator=generator) ** draw(st.integers(1, 6))
    if draw(st.booleans()):
        score = (score * 3).round()  # ties and zeros
    return score, pattern


@given(scores())
def test_an_order_is_a_permutation_and_never_retains_less(case: tuple[Tensor, NM]) -> None:
    score, pattern = case
    order = best_order(score, pattern)
    assert sorted(order.tolist()) == [*range(score.shape[1])]
    before, after = kept_of(score, pattern), kept_of(score[:, order], pattern)
    assert after >= before
    if after == before:
        assert order.tolist() == sorted(order.tolist())
    assert retained(score, pattern) == pytest.approx(before, rel=1e-6)
    assert torch.equal(best_order(score.clone(), pattern), order)
    inside = order.view(-1, pattern.m)
    assert torch.equal(inside, inside.sort(dim=1).values)


def best_split(score: Tensor) -> float:
    """The most that 2:4 retains of 8 columns: all 35 ways to make two groups of four."""
    splits = ((0, *rest) for rest in itertools.combinations(range(1, 8), 3))
    return max(
        kept_of(score[:, [*one, *(c for c in range(8) if c not in one)]], NM(2, 4))
        for one in splits
    )


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_two_groups_come_within_three_percent_of_the_best(seed: int, rows: int) -> None:
    score = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)).square()
    found = kept_of(score[:, best_order(score, NM(2, 4))], NM(2, 4))
    assert found >= 0.97 * best_split(score)


def test_two_groups_are_nearly_always_the_best() -> None:
    exact = 0
    for seed in range(40):
        score = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)).square()
        found = kept_of(score[:, best_order(score, NM(2, 4))], NM(2, 4))
        exact += found >= best_split(score) * (1 - 1e-9)
    assert exact >= 36


def test_exchanges_find_what_dealing_out_by_size_does_not() -> None:
    """Every row has its own two large columns in each planted group; all columns sum to the same,
    so their totals tell nothing."""
    generator = torch.Generator().manual_seed(3)
    rows, groups = 24, 8
    large = torch.rand(rows, groups, 4, generator=generator).argsort(2) < 2
    score = 0.01 + large.float().reshape(rows, -1)
    score /= score.sum(0)
    hidden = score[:, torch.randperm(4 * groups, generator=generator)]
    order = best_order(hidden, NM(2, 4))
    planted, start = retained(score, NM(2, 4)), retained(hidden, NM(2, 4))
    # a local search need not find the planted order, but it goes most of the way
    assert retained(hidden[:, order], NM(2, 4)) > start + 0.5 * (planted - start)


def test_an_order_that_nothing_betters_stays() -> None:
    """The search, which starts elsewhere, does not come back to the one planted order."""
    generator = torch.Generator().manual_seed(3)
    score = (torch.rand(24, 80, 4, generator=generator).argsort(2) < 2).float().reshape(24, -1)
    assert retained(score, NM(2, 4)) == score.sum()
    assert best_order(score, NM(2, 4)).tolist() == [*range(320)]


def test_more_groups_than_are_exchanged_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(2, 2 * 600, generator=generator) ** 4
    order = best_order(score, NM(1, 2))
    assert sorted(order.tolist()) == [*range(1200)]
    assert retained(score[:, order], NM(1, 2)) > 1.1 * retained(score, NM(1, 2))


def test_scores_that_are_not_finite_leave_the_order() -> None:
    score = torch.rand(3, 16)
    score[1, 4] = torch.inf
    assert best_order(score, NM(2, 4)).tolist() == [*range(16)]


# -- what moved -----------------------------------------------------------------------------------


def orders(old: Tensor, new: Tensor, axis: int) -> list[int]:
    """Which index of `old` each index of `new` along an axis is, bit for bit."""
    rows = [t.movedim(axis, 0).reshape(t.shape[axis], -1).contiguous() for t in (old, new)]
    known = {bytes(row.view(torch.uint8).numpy()): i for i, row in enumerate(rows[0])}
    assert len(known) == len(rows[0]), "slices must differ for the test to tell them apart"
    found = [known[bytes(row.view(torch.uint8).numpy())] for row in rows[1]]
    assert sorted(found) == [*range(len(found))]
    return found


def permuted(
    model: nn.Module, data: list[Any], spec: torchprune.specs.Spec = TWO_FOUR
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """The model permuted but dense again; its tensors before and after."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prune(model, spec, data)
    torchprune.densify(model)
    return model, before, dict(model.state_dict())


def test_llama_moves_neurons_and_values_and_nothing_else() -> None:
    model = llama(num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    _, old, new = permuted(model, tokens())
    moved = set()
    for i in range(2):
        block = f"model.layers.{i}"
        mlp = [
            orders(old[k], new[k], axis)
            for k, axis in (
                (f"{block}.mlp.gate_proj.weight", 0),
                (f"{block}.mlp.up_proj.weight", 0),
                (f"{block}.mlp.down_proj.weight", 1),
            )
        ]
        assert mlp[0] == mlp[1] == mlp[2] != [*range(48)]
        key = f"{block}.self_attn.v_proj.weight"
        values = torch.tensor(orders(old[key], new[key], 0)).view(4, 8)
        key = f"{block}.self_attn.o_proj.weight"
        read = torch.tensor(orders(old[key], new[key], 1)).view(4, 2, 8)
        within = values - 8 * torch.arange(4)[:, None]
        assert torch.equal(within // 8, torch.zeros_like(within))  # each head keeps its own
        heads = torch.arange(8).view(4, 2, 1)
        assert torch.equal(read - 8 * heads, within[:, None].expand(4, 2, 8))
        assert len({tuple(row) for row in within.tolist()}) > 1  # heads have orders of their own
        names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.v_proj")
        moved |= {f"{block}.{n}.weight" for n in (*names, "self_attn.o_proj")}
    for key in old:
        assert torch.equal(old[key], new[key]) == (key not in moved), key


def test_gpt2_moves_the_value_part_of_a_fused_projection_and_biases() -> None:
    family = FAMILIES["gpt2"]
    model = family.make()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    _, old, new = permuted(model, family.data())
    block = "transformer.h.0"
    up = orders(old[f"{block}.mlp.c_fc.weight"], new[f"{block}.mlp.c_fc.weight"], 1)
    assert up == orders(old[f"{block}.mlp.c_fc.bias"], new[f"{block}.mlp.c_fc.bias"], 0)
    assert up == orders(old[f"{block}.mlp.c_proj.weight"], new[f"{block}.mlp.c_proj.weight"], 0)
    assert up != [*range(128)]
    qkv = orders(old[f"{block}.attn.c_attn.weight"], new[f"{block}.attn.c_attn.weight"], 1)
    assert qkv == orders(old[f"{block}.attn.c_attn.bias"], new[f"{block}.attn.c_attn.bias"], 0)
    read = orders(old[f"{block}.attn.c_proj.weight"], new[f"{block}.attn.c_proj.weight"], 0)
    assert qkv == [*range(64), *(64 + i for i in read)]
    assert read != [*range(32)]


def test_every_expert_has_an_order_of_its_own() -> None:
    family = FAMILIES["mixtral"]
    _, old, new = permuted(family.make(), family.data())
    up, down = (f"model.layers.0.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj"))
    seen = set()
    for expert in range(4):
        read = orders(old[down][expert], new[down][expert], 1)
        made = orders(old[up][expert], new[up][expert], 0)
        assert made == [*read, *(48 + i for i in read)]
        seen.add(tuple(read))
    assert len(seen) == 4
    key = "model.layers.0.mlp.gate.weight"
    assert torch.equal(old[key], new[key])


@pytest.mark.parametrize("name", ["opt", "gpt2", "mixtral"])
def test_the_function_stays_and_patterns_are_exact(name: str) -> None:
    family = FAMILIES[name]
    dtype = torch.float32 if name == "mixtral" else torch.float64  # torch's grouped product
    model, data = family.make(dtype), family.data(dtype, count=2)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    want = [outputs(model, batch) for batch in data]
    prune(model, TWO_FOUR, data)
    found = torchprune.masks(model)
    for layer in layers_of(model):
        if layer.key in found:
            mask = found[layer.key]
            lanes = view_of(layer.module, mask.shape).to_matrix(mask).reshape(-1, 4)
            assert bool((lanes.sum(1) == 2).all()), layer.name
    (run,) = runs_of(model)
    assert run.notes[0].startswith("permuted inputs; retained share of squared scores: ")
    torchprune.densify(model)
    for batch, before in zip(data, want, strict=True):
        assert close(outputs(model, batch), before, 1e-5 if name == "mixtral" else 1e-12)


class Gated(nn.Module):
    """A Llama's MLP in whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).relu() * self.up(x))


class Attention(nn.Module):
    """Attention in whole numbers: scores are cut at zero, not exponentiated. Grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = self.q(x).view(rows, length, 4, 8).transpose(1, 2)
        kv = self.kv(x).view(rows, length, 2, 2, 8).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(2, dim=1) for t in kv.unbind(0))
        mixed = (q @ k.transpose(2, 3)).relu() @ v
        return self.o(mixed.transpose(1, 2).reshape(rows, length, 32))


class Rolled(nn.Module):
    """Neurons meet those of the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h * torch.cat([h[..., 8:], h[..., :8]], -1).relu())


class Turned(nn.Module):
    """Neurons are read in another order than they are made in."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu().repeat(1, 1, 2)[..., 2:18])


class TwoReaders(nn.Module):
    """Two layers read the same neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.up(x).relu()
        return self.one(h), self.two(h * h)


def whole(make: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, list[Tensor]]:
    """A model and batches of small whole numbers in float64: every sum is exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    model = make().double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randint(-9, 10, parameter.shape, generator=generator).double()
    shape = (2, 5, 8)
    return model, [torch.randint(-3, 4, shape, generator=generator).double() for _ in range(2)]


@pytest.mark.parametrize("make", [Gated, Attention, TwoReaders, Turned])
def test_sums_of_whole_numbers_are_bit_equal(make: Callable[[], nn.Module]) -> None:
    model, data = whole(make, 0)
    want = [outputs(model, x) for x in data]
    _, old, new = permuted(model, data)
    assert any(not torch.equal(old[k], new[k]) for k in old)
    for x, before in zip(data, want, strict=True):
        for got, wanted in zip(outputs(model, x), before, strict=True):
            assert torch.equal(got, wanted)


def test_what_two_layers_read_has_one_order() -> None:
    model, data = whole(TwoReaders, 2)
    _, old, new = permuted(model, data)
    found = [orders(old[f"{k}.weight"], new[f"{k}.weight"], 1) for k in ("one", "two")]
    assert found[0] == found[1] == orders(old["up.weight"], new["up.weight"], 0) != [*range(16)]


def test_units_of_two_neurons_move_in_whole_or_not_at_all() -> None:
    model, data = whole(Rolled, 0)
    want = outputs(model, data[0])
    permuted(model, data)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, data[0]), want, strict=True))


@pytest.mark.parametrize("spec", [MagnitudeSpec, RIASpec])
def test_masks_of_the_layers_before_only_have_rows_moved(spec: Any) -> None:
    """Producers are n:m pruned along their own inputs, which stay. Read off a model where they see
    the same inputs either way."""
    model, data = whole(Gated, 5)
    model = model.float()
    data = [x.float() for x in data]
    plain = copy.deepcopy(model)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    prune(model, spec(pattern="2:4", permute=True), data)
    prune(plain, spec(pattern="2:4"), data)
    moved, stayed = torchprune.masks(model), torchprune.masks(plain)
    torchprune.densify(model)
    rows = orders(old["gate.weight"], model.state_dict()["gate.weight"], 0)
    assert rows != [*range(24)]
    for name in ("gate.weight", "up.weight"):
        assert torch.equal(moved[name], stayed[name][rows])


def test_the_noted_gain_is_what_the_masks_retain() -> None:
    plain, model = whole(Gated, 7)[0], whole(Gated, 7)[0]
    data = whole(Gated, 7)[1]
    prune(plain, MagnitudeSpec(pattern="2:4"))
    prune(model, MagnitudeSpec(pattern="2:4", permute=True), data)
    total = float(whole(Gated, 7)[0].down.weight.detach().square().sum())
    kept = (m.down.weight.detach().square().sum() for m in (plain, model))
    before, after = (float(k) / total for k in kept)
    assert after > before
    assert f"down {before:.4f} -> {after:.4f}" in runs_of(model)[0].notes[0]


def test_methods_that_change_weights() -> None:
    model, data = whole(Gated, 3)
    model = model.float()
    data = [x.float() for x in data]
    want = outputs(model, data[0])
    spec = SparseGPTSpec(pattern="2:4", permute=True)
    prune(model, spec, data, keep_dense=True)
    assert model.down.parametrizations.weight[0].mask.view(-1, 4).sum(1).eq(2).all()
    assert runs_of(model)[0].notes[0].startswith("permuted")
    torchprune.densify(model)
    assert close(outputs(model, data[0]), want, 1e-5)


# -- what must stay -------------------------------------------------------------------------------


class Halves(nn.Module):
    """Half of the neurons go through one function and half through another."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        one, two = h.split([4, 12], -1)
        return self.down(torch.cat([one.relu(), two.square()], -1))


class Crossed(nn.Module):
    """Units of two neurons in `up` and two in `other`, which meet crosswise in the first unit."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.other = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down, self.low = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h, k = self.up(x), self.other(x)
        met = h * k.repeat(1, 1, 2)[..., 1:17]
        return self.down(met) + self.low(k[..., :8] * k[..., 8:])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.other, self.low = nn.Linear(8, 16), nn.Linear(16, 8)
        self.other.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()) + self.low(self.other(x).square())


class Watched(Attention):
    """Something else sees the values."""

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = self.q(x).view(rows, length, 4, 8).transpose(1, 2)
        kv = self.kv(x).view(rows, length, 2, 2, 8).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(2, dim=1) for t in kv.unbind(0))
        mixed = (q @ k.transpose(2, 3)).relu() @ v
        return self.o(mixed.transpose(1, 2).reshape(rows, length, 32)) + v[:, 1].relu()


class KeysAreValues(Attention):
    """One projection makes both keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = self.q(x).view(rows, length, 4, 8).transpose(1, 2)
        k = self.kv(x).view(rows, length, 4, 8).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, k)
        return self.o(mixed.transpose(1, 2).reshape(rows, length, 32))


class Weighed(Attention):
    """What attention gives is weighed channel by channel before it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = self.q(x).view(rows, length, 4, 8).transpose(1, 2)
        v = self.kv(x).view(rows, length, 4, 8).transpose(1, 2)
        mixed = (q @ q.transpose(2, 3)).relu() @ v
        return self.o(mixed.transpose(1, 2).reshape(rows, length, 32) * self.weights)


@pytest.mark.filterwarnings("ignore:covered")  # tied weights stay dense
@pytest.mark.parametrize(
    ("make", "layer", "why"),
    [
        (Halves, "down", "its inputs do not all pass through the same operators"),
        (Crossed, "down", "its inputs do not all pass through the same operators"),
        (Tied, "down", "up.weight shares its memory with other.weight"),
        (Watched, "o", "its inputs are "),
        (KeysAreValues, "o", "its inputs are "),
        (Weighed, "o", "its inputs are "),
    ],
)
def test_left_alone_and_said_so(make: Callable[[], nn.Module], layer: str, why: str) -> None:
    model, data = whole(make, 0)
    want = outputs(model, data[0])
    _, old, new = permuted(model, data)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, data[0]), want, strict=True))
    assert all(torch.equal(old[k], new[k]) for k in old)
    said = [n for n in runs_of(model)[0].notes if n.startswith("not permuted") and layer in n]
    assert any(why in note for note in said), runs_of(model)[0].notes


def test_groups_that_reach_across_heads_stay() -> None:
    model = llama(num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    spec = WandaSpec(pattern="4:8", permute=True)
    _, old, new = permuted(model, tokens(), spec)
    key = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(old[key], new[key])
    assert any("groups of its pattern reach across" in n for n in runs_of(model)[0].notes)


def test_only_layers_that_get_the_pattern_count() -> None:
    model = llama()
    spec = WandaSpec(
        overrides={"*.layers.0.*": "dense", "*.o_proj": "unstructured"}, pattern="2:4", permute=True
    )
    _, old, new = permuted(model, tokens(), spec)
    moved = {k for k in old if not torch.equal(old[k], new[k])}
    assert moved == {f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}


# -- refusals and errors --------------------------------------------------------------------------


def test_only_for_patterns_with_groups() -> None:
    with pytest.raises(SpecError, match='pattern "unstructured" has no groups'):
        WandaSpec(permute=True)
    with pytest.raises(SpecError, match="permute must be True or False, got 1"):
        WandaSpec(pattern="2:4", permute=1)  # type: ignore[arg-type]
    assert WandaSpec(overrides={"*.down_proj": "2:4"}, permute=True).permute


def test_not_for_programs() -> None:
    model, data = whole(Gated, 0)
    program = torch.export.export(model, (data[0],))
    with pytest.raises(SpecError, match="permute reorders a module's own weights"):
        prune(program, TWO_FOUR, data)  # type: ignore[arg-type]


def test_not_under_masks() -> None:
    model, data = whole(Gated, 0)
    prune(model, MagnitudeSpec(pattern="2:4", targets="down"))
    before = fingerprint(model)
    with pytest.raises(SpecError, match="down carries a mask already"):
        prune(model, TWO_FOUR, data)
    assert_as_it_was(model, before)


class Branching(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else x


def test_a_model_that_cannot_be_exported_is_refused() -> None:
    model, data = whole(Branching, 0)
    before = fingerprint(model)
    with pytest.raises(ShrinkError, match=r"torch.export cannot capture this Branching"):
        prune(model, TWO_FOUR, data)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["calibrating", "moving"])
def test_after_an_error_all_is_as_it_was(
    error: type[BaseException], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = whole(Gated, 0)
    addresses = {k: p.data_ptr() for k, p in model.named_parameters()}
    before, down = fingerprint(model), model.down.weight.detach().clone()
    if at == "calibrating":
        from torchprune.methods.decide import Decider

        own = Decider.decided

        def fail(self: Decider, part: Any) -> Any:
            assert not torch.equal(model.down.weight, down)  # it is permuted by now
            if any(t.name == "down" for targets, _ in part for t in targets):
                raise error("on purpose")
            return own(self, part)

        monkeypatch.setattr(Decider, "decided", fail)
    else:
        moves = Place.reorder

        def stop(self: Place, tensor: Tensor, order: Tensor) -> None:
            if self.key == "down.weight" and torch.equal(tensor, down):
                raise error("on purpose")
            moves(self, tensor, order)

        monkeypatch.setattr(driver.Place, "reorder", stop)
    with pytest.raises(error, match="on purpose"):
        prune(model, TWO_FOUR, data)
    assert_as_it_was(model, before)
    assert {k: p.data_ptr() for k, p in model.named_parameters()} == addresses


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 6), st.booleans())
def test_the_inverse_order_restores_the_bits(
    seed: int, copies: int, count: int, turned: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (3, copies * count + 2), generator=generator)
    tensor = bits.to(torch.int32).view(torch.float32)  # NaNs and -0.0 among them
    tensor, axis = (tensor.T, 0) if turned else (tensor, 1)
    index = torch.randperm(copies * count + 2, generator=generator)[: copies * count]
    place = Place("a", axis, index.view(copies, count), True)
    order = torch.randperm(count, generator=generator)
    old, address = tensor.clone(), tensor.data_ptr()
    place.reorder(tensor, order)
    for copy_, target in itertools.product(range(copies), range(count)):
        got = tensor.select(axis, int(place.index[copy_, target]))
        wanted = old.select(axis, int(place.index[copy_, order[target]]))
        assert torch.equal(
            got.contiguous().view(torch.int32), wanted.contiguous().view(torch.int32)
        )
    place.reorder(tensor, order.argsort())
    assert torch.equal(tensor.contiguous().view(torch.int32), old.contiguous().view(torch.int32))
    assert tensor.data_ptr() == address
