"""Differences that half precision makes are told from those of a program that is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchprune.errors import ExportError
from torchprune.export.call import Call, Sample, prepare
from torchprune.export.judged import check
from torchprune.export.rounding import rounding_of


class Cancels(nn.Module):
    """Most of a linear layer's output is lost where sums are rounded to few bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) + 20.0) - 20.0


class Strict(Cancels):
    """Takes one dtype alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ torch.eye(16, dtype=torch.bfloat16)


def call_of(model: nn.Module, dtype: torch.dtype) -> Call:
    x = torch.randn(4, 16, dtype=dtype)
    options: dict[str, Any] = {"with_cache": False, "dynamic_shapes": None, "vary": False}
    return prepare(model.to(dtype), x, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_less_rounding_is_no_mistake(dtype: torch.dtype) -> None:
    call = call_of(Cancels(), dtype)

    def exact(sample: Sample) -> list[Tensor]:
        return [call.module.layer(*sample.args).detach()]

    def wrong(sample: Sample) -> list[Tensor]:
        return [10 * tensor for tensor in exact(sample)]

    with pytest.raises(ExportError, match="computes otherwise"):
        check(call, "it", exact, 1e-3)
    difference, relative = check(call, "it", exact, 1e-3, rounding_of(call))
    assert difference > 0
    assert relative > 1e-3
    with pytest.raises(ExportError, match="computes otherwise"):
        check(call, "it", wrong, 1e-3, rounding_of(call))


def test_a_model_that_rounds_luckily_is_no_measure() -> None:
    """The program is on the other side of float32, and not much farther from it than the model."""
    call = call_of(Cancels(), torch.bfloat16)
    wide = copy.deepcopy(call.module).float()

    def apart(times: float) -> Any:
        def run(sample: Sample) -> list[Tensor]:
            exact = wide(sample.args[0].float()).detach()
            return [exact + times * (exact - sample.outputs[0].float())]

        return run

    check(call, "it", apart(2.9), 1e-3, rounding_of(call))
    with pytest.raises(ExportError, match="computes otherwise"):
        check(call, "it", apart(3.1), 1e-3, rounding_of(call))


def test_nothing_is_allowed_where_it_cannot_be_told() -> None:
    for model, dtype in ((Cancels(), torch.float32), (Strict(), torch.bfloat16)):
        call = call_of(model, dtype)
        sample = call.samples[0]
        assert rounding_of(call)(sample, sample.outputs) == 0.0
        assert all(p.dtype == dtype for p in call.module.parameters())
