"""Parts of a packed weight that contradict each other: never read beyond, never accepted."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, passes
from torchprune.errors import CheckpointError, LoweringError
from torchprune.export import load_pt2, to_pt2
from torchprune.lowering.bitmask import SLACK, Bitmask
from torchprune.lowering.kernels import operators as kernels

OPS = torch.ops.torchprune
FORMS = ["AVX-512 BF16", "AVX-512", "AVX2", "portable", "torch"]
KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
PARTS = ("bits", "values", "starts")
CONTRADICTS = "contradict|must hold 64|values hold 64|must be"


@pytest.fixture(autouse=True)
def best_form_afterwards() -> Iterator[None]:
    best = kernels.native().form
    yield
    if best is not None:
        kernels.use_form(best)


def operators(form: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The product and the unpacking in a form of the kernels, or in torch."""
    if form == "torch":

        def linear(x: Tensor, *parts: Any) -> Tensor:
            return x @ kernels.unpack_in_torch(*parts[:3], parts[-1]).to(x.dtype).T

        return linear, kernels.unpack_in_torch
    try:
        kernels.use_form(form)
    except ValueError:
        pytest.skip(f"{form} does not run on this processor")
    return OPS.bitmask_linear, OPS.bitmask_unpack


def packed(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Bitmask:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-9, 10, (rows, cols), generator=generator)
    weight[torch.rand(rows, cols, generator=generator) < 0.5] = 0
    return Bitmask.pack(weight.to(dtype), torch.ones(rows) if dtype == torch.int8 else None)


def assert_refused(form: str, bits: Tensor, values: Tensor, starts: Tensor, cols: int) -> None:
    """In each product that a form has, and in unpacking."""
    linear, unpack = operators(form)
    scales = torch.ones(len(bits)) if values.dtype == torch.int8 else None
    for rows, wide in itertools.product((1, 3, 20), (torch.float32, torch.bfloat16)):
        with pytest.raises(RuntimeError, match=CONTRADICTS):
            linear(torch.ones(rows, cols, dtype=wide), bits, values, starts, scales, None, cols)
    with pytest.raises(RuntimeError, match=CONTRADICTS):
        unpack(bits, values, starts, cols)


Damage = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def changed(part: Tensor, at: Any, value: int) -> Tensor:
    part = part.clone()
    part[at] = value
    return part


DAMAGES: dict[str, Damage] = {
    "all bits": lambda b, v, s: (torch.full_like(b, -1), v, s),
    "no bits": lambda b, v, s: (torch.zeros_like(b), v, s),
    "another bit": lambda b, v, s: (changed(b, (-1, 0), int(b[-1, 0]) ^ 1), v, s),
    "a bit beyond": lambda b, v, s: (changed(b, (1, -1), int(b[1, -1]) | 1 << 60), v, s),
    "a start far beyond": lambda b, v, s: (b, v, changed(s, 2, 2**31 - 1)),
    "a start far before": lambda b, v, s: (b, v, changed(s, 2, -(2**31))),
    "a start next to it": lambda b, v, s: (b, v, changed(s, 2, int(s[2]) + 1)),
    "the end before the start": lambda b, v, s: (b, v, changed(s, -1, -5)),
    "the first start": lambda b, v, s: (b, v, changed(s, 0, 1)),
    "values of fewer": lambda b, v, s: (b, v[:-1], s),
    "starts and values of fewer": lambda b, v, s: (b, v[:SLACK], torch.zeros_like(s)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_operators_refuse_what_contradicts_itself(damage: str, form: str) -> None:
    for dtype, (rows, cols) in itertools.product(KINDS, [(7, 70), (4, 321)]):
        it = packed(rows, cols, dtype)
        found = [part.clone() for part in DAMAGES[damage](it.bits, it.values, it.starts)]
        assert_refused(form, *found, cols)


@pytest.mark.parametrize("form", FORMS)
def test_random_parts_that_contradict_are_refused(form: str) -> None:
    operators(form)

    @settings(max_examples=25)
    @given(st.integers(1, 9), st.integers(1, 150), st.integers(0, 2**31), st.sampled_from(KINDS))
    def check(rows: int, cols: int, seed: int, dtype: torch.dtype) -> None:
        it, other = packed(rows, cols, dtype, seed), packed(rows, cols, dtype, seed + 1)
        if torch.equal(it.starts, other.starts):
            return  # no contradiction: other places of as many values
        values = it.values if len(it.values) < len(other.values) else other.values
        assert_refused(form, it.bits, values, other.starts, cols)

    check()


def test_sizes_are_seen_without_data() -> None:
    it, x = packed(4, 70, torch.float32), torch.randn(2, 70)
    for wrong in [
        (it.bits[:, :1], it.values, it.starts),
        (it.bits.int(), it.values, it.starts),
        (it.bits, it.values, it.starts[1:]),
        (it.bits, it.values, it.starts.long()),
        (it.bits, it.values[None], it.starts),
    ]:
        meta = [part.to("meta") for part in wrong]
        with pytest.raises(RuntimeError, match=r"torchprune: (bits|starts|values) must be"):
            OPS.bitmask_linear(x.to("meta"), *meta, None, None, 70)
    with pytest.raises(RuntimeError, match=r"one device|packed weight on"):
        OPS.bitmask_linear(x, it.bits.to("meta"), it.values, it.starts, None, None, 70)
    with pytest.raises(RuntimeError, match="-5 columns"):
        OPS.bitmask_unpack(it.bits[:, :0].contiguous(), it.values, it.starts, -5)


def test_no_columns_are_no_crash() -> None:
    none = torch.zeros(3, 0, dtype=torch.int64), torch.zeros(SLACK), torch.zeros(4).int()
    for rows in (1, 20):
        y = OPS.bitmask_linear(torch.ones(rows, 0), *none, None, torch.ones(3), 0)
        assert torch.equal(y, torch.ones(rows, 3))
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.empty(4, 0))
    with torch.no_grad():
        model[1].weight[:2] = 0.0
    plan = torchprune.plan_lowering(model, "bitmask")
    assert plan.left["0"] == "its weight is empty"


# -- modules --------------------------------------------------------------------------------------


def lowered(seed: int, dtype: torch.dtype | None = None, share: float = 0.5) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(70, 20), nn.ReLU(), nn.Linear(20, 8))
    torchprune.sparsify(model, MagnitudeSpec(sparsity=share), progress=False)
    return torchprune.lower(model, "bitmask", dtype=dtype)


def held(layer: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """The layer's very tensors, and what is in them."""
    return {
        name: (id(t), t.detach().clone())
        for name, t in [*layer.named_buffers(), *layer.named_parameters()]
    }


def assert_held(layer: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = held(layer)
    assert list(after) == list(before)
    for name, (which, value) in before.items():
        assert after[name][0] == which, name
        assert torch.equal(after[name][1], value), name


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.int8])
def test_every_subset_of_parts_is_checked_with_those_that_stay(
    dtype: torch.dtype | None, assign: bool
) -> None:
    mine, others = lowered(0, dtype), lowered(1, dtype, share=0.6)
    names = [*PARTS, "bias", *(["scales"] if dtype else [])]
    x = torch.randn(3, 70)
    before, state = held(mine[0]), others[0].state_dict()
    expected = mine(x)
    subsets = itertools.chain(*(itertools.combinations(names, n) for n in range(1, len(names) + 1)))
    for subset in subsets:
        given = {f"0.{name}": state[name].clone() for name in subset}
        of_packed = {*subset} & {*PARTS}
        if of_packed and of_packed != {*PARTS}:
            with pytest.raises(LoweringError, match="0 of the state dict: its bits, starts and"):
                mine.load_state_dict(given, strict=False, assign=assign)
            assert_held(mine[0], before)
            assert torch.equal(mine(x), expected)
        else:
            fresh = copy.deepcopy(mine)
            fresh.load_state_dict(given, strict=False, assign=assign)
            for name in names:
                like = state[name] if name in subset else before[name][1]
                assert torch.equal(getattr(fresh[0], name), like), (subset, name)
            fresh(x)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("key", "to"),
    [
        ("bias", lambda t: t[:-1]),
        ("bias", "no tensor"),
        ("bits", None),
        ("values", 3),
        ("scales", lambda t: t[:-1]),
        ("scales", lambda t: t.double()),
        ("scales", lambda t: t.to("meta")),
        ("values", lambda t: t.float()),
        ("values", lambda t: t[:-1]),
        ("values", lambda t: torch.cat([t, t])),
        ("bits", lambda t: t.int()),
        ("bits", lambda t: t.to("meta")),
        ("bits", lambda t: t.to_sparse()),
        ("starts", lambda t: t.long()),
        ("starts", lambda t: t.flip(0)),
    ],
)
def test_a_load_that_fails_leaves_the_layer_as_it_was(key: str, to: Any, assign: bool) -> None:
    mine, x = lowered(0, torch.int8), torch.randn(3, 70)
    state = {n: t.clone() for n, t in lowered(1, torch.int8)[0].state_dict().items()}
    wrong = {**state, key: to(state[key]) if callable(to) else to}
    before, expected = held(mine[0]), mine(x)
    with pytest.raises((LoweringError, RuntimeError)):  # the second is torch's own
        mine[0].load_state_dict(wrong, assign=assign)
    assert_held(mine[0], before)
    assert torch.equal(mine(x), expected)
    mine[0].load_state_dict(state, assign=assign)
    assert torch.equal(mine[0].values, state["values"])


def test_a_hook_that_fails_leaves_the_layer_as_it_was() -> None:
    mine, state = lowered(0), lowered(1).state_dict()

    def fails(*_: Any) -> None:
        raise OSError("the disk is gone")

    mine[0].register_load_state_dict_pre_hook(fails)
    before = held(mine[0])
    with pytest.raises(OSError, match="gone"):
        mine.load_state_dict(state)
    assert_held(mine[0], before)


def test_parameters_stay_the_same_and_assigned_parts_may_have_strides() -> None:
    mine, others, x = lowered(0), lowered(1), torch.randn(3, 70)
    bias, expected = mine[0].bias, others(x)
    mine.load_state_dict(others.state_dict())
    assert mine[0].bias is bias
    assert torch.equal(mine(x), expected)
    strided = {
        name: torch.stack([t, t], -1)[..., 0] if t.dim() == 1 else t.T.contiguous().T
        for name, t in others.state_dict().items()
    }
    mine = lowered(0)
    mine.load_state_dict(strided, assign=True)
    assert torch.equal(mine(x), expected)


def test_what_is_copied_into_one_part_shows_at_the_next_call() -> None:
    mine, others, x = lowered(0), lowered(1, share=0.6), torch.randn(3, 70)
    expected, kept = mine(x), mine[0].bits.clone()
    mine[0].bits.copy_(others[0].bits)
    for broken in (mine, copy.deepcopy(mine)):
        with pytest.raises(RuntimeError, match="contradict"):
            broken(x)
        with pytest.raises(RuntimeError, match="contradict"):
            torchprune.lift(broken)
    mine[0].bits.copy_(kept)
    assert torch.equal(mine(x), expected)


def test_meta_and_back() -> None:
    mine, others, x = lowered(0).to("meta"), lowered(1), torch.randn(3, 70)
    assert mine(x.to("meta")).is_meta
    assert "zeros=unknown" in repr(mine)
    mine.load_state_dict(others.state_dict(), assign=True)
    assert torch.equal(mine(x), others(x))
    with pytest.raises(LoweringError, match="in one place"):
        mine.load_state_dict({"0.bits": mine[0].bits.to("meta")}, strict=False, assign=True)


# -- programs -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of torch.export
def test_packed_programs_refuse_parts_of_others(tmp_path: Path) -> None:
    x, paths = torch.randn(3, 70), [tmp_path / "0.pt2", tmp_path / "1.pt2"]
    for seed, path in enumerate(paths):
        to_pt2(torchprune.lift(lowered(seed, share=0.5 + seed / 10)), path, x)
    program, other = (passes.pack_linears(load_pt2(path)).program for path in paths)
    module = program.module()
    state = other.state_dict
    module.load_state_dict({"0.weight_bits": state["0.weight_bits"]}, strict=False)
    with pytest.raises(RuntimeError, match="contradict"):
        module(x)
    bad = passes.pack_linears(load_pt2(paths[0])).program  # a copy
    bad.state_dict["0.weight_starts"][3] += 1
    bad.example_inputs = None
    torch.export.save(bad, tmp_path / "bad.pt2")
    with pytest.raises(CheckpointError, match=r"the packed weight of .* contradict"):
        load_pt2(tmp_path / "bad.pt2")
