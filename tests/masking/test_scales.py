"""Eight-bit weights: ranked by what their codes stand for, masked as codes, never rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune import (
    ADMMSpec,
    BestSpec,
    MagnitudeSpec,
    NeuronSpec,
    RIASpec,
    SparseGPTSpec,
    Swaps,
    WandaSpec,
)
from torchprune.errors import SpecError, TargetError
from torchprune.masking.scales import scale_of, values_of
from torchprune.masking.targets import make_plan

CODES = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


def uneven(rows: int, cols: int, span: tuple[int, int], seed: int = 0) -> Tensor:
    """A matrix whose blocks differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    counts = (-(-rows // span[0]), -(-cols // span[1]))
    size = torch.exp(3 * torch.randn(counts, generator=generator))
    return torch.randn(rows, cols, generator=generator) * spread(size, span, (rows, cols))


def spread(scale: Tensor, span: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    wide = scale.repeat_interleave(span[0], 0).repeat_interleave(span[1], 1)
    return wide[: shape[0], : shape[1]]


def coded(weight: Tensor, span: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and the scale of each block."""
    rows, cols = weight.shape
    counts = (-(-rows // span[0]), -(-cols // span[1]))
    padded = F.pad(weight, (0, counts[1] * span[1] - cols, 0, counts[0] * span[0] - rows))
    blocks = padded.view(counts[0], span[0], counts[1], span[1])
    scale = blocks.abs().amax((1, 3)) / torch.finfo(dtype).max
    return (weight / spread(scale, span, (rows, cols))).to(dtype), scale


class Coded(nn.Linear):
    """A linear layer of codes and a scale, called whatever."""

    def __init__(
        self,
        weight: Tensor,
        span: tuple[int, int],
        dtype: torch.dtype = torch.float8_e4m3fn,
        name: str = "weight_scale_inv",
        *,
        says: bool = True,
    ) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        codes, scale = coded(weight, span, dtype)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer(name, scale)
        self.called, self.known = name, {"span": span}
        if says:
            self.block_size = span

    @property
    def codes(self) -> Tensor:
        return self.weight.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """With the blocks' lengths passed by hand."""
        scale = spread(getattr(self, self.called), self.known["span"], tuple(self.weight.shape))
        return F.linear(x, self.weight.float() * scale, self.bias)


def dense(layer: Coded, span: tuple[int, int]) -> nn.Linear:
    """The same layer without codes."""
    twin = nn.Linear(layer.in_features, layer.out_features)
    scale = spread(getattr(layer, layer.called), span, tuple(layer.weight.shape))
    twin.weight = nn.Parameter(layer.weight.detach().float() * scale)
    twin.bias = layer.bias
    return twin


SPANS = [(4, 4), (2, 8), (1, 16), (8, 16), (1, 4), (5, 4)]


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize(
    "spec", [MagnitudeSpec(), WandaSpec(), RIASpec(), WandaSpec(pattern="2:4")]
)
def test_masks_are_those_of_the_dequantized_layer(span: tuple[int, int], spec: Any) -> None:
    layer = Coded(uneven(8, 16, span), span)
    twin = dense(layer, span)
    codes = layer.weight.detach().clone()
    data = [torch.randn(20, 16)]
    for one in (layer, twin):
        torchprune.sparsify(nn.Sequential(one), spec, data, progress=False)
    (found,) = torchprune.masks(layer).values()
    (wanted,) = torchprune.masks(twin).values()
    assert torch.equal(found, wanted)
    kept = torch.where(found, codes.view(torch.uint8), 0)
    assert torch.equal(layer.weight.detach().view(torch.uint8), kept)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_the_life_of_codes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Attach, report, save, load, fold and take back: bit by bit."""

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(Coded(uneven(8, 16, (4, 4), seed), (4, 4), dtype), nn.Linear(8, 4))

    model = build(0)
    before = model[0].weight.detach().view(torch.uint8).clone()
    torchprune.sparsify(model, WandaSpec(), [torch.randn(9, 16)], progress=False)
    report = torchprune.report(model)
    assert report.layers[0].zeros == 64
    assert report.sparsity == 0.5
    assert report.coverage.share == 1.0
    torchprune.save(model, tmp_path)
    loaded = build(1)
    torchprune.load_into(loaded, tmp_path)
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model(x))
    further = torchprune.sparsify(loaded, MagnitudeSpec(0.75), progress=False)
    assert torchprune.report(further).sparsity == 0.75
    out = model(x)
    torchprune.densify(model)
    assert torch.equal(model[0].weight.view(torch.uint8), before)
    torchprune.sparsify(model, WandaSpec(), [torch.randn(9, 16)], progress=False)
    out = model(x)
    torchprune.fold(model)
    assert torch.equal(model(x), out)


def test_negative_zero_codes_count_as_zeros() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter((-torch.zeros(4, 4)).to(torch.float8_e4m3fn), requires_grad=False)
    torchprune.apply_masks(layer, {"weight": torch.ones(4, 4).bool()})
    assert torchprune.report(layer).sparsity == 1.0


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_codes_are_counted_wherever_weights_are(dtype: torch.dtype) -> None:
    from torchprune.testing import assert_sparsity

    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[0].weight = nn.Parameter(torch.randn(64, 64).to(dtype), requires_grad=False)
    torchprune.sparsify(model, MagnitudeSpec(pattern="2:4"))
    assert_sparsity(model, "2:4")
    left = torchprune.plan_lowering(model, "bitmask").left
    assert left == {"0": f"its weight is {dtype}"}
    torchprune.fold(model)
    assert_sparsity(model, "2:4")


def test_a_global_budget_weighs_scales_of_layers() -> None:
    small, large = uneven(8, 16, (8, 16), 1), 100 * uneven(8, 16, (8, 16), 1)
    model = nn.Sequential(
        Coded(small, (8, 16)), nn.Linear(8, 16), nn.Sequential(Coded(large, (8, 16)))
    )
    spec = MagnitudeSpec(0.5, scope="global", ignore="1")
    torchprune.sparsify(model, spec)
    first, last = (layer.sparsity for layer in torchprune.report(model).layers)
    assert first > 0.9
    assert last < 0.1


# -- which tensor is the scale ---------------------------------------------------------------------


@given(
    st.sampled_from([(1, 1), (2, 3), (4, 4), (3, 8), (8, 2)]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from(["weight_scale_inv", "scale", "weight_scale", "s"]),
)
def test_scales_are_found_under_any_name(
    span: tuple[int, int], tall: int, wide: int, seed: int, name: str
) -> None:
    rows, cols = span[0] * tall + 1, span[1] * wide
    weight = uneven(rows, cols, span, seed)
    layer = Coded(weight, span, name=name)
    if layer.weight.numel() == getattr(layer, name).numel():
        return  # a number for each weight is no scale
    values = values_of(layer, "weight", layer.weight)
    wanted = layer.codes * spread(getattr(layer, name), span, (rows, cols))
    assert torch.equal(values, wanted)


def test_a_short_last_block_is_as_long_as_it_is_wide() -> None:
    """DeepSeek's `kv_a_proj_with_mqa`: 576 rows in five blocks of 128."""
    layer = Coded(uneven(72, 32, (16, 16)), (16, 16), says=False)
    found = scale_of(layer, "weight", layer.weight)
    assert found is not None
    assert found.spans == (16, 16)


def test_scales_of_rows_and_of_all() -> None:
    weight = uneven(8, 16, (1, 16))
    layer = Coded(weight, (1, 16), name="s")
    layer.s = layer.s.squeeze(1)  # (8,)
    assert torch.equal(values_of(layer, "weight", layer.weight), layer.codes * layer.s[:, None])
    for shape in ((), (1,), (1, 1)):
        layer.s = torch.full(shape, 3.0)
        assert torch.equal(values_of(layer, "weight", layer.weight), layer.codes * 3)
    del layer.s
    assert torch.equal(values_of(layer, "weight", layer.weight), layer.codes)


def test_a_block_of_zeros_may_have_the_scale_zero() -> None:
    weight = uneven(8, 16, (4, 4))
    weight[:4, :4] = 0
    layer = Coded(weight, (4, 4))
    layer.weight.data[:4, :4] = 0
    assert layer.weight_scale_inv[0, 0] == 0
    found = scale_of(layer, "weight", layer.weight)
    assert found is not None


def test_exponents_are_scales() -> None:
    layer = Coded(uneven(8, 16, (4, 4)), (4, 4))
    layer.weight_scale_inv = torch.exp2(layer.weight_scale_inv.log2().ceil()).to(
        torch.float8_e8m0fnu
    )
    wanted = layer.codes * spread(layer.weight_scale_inv.float(), (4, 4), (8, 16))
    assert torch.equal(values_of(layer, "weight", layer.weight), wanted)


def test_biases_and_scales_of_inputs_are_none() -> None:
    layer = Coded(uneven(8, 8, (1, 8)), (1, 8), name="weight_scale")
    layer.register_buffer("input_scale", torch.tensor(5.0))
    layer.register_buffer("smooth", torch.rand(8) + 1)
    layer.register_buffer("shift", torch.randn(8) - 9)
    found = scale_of(layer, "weight", layer.weight)
    assert found is not None
    assert found.name == "weight_scale"


def test_what_is_negative_somewhere_is_no_scale() -> None:
    layer = Coded(uneven(8, 8, (1, 8)), (1, 8), name="first")
    layer.register_buffer("shift", torch.linspace(-1, 1, 8).view(8, 1))
    layer.register_buffer("zeros", torch.zeros(8, 1))
    found = scale_of(layer, "weight", layer.weight)
    assert found is not None
    assert found.name == "first"


def test_stacks_of_experts_have_scales_each() -> None:
    module = nn.Module()
    codes, scale = torch.randn(3, 8, 16).to(torch.float8_e4m3fn), torch.rand(3, 2, 4) + 0.1
    module.stack = nn.Parameter(codes, requires_grad=False)
    module.stack_scale = nn.Parameter(scale)
    values = values_of(module, "stack", module.stack)
    for value, code, own in zip(values, codes, scale, strict=True):
        assert torch.equal(value, code.float() * spread(own, (4, 4), (8, 16)))


def test_two_that_could_be_it_are_refused() -> None:
    layer = Coded(uneven(8, 8, (4, 4)), (4, 4), name="first")
    layer.register_buffer("second", torch.rand(2, 2) + 1)
    with pytest.raises(
        SpecError, match="more than one scale fits: first over 4x4, second over 4x4"
    ):
        scale_of(layer, "weight", layer.weight)
    model = nn.Sequential(layer, nn.Linear(8, 16))
    found = make_plan(model, MagnitudeSpec())
    assert "more than one scale fits" in found.skipped["0"]
    assert "1 layer with 33% of the weights to prune cannot carry a mask" in found.warnings[0]
    with pytest.raises(TargetError, match="more than one scale fits"):
        make_plan(model, MagnitudeSpec(targets="0"))


def test_blocks_of_two_lengths_that_fit_are_refused() -> None:
    """Three blocks of 192 rows, or of 256 and a short one: nothing tells."""
    layer = Coded(uneven(36, 32, (12, 16)), (12, 16), says=False)
    with pytest.raises(SpecError, match=r"over 12x16, .* over 16x16; give the module a block_size"):
        scale_of(layer, "weight", layer.weight)
    layer.block_size = (16, 16)
    found = scale_of(layer, "weight", layer.weight)
    assert found is not None
    assert found.spans == (16, 16)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        SparseGPTSpec(),
        ADMMSpec(),
        BestSpec(),
        WandaSpec(refine="pcg"),
        WandaSpec(reconstruct=True),
        WandaSpec(pattern="2:4", permute=True),
    ],
    ids=lambda spec: spec.label,
)
def test_methods_that_write_weights_say_what_to_call(spec: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 16), Coded(uneven(8, 16, (4, 4)), (4, 4)))
    before = [p.detach().view(torch.uint8).clone() for p in model.parameters()]
    with pytest.raises(SpecError, match=r"^1: its weight is torch\.float8_e4m3fn, and .*; use Mag"):
        torchprune.sparsify(model, spec, [torch.randn(9, 16)], progress=False)
    after = [p.detach().view(torch.uint8) for p in model.parameters()]
    assert all(map(torch.equal, before, after))


def test_whole_units_are_cut_from_no_codes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = Coded(uneven(8, 16, (4, 4)), (4, 4)), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x).relu())

    with pytest.raises(TargetError, match=r"its weight is torch\.float8_e4m3fn.*dequantize first"):
        torchprune.sparsify(Net(), NeuronSpec(0.5), [torch.randn(9, 16)], progress=False)


def test_swaps_change_no_weights() -> None:
    model = nn.Sequential(Coded(uneven(8, 16, (4, 4)), (4, 4)))
    torchprune.sparsify(model, WandaSpec(refine=Swaps()), [torch.randn(64, 16)], progress=False)
    assert torchprune.report(model).sparsity == 0.5


def test_two_values_in_an_element_carry_no_mask() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16))
    packed = torch.zeros(8, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    model[0].weight = nn.Parameter(packed, requires_grad=False)
    assert "float4" in make_plan(model, MagnitudeSpec()).skipped["0"]


# -- layers of libraries ---------------------------------------------------------------------------


def test_transformers_own_layers() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    span = (16, 16)
    weight = uneven(24, 32, span)
    layer = fp8.FP8Linear(32, 24, block_size=span)
    codes, scale = coded(weight, span, torch.float8_e4m3fn)
    layer.weight.data, layer.weight_scale_inv.data = codes, scale
    model = nn.Sequential(layer)
    torchprune.sparsify(model, MagnitudeSpec())
    wanted = nn.Linear(32, 24)
    wanted.weight = nn.Parameter(codes.float() * spread(scale, span, (24, 32)))
    torchprune.sparsify(wanted, MagnitudeSpec())
    assert torch.equal(torchprune.masks(model)["0.weight"], torchprune.masks(wanted)["weight"])
    report = torchprune.report(model)
    assert report.sparsity == 0.5
    assert report.coverage.size == 24 * 32
    assert layer.weight.dtype == torch.float8_e4m3fn


def test_torchao_layers_are_refused_with_what_to_call() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 96))
    torchao.quantize_(
        model, torchao.Float8WeightOnlyConfig(), filter_fn=lambda module, name: name == "0"
    )
    found = make_plan(model, MagnitudeSpec())
    assert [t.name for t in found.targets] == ["1"]
    assert "dequantize" in found.skipped["0"]
    with pytest.raises(TargetError, match="dequantize"):
        torchprune.sparsify(model, MagnitudeSpec(targets="0"))
