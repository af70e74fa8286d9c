"""KL of logits: against a float64 brute force, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchprune.training import divergence as module
from torchprune.training.divergence import divergence


def brute(student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Row by row, class by class, in float64."""
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for s, t, c in zip(student.double(), teacher.double(), counts, strict=True):
        if not c:
            continue
        rows += 1
        own = (s / temperature) - torch.logsumexp(s / temperature, 0)
        wanted = (t / temperature) - torch.logsumexp(t / temperature, 0)
        for a, b in zip(own, wanted, strict=True):
            if b > -math.inf:
                total = total + b.exp() * (b - a)
    return total / max(1, rows) * temperature**2


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 7),
    classes=st.integers(2, 9),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    cells=st.sampled_from([1, 4, 16, 1 << 21]),
    seed=st.integers(0, 10**6),
    masked=st.booleans(),
)
def test_it_is_the_brute_force_in_value_and_gradient(
    rows: int, classes: int, temperature: float, cells: int, seed: int, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = (3 * torch.randn(rows, classes, generator=generator)).requires_grad_()
    teacher = 3 * torch.randn(rows, classes, generator=generator)
    counts = torch.rand(rows, generator=generator) < 0.6 if masked else torch.ones(rows).bool()
    before, module._CELLS = module._CELLS, cells
    try:
        found = divergence(student, teacher, counts if masked else None, temperature=temperature)
        (slope,) = torch.autograd.grad(3 * found, student)
    finally:
        module._CELLS = before
    exact = student.detach().double().requires_grad_()
    wanted = brute(exact, teacher, counts, temperature)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    if bool(counts.any()):
        (wanted_slope,) = torch.autograd.grad(3 * wanted, exact)
        torch.testing.assert_close(slope.double(), wanted_slope, rtol=1e-4, atol=1e-5)
    else:
        assert not bool(slope.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_teacher_teaches_itself_nothing(dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(2, 3, 11)).to(dtype).requires_grad_()
    found = divergence(logits, logits)
    found.backward()
    assert found.dtype == torch.float32
    assert float(found.detach()) == 0
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert not bool(logits.grad.any())


def test_classes_that_the_teacher_rules_out_cost_nothing() -> None:
    teacher = torch.tensor([[0.0, 1.0, -math.inf]])
    student = torch.tensor([[0.0, 1.0, -20.0]], requires_grad=True)
    found = divergence(student, teacher)
    found.backward()
    assert 0 <= float(found.detach()) < 1e-6
    assert bool(student.grad.isfinite().all())  # type: ignore[union-attr]


def test_padding_may_hold_anything() -> None:
    student = torch.randn(2, 3, 5)
    student[0, 2] = math.nan
    student.requires_grad_()
    counts = torch.tensor([[True, True, False], [True, True, True]])
    found = divergence(student, torch.randn(2, 3, 5), counts)
    found.backward()
    assert bool(found.isfinite())
    assert bool(student.grad.isfinite().all())
