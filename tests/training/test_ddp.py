"""Masks and DistributedDataParallel, in either order, in two processes: the same bits in both."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from processes import both
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec
from torchprune.training import Cubic, RigL

SPARSE = 0.6


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 5))


class Branching(nn.Module):
    """A net of which each batch uses a part."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = net(), net(), nn.Linear(5, 3)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            nn.init.normal_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        part = self.one if x[0, 0] > 0 else self.other
        return self.head(part(x))  # type: ignore[no-any-return]


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(10 * step + rank))


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(p.shape, generator=generator) > 0.5
        for name, p in model.named_parameters()
        if p.dim() > 1
    }


def parallel(model: nn.Module, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **options)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def words(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        key: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for key, tensor in tensors.items()
        if tensor.numel()
    }


def state_of(model: nn.Module) -> dict[str, bytes]:
    """Weights and masks to the bit."""
    return words({key: value.detach().clone() for key, value in model.state_dict().items()})


def same(found: list[Any]) -> Any:
    """What both processes have."""
    assert found[0].keys() == found[1].keys()
    different = [key for key, value in found[0].items() if found[1][key] != value]
    assert not different
    return found[0]


def check_support(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        path, _, tensor = name.rpartition(".")
        weight = getattr(model.get_submodule(path), tensor)
        assert not weight[~mask].any(), name
        if weight.grad is not None:
            assert not weight.grad[~mask].any(), name


# -- masks that stay -------------------------------------------------------------------------------


def trains(rank: int, first: bool, options: dict[str, Any], accumulate: int) -> dict[str, bytes]:
    model = Branching() if options.get("find_unused_parameters") else net()
    masks = masks_of(model)
    if first:
        torchprune.apply_masks(model, masks)
    wrapped = parallel(model, **options)
    if not first:
        torchprune.apply_masks(model, masks)
    optimizer = optimizer_of(wrapped)
    for step in range(4):
        for part in range(accumulate):
            last = part == accumulate - 1
            with nullcontext() if last else wrapped.no_sync():  # type: ignore[operator]
                loss = wrapped(batch(rank, accumulate * step + part)).square().mean()
                (loss / accumulate).backward()
        check_support(model, masks)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        check_support(model, masks)
    return state_of(model)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"static_graph": True},
    {"find_unused_parameters": True},
    {"broadcast_buffers": False, "gradient_as_bucket_view": True},
]


@pytest.mark.parametrize("first", [True, False], ids=["masks first", "masks last"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "static", "unused", "views"])
def test_both_processes_train_the_same_weights(first: bool, options: dict[str, Any]) -> None:
    accumulate = 1 if options.get("static_graph") else 2
    same(both(trains, first, options, accumulate))


def against_one(rank: int, first: bool) -> None:
    model, single = net(), net()
    masks = masks_of(model)
    wrapped = parallel(model) if not first else model
    for one in (model, single):
        torchprune.apply_masks(one, masks)
    wrapped = parallel(model) if first else wrapped
    optimizers = [optimizer_of(one) for one in (model, single)]
    for step in range(3):
        wrapped(batch(rank, step)).square().mean().backward()
        single(torch.cat([batch(r, step) for r in (0, 1)])).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", [True, False], ids=["masks first", "masks last"])
def test_two_processes_train_as_one(first: bool) -> None:
    both(against_one, first)


def taken_back(rank: int, end: str, keep_dense: bool) -> dict[str, bytes]:
    """What was masked goes on being averaged when its masks are gone."""
    model = net()
    wrapped = parallel(model)
    optimizer = optimizer_of(wrapped)
    for step in range(6):
        if step == 2:
            spec = SparseGPTSpec(0.5) if keep_dense else MagnitudeSpec(0.5)
            data = [batch(7, 7)] if keep_dense else None
            torchprune.sparsify(model, spec, data, progress=False, keep_dense=keep_dense)
        if step == 4:
            getattr(torchprune, end)(model)
        wrapped(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.ne(0).all() for p in model.parameters())
    return state_of(model)


@pytest.mark.parametrize(
    ("end", "keep_dense"), [("fold", False), ("densify", False), ("densify", True)]
)
def test_masks_go_while_training(end: str, keep_dense: bool) -> None:
    same(both(taken_back, end, keep_dense))


# -- masks that change -----------------------------------------------------------------------------


def scheduled(rank: int, spec: Any, regrow: Any, first: bool, reversible: bool) -> dict[str, bytes]:
    """Each process calibrates on its own batches."""
    model = net()
    data = [batch(rank, -1 - i) for i in range(3)] if spec.needs_data else None
    schedule = Cubic(0.0, SPARSE, start=1, end=5, every=2)
    wrapped = model if first else parallel(model)
    pruner = torchprune.Pruner(
        wrapped, spec, schedule, data=data, regrow=regrow, reversible=reversible
    )
    wrapped = parallel(model) if first else wrapped
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    for step in range(6):
        wrapped(batch(rank, step)).square().mean().backward()
        optimizer.step()
        changed = pruner.step(optimizer)
        assert changed == (step + 1 in (1, 3, 5) and (step > 0 or regrow is None)) or step == 0
        optimizer.zero_grad()
    assert torchprune.report(model).sparsity == pytest.approx(SPARSE, abs=0.05)  # of 12 in a row, 7
    moments = {str(i): s["momentum_buffer"] for i, s in enumerate(optimizer.state.values())}
    check_support(model, torchprune.masks(model))
    found = state_of(model) | {f"momentum {k}": v for k, v in words(moments).items()}
    if reversible:
        torchprune.densify(model)
        found |= {f"dense {k}": v for k, v in state_of(model).items()}
    return found


@pytest.mark.parametrize("first", [True, False], ids=["masks first", "masks last"])
@pytest.mark.parametrize(
    ("spec", "regrow", "reversible"),
    [
        (MagnitudeSpec(SPARSE), None, False),
        (MagnitudeSpec(SPARSE), RigL(0.4), False),
        (WandaSpec(SPARSE), None, False),
        (WandaSpec(SPARSE), None, True),
        (SparseGPTSpec(SPARSE), None, False),
    ],
    ids=["magnitude", "RigL", "Wanda", "Wanda reversible", "SparseGPT"],
)
def test_both_processes_have_the_same_masks(
    spec: Any, regrow: Any, reversible: bool, first: bool
) -> None:
    same(both(scheduled, spec, regrow, first, reversible))


def own_masks(rank: int) -> dict[str, bytes]:
    """Masks that differ before the model is wrapped become the first process's."""
    model = net()
    torchprune.sparsify(model, WandaSpec(0.5), [batch(rank, -1)], progress=False)
    before = torchprune.masks(model)
    wrapped = parallel(model)
    wrapped(batch(rank, 0)).square().mean().backward()
    optimizer = optimizer_of(wrapped)
    optimizer.step()
    check_support(model, torchprune.masks(model))
    return state_of(model) | {f"before {rank}": words(before)["0.weight"]}


def test_wrapping_takes_over_the_first_masks() -> None:
    found = both(own_masks)
    assert found[0].pop("before 0") != found[1].pop("before 1")
    same(found)
