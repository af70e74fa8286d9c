"""Heads that meet what their parent makes for all of them go, layer by layer, by themselves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from structures import close, mask_random_units, outputs
from torch import Tensor, nn

import torchprune
from torchprune import HeadSpec, plan_shrink, shrink
from torchprune.errors import ShrinkError
from torchprune.graph.groups import structure_of
from torchprune.structure.narrowed import narrow_as, record_of

SIZE = 2
"""Of a head."""

FORMS = ["slopes", "heads", "rows", "fused", "windows", "mask"]


def slopes_of(heads: int) -> Tensor:
    return 0.5 ** torch.arange(1.0, heads + 1)


class Attention(nn.Module):
    """What it adds to its scores is made by its parent."""

    def __init__(self, heads: int, groups: int, form: str) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.form = heads, groups, form
        self.q = nn.Linear(6, heads * SIZE)
        self.k, self.v = nn.Linear(6, groups * SIZE), nn.Linear(6, groups * SIZE)
        self.o = nn.Linear(heads * SIZE, 6)

    def forward(self, x: Tensor, other: Tensor | None = None, bias: Any = None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            layer(x).view(b, t, -1, SIZE).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        times = self.num_heads // self.num_kv_heads
        k, v = (y.repeat_interleave(times, 1) for y in (k, v))
        if self.form == "mask":
            y = F.scaled_dot_product_attention(q, k, v, bias)
        elif self.form == "fused":
            q, k = (y.reshape(b * self.num_heads, t, SIZE) for y in (q, k))
            scores = torch.baddbmm(bias, q, k.mT).view(b, self.num_heads, t, t)
            y = scores.softmax(-1) @ v
        else:
            scores = q @ k.mT
            if self.form == "slopes":
                scores = scores - bias.view(-1, 1, 1) * torch.arange(t)
            elif self.form == "windows":
                scores = scores.masked_fill(bias, -9.0)
            else:
                scores = scores + bias
            y = scores.softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    def __init__(self, named: bool, *sizes: Any) -> None:
        super().__init__()
        self.named, self.attention = named, Attention(*sizes)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        if self.named:
            return x + self.attention(x, bias=bias)
        return x + self.attention(x, None, bias)


class Parent(nn.Module):
    """Slopes from the number of heads, in one of the forms that people write."""

    def __init__(self, heads: int, groups: int, form: str, named: bool = True, layers: int = 2):
        super().__init__()
        self.num_heads, self.form = heads, form
        self.blocks = nn.ModuleList(Block(named, heads, groups, form) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.made(*x.shape[:2]).to(x.dtype)
        bias = bias.bool() if self.form == "windows" else bias
        for block in self.blocks:
            x = block(x, bias)
        return x

    def made(self, b: int, t: int) -> Tensor:
        slopes, places = slopes_of(self.num_heads), torch.arange(t)
        bias = slopes[:, None, None] * places
        apart = (places[:, None] - places).abs()
        match self.form:
            case "slopes":
                return slopes
            case "rows":
                return bias.expand(b, -1, -1, -1)
            case "fused":
                return bias.repeat(b, 1, 1)
            case "windows":
                return (apart > torch.arange(1, self.num_heads + 1)[:, None, None]).float()
            case "mask":
                return (bias - 5.0 * (apart > 2)).expand(b, self.num_heads, t, t)
        return bias


def lively(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    return model.to(dtype).eval()


def left(model: nn.Module) -> list[int]:
    return [said["kept"] for one in record_of(model).values() for said in one.values()]


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    form=st.sampled_from(FORMS),
    sizes=st.sampled_from([(2, 2), (3, 3), (4, 4), (4, 2), (6, 3)]),
    rows=st.integers(1, 4),
    length=st.integers(2, 6),
    named=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_heads_go_whatever_form_they_are_handed_in(
    form: str,
    sizes: tuple[int, int],
    rows: int,
    length: int,
    named: bool,
    dtype: torch.dtype,
    seed: int,
    tmp_path: Path,
) -> None:
    """As many rows, or positions, as there are heads are no heads."""
    torch.manual_seed(seed)
    model = lively(Parent(*sizes, form, named), dtype)
    fresh = copy.deepcopy(model)
    x = torch.randn(rows, length, 6, dtype=dtype)
    structure = mask_random_units(model, x, seed, share=0.6)
    assert [g.count for g in structure.groups if g.kind == "heads"] == [sizes[1]] * 2
    masked = copy.deepcopy(model)
    shrink(model, plan_shrink(model, x))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    others = [torch.randn(b, t, 6, dtype=dtype) for b, t in ((1, 5), (3, length), (2 * rows, 3))]
    for other in (x, *others):
        assert close(outputs(model, other), outputs(masked, other), tolerance)
    torchprune.save(model, tmp_path / "own")
    again = torchprune.load_into(fresh, tmp_path / "own")
    for other in (x, *others):
        assert close(outputs(again, other), outputs(model, other), 0.0)
        assert close(outputs(copy.deepcopy(model), other), outputs(model, other), 0.0)


@pytest.mark.parametrize("form", ["fused", "mask"])
def test_once_more_and_in_graphs(form: str) -> None:
    torch.manual_seed(0)
    model, x = lively(Parent(8, 4, form)), torch.randn(2, 4, 6).double()
    for count in (2, 1):
        torchprune.sparsify(model, HeadSpec(0.5), [x], progress=False)
        masked = copy.deepcopy(model)
        shrink(model, plan_shrink(model, x))
        assert left(model) == [2 * count] * 2
        assert close(outputs(model, x), outputs(masked, x), 1e-12)
    auto = torch.export.Dim.AUTO
    graph = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 1: auto},)).module()
    for other in (x, torch.randn(5, 3, 6).double()):
        torch.testing.assert_close(graph(other), model(other))


def test_other_lengths_than_all_heads_are_refused_and_what_is_for_all_of_them_is_not() -> None:
    torch.manual_seed(0)
    model, x = lively(Parent(4, 4, "heads", layers=1)), torch.randn(2, 4, 6).double()
    mask_random_units(model, x)
    shrink(model, plan_shrink(model, x))
    attention = model.blocks[0].attention
    attention(x, bias=torch.zeros(1, 1, 4).double())
    attention(x, bias=torch.zeros(4, 1, 4).double())
    with pytest.raises(
        RuntimeError, match=r"bias is expected to have 3 axes and 4 heads on axis 0"
    ):
        attention(x, bias=torch.zeros(8, 1, 4).double())


def test_a_plan_that_is_refused_leaves_no_hooks() -> None:
    class Stubborn(Parent):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.blocks[0].attention.q(x).view(*x.shape[:2], 4, SIZE)  # asks
            return y + self.blocks[0].attention.q(x).view(*x.shape[:2], 4, SIZE).sum() * 0

    torch.manual_seed(0)
    model, x = lively(Stubborn(4, 4, "rows")), torch.randn(2, 3, 6).double()
    torchprune.sparsify(model, HeadSpec(0.5, refit=False), [x], progress=False)
    want, hooks = outputs(model, x), len(model.blocks[1].attention._forward_pre_hooks)
    try:
        shrink(model, plan_shrink(model, x))
    except ShrinkError:
        assert len(model.blocks[1].attention._forward_pre_hooks) == hooks
        assert not [name for name, _ in model.named_buffers() if "kept" in name]
    assert close(outputs(model, x), want, 1e-12)


@pytest.mark.parametrize(
    "said",
    [
        {"axis": 3},
        {"axis": -1},
        {"kept": 0},
        {"kept": 5},
        {"dim": 99},
        {"place": 1},
        {"more": 1},
    ],
    ids=str,
)
def test_a_file_cannot_say_what_the_forward_does_not_take(said: dict[str, int]) -> None:
    model = Parent(4, 4, "heads", layers=1)
    right = {"place": 2, "dim": 3, "axis": 0, "period": 4, "inner": 0, "kept": 2}
    path = "blocks.0.attention"
    for record in (
        {path: {"bias": {**right, **said}}},
        {path: {"no name": right}},
        {path: {"bias2": right}},
        {"blocks.7": {"bias": right}},
    ):
        with pytest.raises(ShrinkError):
            narrow_as(model, record)
    assert not list(model.buffers())
    narrow_as(model, {path: {"bias": right}})
    assert record_of(model) == {path: {"bias": right}}


# -- what is not handed ----------------------------------------------------------------------------


class Own(Attention):
    """Slopes as a buffer of the attention itself."""

    def __init__(self) -> None:
        super().__init__(4, 4, "slopes")
        self.register_buffer("slopes", slopes_of(4))

    def forward(self, x: Tensor, other: Tensor | None = None, bias: Any = None) -> Tensor:
        return super().forward(x, other, self.slopes)


class Computed(Attention):
    """Slopes from the number of heads, anew in each call."""

    def __init__(self) -> None:
        super().__init__(4, 4, "slopes")

    def forward(self, x: Tensor, other: Tensor | None = None, bias: Any = None) -> Tensor:
        return super().forward(x, other, slopes_of(self.num_heads).to(x.dtype))


class ByHeads(Attention):
    """All rows of the first head, then all of the second."""

    def forward(self, x: Tensor, other: Tensor | None = None, bias: Any = None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            layer(x).view(b, t, 4, SIZE).permute(2, 0, 1, 3).reshape(-1, t, SIZE)
            for layer in (self.q, self.k, self.v)
        )
        y = torch.baddbmm(bias, q, k.mT).softmax(-1) @ v
        return self.o(y.view(4, b, t, SIZE).permute(1, 2, 0, 3).reshape(b, t, -1))


def test_slopes_of_the_attention_s_own_go_with_its_heads() -> None:
    torch.manual_seed(0)
    model, x = lively(Own()), torch.randn(2, 3, 6).double()
    mask_random_units(model, x)
    want = outputs(model, x)
    shrink(model, plan_shrink(model, x))
    assert len(model.slopes) == model.num_heads < 4
    assert close(outputs(model, x), want, 1e-12)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ["computed", "by heads"])
def test_what_cannot_be_picked_keeps_all_heads(kind: str, rows: int) -> None:
    torch.manual_seed(0)
    model: nn.Module = Computed()
    if kind == "by heads":
        model = Parent(4, 4, "fused", layers=1)
        model.blocks[0].attention = ByHeads(4, 4, "fused")
    x = torch.randn(rows, 3, 6).double()
    structure = structure_of(lively(model), x)
    assert not [g for g in structure.groups if g.kind == "heads"]
    why = [f.why for f in structure.frozen if f.key.endswith("o.weight") and f.axis == 1]
    assert "test_handed_heads.py" in why[0]
    assert not structure.trace.handed
