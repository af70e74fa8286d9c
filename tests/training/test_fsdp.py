"""Masks and `fully_shard`, in either order, in two processes: zeros stay with their shards."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import both
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec
from torchprune.errors import CheckpointError, MaskError, SpecError
from torchprune.masking.mask import masked_layers, original_of
from torchprune.masking.shards import is_shard, local_of, part_of, whole_of
from torchprune.training import SET, Cubic, MagnitudeRegrowth, RigL, StraightThrough

SIZES = (9, 24, 7)
"""Rows that two processes cannot share evenly."""


def net(seed: int = 0, sizes: tuple[int, ...] = SIZES) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(a, b) for a, b in zip((16, *sizes), sizes, strict=False)]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.GELU())))


def some_masks(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator) > 0.5
        for name, p in model.named_parameters()
        if p.dim() > 1
    }


def sharded(model: nn.Module, each: bool = True, mesh: Any = None, **options: Any) -> nn.Module:
    """`fully_shard` as it is used: inner modules first, the whole model last."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (2,))
    for module in model if each else ():
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(100 * step + rank))


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    made: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
        "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=True),
        "fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    }
    optimizer: torch.optim.Optimizer = made[kind](model.parameters())
    return optimizer


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int = 3, clip: bool = True
) -> None:
    for step in range(steps):
        model(batch(rank, step)).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        check_zeros(model)


def check_zeros(model: nn.Module) -> None:
    """Of each shard, in its own memory: exact zeros where the mask prunes, and nowhere else."""
    for layer, mask in masked_layers(model):
        weight = original_of(layer.module, layer.tensor)
        keep, local = part_of(mask.mask, weight), local_of(weight)
        assert is_shard(weight), layer.name
        assert local.shape == keep.shape
        assert not local[~keep].any(), layer.name
        assert local[keep].all(), layer.name


def wholes(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, gathered, by its name in a model without masks."""
    return {
        name.replace("parametrizations.", "").removesuffix(".original"): whole_of(p).clone()
        for name, p in model.named_parameters()
    }


def alone(
    kind: str, masks: dict[str, Tensor], *, before: int = 0, steps: int = 3, clip: bool = True
) -> dict[str, Tensor]:
    """What one process would have trained, on both processes' batches."""
    model = net()
    optimizer = optimizer_of(kind, model)
    for step in range(-before, steps):
        if step == 0:
            torchprune.apply_masks(model, masks)
        losses = [model(batch(rank, step)).square().mean() for rank in (0, 1)]
        (sum(losses) / 2).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return wholes(model)


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name] == 0, values == 0), name
        torch.testing.assert_close(found[name], values, rtol=2e-4, atol=2e-6)


# -- training --------------------------------------------------------------------------------------


def trains(rank: int, order: str, kind: str, each: bool, options: dict[str, Any]) -> None:
    model, masks = net(), some_masks(net())
    if order == "masks first":
        torchprune.apply_masks(model, masks)
    sharded(model, each, **options)
    if order == "masks last":
        torchprune.apply_masks(model, masks)
    assert torch.equal(torchprune.masks(model)["0.weight"], masks["0.weight"])
    check_zeros(model)
    train(model, optimizer_of(kind, model), rank)
    check_equal(wholes(model), alone(kind, masks))


@pytest.mark.parametrize(
    ("order", "kind"),
    [
        ("masks first", "sgd"),
        ("masks last", "sgd"),
        ("masks last", "adam"),
        ("masks first", "adamw"),
        ("masks last", "foreach"),
        ("masks first", "fused"),
    ],
)
def test_training_is_as_in_one_process(order: str, kind: str) -> None:
    both(trains, order, kind, True, {"reshard_after_forward": kind != "adam"})


@pytest.mark.parametrize("order", ["masks first", "masks last"])
def test_one_group_for_the_whole_model(order: str) -> None:
    both(trains, order, "sgd", False, {})


def masked_between_steps(rank: int) -> None:
    """Momentum from before the pruning would move what is under the masks."""
    model, masks = sharded(net()), some_masks(net())
    optimizer = optimizer_of("sgd", model)
    for step in (-2, -1):
        model(batch(rank, step)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    torchprune.apply_masks(model, masks)
    train(model, optimizer, rank)
    check_equal(wholes(model), alone("sgd", masks, before=2))


def test_momentum_from_before_the_masks_moves_no_zero() -> None:
    both(masked_between_steps)


def unmoved_by_optimizers(rank: int, order: str) -> None:
    """What nobody but the optimizer's own state moves: zeros stay, step by step, in memory."""
    model, masks = net(), some_masks(net())
    if order == "masks first":
        torchprune.apply_masks(model, masks)
    sharded(model)
    if order == "masks last":
        torchprune.apply_masks(model, masks)
    optimizer = optimizer_of("sgd", model)
    train(model, optimizer, rank)
    for weight in (p for p in model.parameters() if p.dim() > 1):
        optimizer.state[weight]["momentum_buffer"].to_local().fill_(1.0)
    train(model, optimizer, rank)


@pytest.mark.parametrize("order", ["masks first", "masks last"])
def test_shards_are_clean_in_memory_whatever_the_momentum(order: str) -> None:
    both(unmoved_by_optimizers, order)


def in_other_ways(rank: int, way: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.distributed.tensor import Shard

    def columns(p: nn.Parameter) -> Shard:
        return Shard(1 if p.dim() > 1 and p.shape[1] % 2 == 0 else 0)

    names = ("replicate", "shard")
    ways: dict[str, Any] = {
        "columns": lambda: {"shard_placement_fn": columns},
        "replicated": lambda: {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=names)},
        "a group of one": lambda: {"mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=names)},
        "offloaded": lambda: {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "bf16": lambda: {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
    }
    for first in (True, False):
        model, masks = net(), some_masks(net())
        if first:
            torchprune.apply_masks(model, masks)
        sharded(model, **ways[way]())
        if not first:
            torchprune.apply_masks(model, masks)
        train(model, optimizer_of("sgd", model), rank)
        found, expected = wholes(model), alone("sgd", masks)
        if way != "bf16":
            check_equal(found, expected)
        assert all(torch.equal(found[k] == 0, ~m) for k, m in masks.items())


@pytest.mark.parametrize("way", ["columns", "replicated", "a group of one", "offloaded", "bf16"])
def test_other_meshes_and_policies(way: str) -> None:
    both(in_other_ways, way)


def accumulates(rank: int) -> None:
    model, masks = sharded(net()), some_masks(net())
    torchprune.apply_masks(model, masks)
    optimizer = optimizer_of("adamw", model)
    for step in range(4):
        last = step % 2 == 1
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        (model(batch(rank, step)).square().mean() / 2).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
            check_zeros(model)
    single = torchprune.apply_masks(net(), masks)
    optimizer = optimizer_of("adamw", single)
    for step in range(4):
        losses = [single(batch(r, step)).square().mean() for r in (0, 1)]
        (sum(losses) / 4).backward()
        if step % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
    check_equal(wholes(model), wholes(single))


def test_gradients_add_up_over_batches() -> None:
    both(accumulates)


def tied(rank: int) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.inner(self.embed(ids)).relu())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = sharded(Tied(), each=False)
    with pytest.raises(MaskError, match="tied to"):
        torchprune.apply_masks(model, {"head.weight": torch.ones(11, 8, dtype=torch.bool)})
    torchprune.apply_masks(model, {"inner.weight": torch.rand(8, 8) > 0.5})
    optimizer = optimizer_of("sgd", model)
    for _ in range(2):
        model(torch.arange(11)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        check_zeros(model)
    assert original_of(model.head, "weight") is original_of(model.embed, "weight")


def test_tied_weights_stay_tied() -> None:
    both(tied)


# -- taking back, saving, pruning ------------------------------------------------------------------


def taken_back(rank: int, order: str, end: str) -> None:
    """`fold` and `densify` leave a sharded model that trains on."""
    model, masks = net(), some_masks(net())
    dense = wholes(model)
    if order == "masks first":
        torchprune.apply_masks(model, masks)
    sharded(model)
    x = batch(0, 0)
    if order == "masks last":
        model(x)  # leaves the outermost parameters gathered
        torchprune.apply_masks(model, masks)
    y = model(x)
    getattr(torchprune, end)(model)
    assert torchprune.masks(model) == {}
    assert all("parametrizations" not in name for name, _ in model.named_parameters())
    if end == "fold":
        assert torch.equal(model(x), y)
        for name, values in wholes(model).items():
            keep = masks.get(name)
            expected = dense[name] if keep is None else dense[name].where(keep, 0)
            assert torch.equal(values, expected)
    else:
        assert all(torch.equal(v, dense[k]) for k, v in wholes(model).items())
        assert torch.equal(model(x), net()(x))
    before = wholes(model)
    optimizer = optimizer_of("sgd", model)
    model(x).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(v, before[k]) for k, v in wholes(model).items())
    torchprune.apply_masks(model, masks)  # and again
    train(model, optimizer, rank)


@pytest.mark.parametrize("order", ["masks first", "masks last"])
@pytest.mark.parametrize("end", ["fold", "densify"])
def test_masks_can_go(order: str, end: str) -> None:
    both(taken_back, order, end)


def other_masks(rank: int) -> None:
    """Masks that change give back what they hid, on shards as in one process."""
    single = torchprune.apply_masks(net(), some_masks(net()))
    model = sharded(torchprune.apply_masks(net(), some_masks(net())))
    train(model, torch.optim.SGD(model.parameters(), lr=0.0), rank, 1)
    for seed in (2, 3):
        for one in (single, model):
            torchprune.apply_masks(one, some_masks(net(), seed))
        check_zeros(model)
        check_equal(wholes(model), wholes(single))
    model(batch(0, 0))
    assert torchprune.report(model).sparsity == torchprune.report(single).sparsity
    assert torchprune.report(model).to_dict() == torchprune.report(single).to_dict()


def test_masks_can_change() -> None:
    both(other_masks)


def pruned(rank: int, spec: Any) -> None:
    """`sparsify` decides by whole weights."""
    single, model = net(), sharded(net())
    model(batch(0, 0))
    for one in (single, model):
        torchprune.sparsify(one, spec, progress=False)
    expected = torchprune.masks(single)
    assert all(torch.equal(m, expected[k]) for k, m in torchprune.masks(model).items())
    check_zeros(model)
    check_equal(wholes(model), wholes(single))
    again = MagnitudeSpec(0.75)
    for one in (single, model):
        torchprune.sparsify(one, again, progress=False)
    check_equal(wholes(model), wholes(single))
    train(model, optimizer_of("adamw", model), rank)
    torchprune.densify(model)


@pytest.mark.parametrize(
    "spec",
    [
        MagnitudeSpec(0.6),
        MagnitudeSpec(0.6, scope="global"),
        MagnitudeSpec(pattern="2:4", ignore="0"),
    ],
    ids=["layer", "global", "2:4"],
)
def test_pruning_by_weights(spec: Any) -> None:
    both(pruned, spec)


def scheduled(rank: int, kind: str, first: bool) -> None:
    """A `Pruner` on shards does what it does in one process, step by step."""
    regrow = {"RigL": RigL(0.5), "SET": SET(0.5), "magnitude": MagnitudeRegrowth()}.get(kind)
    regrow = StraightThrough(0.01) if kind == "straight through" else regrow
    spec = MagnitudeSpec(0.6)
    single, model = net(), net()
    masked: dict[str, torchprune.Pruner] = {}

    def pruner(one: nn.Module) -> torchprune.Pruner:
        schedule = Cubic(0.0, 0.6, start=1, end=5, every=2)
        return torchprune.Pruner(
            one, spec, schedule, regrow=regrow, together=one is model, reversible=regrow is None
        )

    if first:
        masked["model"] = pruner(model)
    sharded(model)
    if not first:
        masked["model"] = pruner(model)
    masked["single"] = pruner(single)
    learning = kind == "straight through"
    optimizers = [optimizer_of("adamw", one) for one in (single, model)]
    for step in range(6):
        single(torch.cat([batch(r, step) for r in (0, 1)])).square().mean().backward()
        model(batch(rank, step)).square().mean().backward()
        for one, optimizer, name in zip(
            (single, model), optimizers, ("single", "model"), strict=True
        ):
            optimizer.step()
            model(batch(0, 0))  # leaves the outermost parameters gathered
            assert masked[name].step(optimizer) == (step + 1 in (1, 3, 5) and step > 0), step
            assert not masked[name].step(optimizer)
            optimizer.zero_grad()
            assert one is single or torchprune.masks(one).keys() == torchprune.masks(single).keys()
        expected = torchprune.masks(single)
        for key, mask in torchprune.masks(model).items():
            assert torch.equal(mask, expected[key]), (step, key)
        check_equal(wholes(model), wholes(single))
        if not learning and not regrow:
            check_zeros(model)
    assert torchprune.report(model).sparsity == pytest.approx(0.6, abs=0.01)
    x = batch(0, 9)
    y = model(x)
    assert torch.equal(torchprune.fold(model)(x), y)
    assert all(
        v.eq(0).sum() >= (~expected[k]).sum() for k, v in wholes(model).items() if k in expected
    )


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("plain", True),
        ("plain", False),
        ("RigL", True),
        ("RigL", False),
        ("SET", False),
        ("magnitude", True),
        ("straight through", False),
    ],
)
def test_schedules_on_shards(kind: str, first: bool) -> None:
    both(scheduled, kind, first)


def refused(rank: int, tmp: str) -> None:
    model = sharded(net())
    before = wholes(model)
    for spec in (WandaSpec(), SparseGPTSpec()):
        with pytest.raises(SpecError, match=r"sharded over processes.*before fully_shard"):
            torchprune.sparsify(model, spec, [batch(0, 0)], progress=False)
    bad = sharded(net())
    local_of(bad[0].weight)[0, 0] = float("nan")
    with pytest.raises(SpecError, match="NaN"):
        torchprune.sparsify(bad, MagnitudeSpec(), progress=False)
    assert torchprune.masks(model) == {}
    assert all(torch.equal(v, before[k]) for k, v in wholes(model).items())
    torchprune.apply_masks(model, some_masks(net()))
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        torchprune.save(model, f"{tmp}/{rank}")
    assert not Path(tmp, str(rank)).exists()


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    both(refused, str(tmp_path))


def undone(rank: int) -> None:
    """An error in the middle leaves the shards as they were."""
    from torchprune.masking.targets import make_plan
    from torchprune.masking.transaction import all_or_nothing
    from torchprune.methods.decide import without_data

    for masked_before in (False, True):
        model = sharded(net())
        if masked_before:
            torchprune.sparsify(model, MagnitudeSpec(0.3), progress=False)
        train(model, optimizer_of("sgd", model), rank) if masked_before else None
        before, masks = wholes(model), torchprune.masks(model)
        plan = make_plan(model, MagnitudeSpec(0.7))

        def half(plan: Any = plan) -> None:
            with all_or_nothing(plan.targets, keep_dense=False) as changes:
                for change in list(without_data(plan.targets, MagnitudeSpec(0.7))):
                    changes.stage(change)
                    changes.settle()
                raise KeyError

        with pytest.raises(KeyError):
            half()
        assert all(torch.equal(v, before[k]) for k, v in wholes(model).items())
        found = torchprune.masks(model)
        assert found.keys() == masks.keys()
        assert all(torch.equal(found[k], m) for k, m in masks.items())


def test_a_change_is_undone_on_shards() -> None:
    both(undone)


def saved(rank: int, directory: str) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    masks = some_masks(net())
    model = torchprune.apply_masks(sharded(net()), masks)
    train(model, optimizer_of("adamw", model), rank)
    full = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=full)
    if rank == 0:
        for key, mask in masks.items():
            name = key.replace("weight", "parametrizations.weight.original")
            assert torch.equal(state[name] == 0, ~mask)
    plain = torchprune.apply_masks(net(1), some_masks(net(), 5))
    if rank == 0:
        plain.load_state_dict(state)
        assert all(torch.equal(m, masks[k]) for k, m in torchprune.masks(plain).items())
    whole = wholes(model)
    if rank == 0:
        assert all(torch.equal(v, whole[k]) for k, v in wholes(plain).items())
    # into shards again, whole and by torch's own distributed checkpoints
    for first in (True, False):
        other = net(1)
        if first:
            torchprune.apply_masks(other, masks)
        sharded(other)
        if not first:
            torchprune.apply_masks(other, masks)
        set_model_state_dict(
            other,
            dict(state),
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        check_zeros(other)
        assert all(torch.equal(v, whole[k]) for k, v in wholes(other).items())
        assert torch.equal(other(batch(0, 0)), model(batch(0, 0)))
    dcp.save(get_model_state_dict(model), checkpoint_id=directory)
    other = torchprune.apply_masks(sharded(net(1)), masks)
    into = get_model_state_dict(other)
    dcp.load(into, checkpoint_id=directory)
    set_model_state_dict(other, into)
    check_zeros(other)
    assert all(torch.equal(v, whole[k]) for k, v in wholes(other).items())
    train(other, optimizer_of("sgd", other), rank)


def test_full_and_distributed_checkpoints(tmp_path: Path) -> None:
    both(saved, str(tmp_path / "dcp"))


def copied(rank: int) -> None:
    """A copy made before the sharding has masks of its own, and a class that can be told of it."""
    first = torchprune.apply_masks(net(), some_masks(net()))
    model = sharded(copy.deepcopy(first))
    model(batch(rank, 0)).square().mean().backward()
    train(model, optimizer_of("sgd", model), rank)
    assert not is_shard(original_of(first[0], "weight"))
    linear = torchprune.apply_masks(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), {})
    torchprune.apply_masks(linear, some_masks(linear))
    sharded(linear)
    assert isinstance(linear[:1], nn.Sequential)
    biases = {"0.bias": torch.arange(8) > 3, "1.bias": torch.arange(4) > 1}
    torchprune.apply_masks(linear, biases)
    train(linear, optimizer_of("sgd", linear), rank)
    torchprune.fold(linear)
    linear(batch(rank, 0)).square().mean().backward()


def test_copies_and_further_masks() -> None:
    both(copied)


def test_a_torch_that_cannot_be_told_is_said_so() -> None:
    both(untold)


def untold(rank: int) -> None:
    from torch.distributed import _composable_state

    model = sharded(net())
    known, _composable_state._module_state_mapping = _composable_state._module_state_mapping, {}
    try:
        with pytest.raises(MaskError, match=r"put masks on first.*then fully_shard"):
            torchprune.apply_masks(model, some_masks(net()))
    finally:
        _composable_state._module_state_mapping = known
    assert torchprune.masks(model) == {}


# -- cutting parts out ----------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], list[int | None]]:
    """A tensor's shape, a mesh's, and along which axis of the tensor each of the mesh's cuts."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    mesh = draw(st.sampled_from([(1,), (2,), (3,), (2, 2), (1, 3), (2, 1)]))
    axes = [draw(st.sampled_from([None, *range(len(shape))])) for _ in mesh]
    if None not in axes and len(set(axes)) < len(axes):
        axes[0] = None  # twice along one axis: the test after this one
    return shape, mesh, axes


@given(layouts())
@settings(max_examples=25)
def test_each_process_cuts_out_its_own_part(layout: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    shape, mesh, axes = layout
    placements = [Replicate() if axis is None else Shard(axis) for axis in axes]
    whole = torch.arange(math.prod(shape)).view(shape)
    for rank, place in enumerate(itertools.product(*map(range, mesh))):
        expected = whole
        for axis, size, own in zip(axes, mesh, place, strict=True):
            if axis is not None:
                chunks = expected.chunk(size, axis)
                empty = expected.narrow(axis, 0, 0)
                expected = chunks[own] if own < len(chunks) else empty
        assert torch.equal(part_as(rank, mesh, placements, whole), expected)


def test_parts_of_tensor_parallel_shards() -> None:
    """`fully_shard` after tensor parallelism cuts each of its parts further."""
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    whole = torch.arange(24).view(8, 3)
    for rank, (outer, inner) in enumerate(itertools.product(range(2), range(2))):
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        expected = whole.chunk(2)[inner].chunk(2)[outer]
        assert torch.equal(part_as(rank, (2, 2), placements, whole), expected)


def part_as(rank: int, mesh: tuple[int, ...], placements: Any, whole: Tensor) -> Tensor:
    """What a process of a mesh cuts out; the others are made up."""
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(mesh))
    try:
        names = tuple("ab"[: len(mesh)])
        shard = DTensor.from_local(
            torch.zeros(0),
            init_device_mesh("cpu", mesh, mesh_dim_names=names),
            placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        return part_of(whole, shard)
    finally:
        dist.destroy_process_group()
