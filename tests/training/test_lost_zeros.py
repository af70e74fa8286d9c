"""Which schemes of torchao keep the zeros of pruning, and which do not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import MaskError
from torchprune.training import lost_zeros

torchao = pytest.importorskip("torchao.quantization", reason="the extra quant is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own


def folded(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 32)).to(dtype)
    model[0].weight.data += 0.02  # not symmetric
    torchprune.sparsify(model, MagnitudeSpec(0.5), progress=False)
    masks = torchprune.masks(model)
    return torchprune.fold(model), masks


def keeping() -> dict[str, Any]:
    from torchao.quantization.quant_primitives import MappingType

    intx, group = torchao.IntxWeightOnlyConfig, torchao.PerGroup(32)
    one_sided = {"mapping_type": MappingType.ASYMMETRIC}
    return {
        "int8": torchao.Int8WeightOnlyConfig(),
        "int8 dynamic": torchao.Int8DynamicActivationInt8WeightConfig(),
        "int8 by group": torchao.Int8WeightOnlyConfig(granularity=group),
        "int4": intx(weight_dtype=torch.int4, granularity=group),
        "int4, whole zero points": intx(weight_dtype=torch.int4, granularity=group, **one_sided),
        "int2": intx(weight_dtype=torch.int2, granularity=group),
        "int8 dynamic, int4": torchao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=group
        ),
        "float8": torchao.Float8WeightOnlyConfig(),
        "int4 by ours": torchprune.training.Int4(group=32).torchao(),
        "int8 by ours": torchprune.training.Int8().torchao(),
    }


@pytest.mark.parametrize("name", keeping())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_these_schemes_keep_every_zero(name: str, dtype: torch.dtype) -> None:
    model, masks = folded(dtype)
    torchao.quantize_(model, keeping()[name])
    assert type(model[0].weight.data) is not Tensor
    assert lost_zeros(model, masks) == {}
    model(torch.randn(2, 256, dtype=dtype))


class Tinygemm(Tensor):
    """Stands for weights of torchao that need a GPU: its own arithmetic, with float zero points."""

    scale: Tensor
    zero_point: Tensor
    codes: Tensor
    group: int

    @staticmethod
    def of(weight: Tensor, group: int) -> Tinygemm:
        from torchao.quantization import quant_primitives as q

        shape = (1, group)
        kind = q.MappingType.ASYMMETRIC
        scale, point = q._choose_qparams_affine_tinygemm(
            weight, kind, shape, torch.int32, 0, 15, zero_point_dtype=weight.dtype
        )
        codes = q._quantize_affine_tinygemm(weight, shape, scale, point, torch.int32, 0, 15)
        made = weight.clone().as_subclass(Tinygemm)
        made.scale, made.zero_point, made.codes, made.group = scale, point, codes, group
        return made

    def dequantize(self) -> Tensor:
        from torchao.quantization import quant_primitives as q

        return q._dequantize_affine_tinygemm(
            self.codes,
            (1, self.group),
            self.scale,
            self.zero_point,
            torch.int32,
            0,
            15,
            output_dtype=torch.float32,
        )


def test_zero_points_that_are_not_whole_lose_zeros_and_are_named() -> None:
    model, masks = folded()
    quantized = Tinygemm.of(model[0].weight.detach(), 32)
    del model[0]._parameters["weight"]
    model[0].register_buffer("weight", quantized)
    found = lost_zeros(model, masks)
    assert list(found) == ["0.weight"]
    assert "Tinygemm, zero points that are not whole" in found["0.weight"]
    assert re.search(r"[\d,]+ of 8,192 zeros are lost", found["0.weight"])


def test_plain_weights_count_and_names_are_checked() -> None:
    model, masks = folded()
    assert lost_zeros(model, masks) == {}
    with torch.no_grad():
        model[1].weight.fill_(1)
    assert lost_zeros(model, masks) == {"1.weight": "float32: 1,024 of 1,024 zeros are lost"}
    with pytest.raises(MaskError, match=r"'2\.weight' is no tensor here.*did you mean"):
        lost_zeros(model, {"2.weight": masks["1.weight"]})
    with pytest.raises(MaskError, match=r"expected a weight \(64, 256\).*got \(32, 64\)"):
        lost_zeros(model, {"1.weight": masks["0.weight"]})


@pytest.mark.parametrize("form", ["bitmask"])
def test_lowered_layers_are_left_alone(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 32))
    torchprune.sparsify(model, MagnitudeSpec(0.5), progress=False)
    torchprune.fold(model)
    with torch.no_grad():
        torchprune.lower(model, form)
        x = torch.randn(3, 256)
        before = model(x)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        assert torch.equal(model(x), before)
