"""Accelerate's loops: a pruner in them, its checkpoints, and two processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import both
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, WandaSpec
from torchprune.masking.mask import masked_layers, original_of
from torchprune.masking.shards import is_shard, local_of, part_of, whole_of
from torchprune.training import Cubic, RigL

SPARSE = 0.75
SCHEDULE = Cubic(0.0, SPARSE, start=1, end=5, every=2)


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 4))


def items(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(12, generator=generator) for _ in range(64)]


def accelerator_of(**options: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    return Accelerator(cpu=True, **options)


class Run:
    """A training loop as Accelerate's guide has it, with one line more."""

    def __init__(
        self,
        spec: Any = None,
        regrow: Any = None,
        seed: int = 0,
        first: bool = False,
        accelerator: Any = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        self.accelerator = accelerator or accelerator_of(**options)
        self.model = model or net(seed)
        if first:
            self.pruner = torchprune.Pruner(self.model, MagnitudeSpec(SPARSE), SCHEDULE)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02, weight_decay=0.1)
        loader = torch.utils.data.DataLoader(items(), batch_size=4)
        self.wrapped, self.optimizer, self.loader = self.accelerator.prepare(
            self.model, optimizer, loader
        )
        spec = spec or MagnitudeSpec(SPARSE)
        data = None
        if spec.needs_data:  # each process its own
            data = [torch.stack(items(7 + self.accelerator.process_index)[:8])]
        if not first:
            self.pruner = torchprune.Pruner(self.wrapped, spec, SCHEDULE, data=data, regrow=regrow)
        self.accelerator.register_for_checkpointing(self.pruner)
        self.changes: list[bool] = []

    def train(self, start: int, end: int) -> None:
        """Batches of the loader from one to another."""
        for i, batch in enumerate(self.loader):
            if not start <= i < end:
                continue
            with self.accelerator.accumulate(self.wrapped):
                loss = self.wrapped(batch).square().mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.wrapped.parameters(), 0.5)
                self.optimizer.step()
                self.changes.append(self.pruner.step(self.optimizer))
                self.optimizer.zero_grad()

    def state(self) -> dict[str, bytes]:
        found = {k: v.detach() for k, v in self.model.state_dict().items()}
        inner = self.optimizer.optimizer
        for i, held in enumerate(inner.state.values()):
            found |= {f"{i}.{k}": v for k, v in held.items() if isinstance(v, Tensor)}
        return {k: v.contiguous().numpy().tobytes() for k, v in found.items() if v.numel()}


def check_zeros(model: nn.Module, sparsity: float = SPARSE) -> None:
    assert torchprune.report(model).sparsity == pytest.approx(sparsity, abs=0.01)
    for layer, mask in masked_layers(model):
        weight = original_of(layer.module, layer.tensor)
        keep, local = part_of(mask.mask, weight), local_of(weight)
        assert not local[~keep].any()


@pytest.mark.parametrize("every", [1, 2])
def test_the_schedule_counts_optimizer_steps(every: int) -> None:
    run = Run(gradient_accumulation_steps=every)
    run.train(0, 6 * every)
    assert run.pruner.steps == 6
    changed = [i for i, made in enumerate(run.changes) if made]
    assert changed == [every * step - 1 for step in (3, 5)]
    check_zeros(run.model)


@pytest.mark.parametrize("regrow", [None, RigL(0.5)], ids=["plain", "RigL"])
def test_a_state_goes_on_exactly(regrow: Any, tmp_path: Path) -> None:
    whole = Run(regrow=regrow)
    whole.train(0, 4)
    whole.accelerator.save_state(str(tmp_path))
    at = copy.deepcopy(whole.pruner.state_dict())
    whole.train(4, 7)
    again = Run(regrow=regrow, seed=5)
    again.train(0, 1)
    again.accelerator.load_state(str(tmp_path))
    assert again.pruner.state_dict() == at
    check_zeros(again.model, SCHEDULE(4))
    again.train(4, 7)
    assert again.state() == whole.state()
    check_zeros(again.model)


# -- two processes ---------------------------------------------------------------------------------


def together(rank: int, spec: Any, regrow: Any, directory: str) -> dict[str, bytes]:
    run = Run(spec, regrow, gradient_accumulation_steps=2)
    assert run.accelerator.num_processes == 2
    run.train(0, 6)
    run.accelerator.save_state(directory)
    run.train(6, 8)
    assert run.pruner.steps == 4
    other = Run(spec, regrow, seed=5, gradient_accumulation_steps=2)
    other.accelerator.load_state(directory)
    other.train(6, 8)
    assert other.state() == run.state()
    return run.state()


@pytest.mark.parametrize(
    ("spec", "regrow"),
    [
        (MagnitudeSpec(SPARSE), None),
        (MagnitudeSpec(SPARSE), RigL(0.5)),
        (WandaSpec(SPARSE), None),
    ],
    ids=["magnitude", "RigL", "Wanda"],
)
def test_two_processes_have_the_same_bits(spec: Any, regrow: Any, tmp_path: Path) -> None:
    one, other = both(together, spec, regrow, str(tmp_path))
    assert one == other


def fully_sharded_run(first: bool) -> Run:
    """Accelerate shards on GPUs alone; it is told that this were one."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = accelerator_of()
    accelerator.state.fsdp_plugin = plugin
    told = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    AcceleratorState._shared_state.update(told)
    return Run(first=first, accelerator=accelerator, model=nn.Sequential(Block(), Block()))


class Block(nn.Module):
    """What Accelerate's policy finds by name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())  # type: ignore[no-any-return]


def fully_sharded(rank: int, first: bool) -> list[float]:
    run = fully_sharded_run(first)
    run.train(0, 6)
    assert all(is_shard(p) for p in run.wrapped.parameters())
    check_zeros(run.wrapped)
    assert run.pruner.steps == 6
    return [float(whole_of(p).abs().sum()) for p in run.wrapped.parameters()]


@pytest.mark.parametrize("first", [True, False], ids=["masks first", "masks last"])
def test_fully_sharded_by_accelerate(first: bool) -> None:
    one, other = both(fully_sharded, first)
    assert one == other
