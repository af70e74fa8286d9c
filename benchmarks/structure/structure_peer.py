"""Ours beside Torch-Pruning 1.6 on what both can do: groups, MLP neurons, a ResNet's channels.

    pip install --no-deps --target .cache/torch-pruning torch-pruning==1.6.0
    python benchmarks/structure/structure_peer.py [--only groups,neurons,channels] [--windows 32]

Quality is without any training after the removal: perplexity of SmolLM2 less 30 % of its neurons,
and accuracy of a small ResNet (trained here, on textures drawn by a seed) less half its channels.
"""

import argparse
import copy
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import torchprune
from torchprune import ChannelSpec, NeuronSpec
from torchprune.graph.groups import structure_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".cache" / "torch-pruning"))

import smollm2

LIMIT = 60
"""Seconds that building groups may take."""


# -- groups ----------------------------------------------------------------------------------------


def llama(queries: int, keys: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def peer_groups(model: nn.Module, tokens: Tensor) -> int:
    """How many groups the peer finds, the embedding and the output head left out."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, example_inputs=tokens)
    return sum(1 for _ in graph.get_all_groups(root_module_types=[nn.Linear]))


def groups() -> None:
    """Seconds to find all groups, each of the peer's in a process that can be stopped."""
    print("| all groups of | ours | Torch-Pruning |\n| --- | ---: | ---: |")
    tokens = torch.randint(0, 256, (1, 16))
    for queries, keys in ((4, 4), (8, 4)):
        model = llama(queries, keys)
        start = time.perf_counter()
        found = len(structure_of(model, tokens).groups)
        ours = time.perf_counter() - start
        code = f"import structure_peer as s, torch; s.timed_peer({queries}, {keys})"
        try:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code],
                capture_output=True,
                text=True,
                timeout=LIMIT + 30,
                cwd=Path(__file__).parent,
                check=False,
            )
            other = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "fails"
        except subprocess.TimeoutExpired:
            other = f"not within {LIMIT} s"
        print(f"| Llama, {queries} queries, {keys} keys | {ours:.2f} s ({found}) | {other} |")


def timed_peer(queries: int, keys: int) -> None:
    """For the process that is watched."""
    model, tokens = llama(queries, keys), torch.randint(0, 256, (1, 16))
    start = time.perf_counter()
    found = peer_groups(model, tokens)
    print(f"{time.perf_counter() - start:.2f} s ({found})")


# -- neurons of SmolLM2 ----------------------------------------------------------------------------


def neurons(windows: int, evaluate: int) -> None:
    tokenizer, dense = smollm2.load_tokenizer(), smollm2.load_model()
    mine, held_out = smollm2.split(smollm2.wikipedia_articles())
    data = smollm2.windows(tokenizer, mine, windows, 512, seed=0).split(1)
    ids = smollm2.tokens(tokenizer, held_out)[: evaluate * 512]
    print("\n| SmolLM2 less 30 % of its neurons | perplexity | seconds |\n| --- | ---: | ---: |")

    def line(name: str, model: nn.Module, seconds: float) -> None:
        found = torchprune.perplexity(model, ids, seqlen=512).perplexity
        print(f"| {name} | {found:.2f} | {seconds:.0f} |", flush=True)

    line("dense", dense, 0.0)
    for name in ("magnitude", "taylor"):
        model, start = copy.deepcopy(dense), time.perf_counter()
        peer_neurons(model, data, name)
        line(f"Torch-Pruning, group {name}", model, time.perf_counter() - start)
    for score, refit in (("taylor", False), ("flap", False), ("flap", True)):
        model, start = copy.deepcopy(dense), time.perf_counter()
        spec = NeuronSpec(0.3, score=score, refit=refit)
        torchprune.sparsify(model, spec, data, progress=False)
        torchprune.shrink(model, torchprune.plan_shrink(model, data[0]))
        line(f"ours, {score}{' with refit' if refit else ''}", model, time.perf_counter() - start)


def peer_neurons(model: Any, data: tuple[Tensor, ...], name: str) -> None:
    import torch_pruning as tp

    model.config.use_cache = False
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=data[0][:, :32])
    importance: Any = tp.importance.GroupMagnitudeImportance()
    if name == "taylor":
        importance = tp.importance.GroupTaylorImportance()
        for batch in data:
            model(batch, labels=batch).loss.backward()
    kept = NeuronSpec(0.3).kept(model.config.intermediate_size)
    for layer in model.model.layers:
        gate = layer.mlp.gate_proj
        prune = tp.prune_linear_out_channels
        group = graph.get_pruning_group(gate, prune, [*range(gate.out_features)])
        order = importance(group).argsort()
        gone = order[: gate.out_features - kept].tolist()
        graph.get_pruning_group(gate, prune, gone).prune()
    model.zero_grad(set_to_none=True)


# -- channels of a ResNet --------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.skip = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.two(F.relu(self.norm1(self.one(x)))))
        return F.relu(y + self.skip(x))


def resnet() -> nn.Module:
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1), Block(32, 64, 2)]
    stem = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 16))


def textures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy waves of sixteen directions and lengths, at any place: (count, 1, 24, 24), classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(16, (count,), generator=generator)
    angle = (labels % 8) * math.pi / 8 + 0.12 * torch.randn(count, generator=generator)
    length = 3.0 + 2.5 * (labels // 8) + 0.3 * torch.randn(count, generator=generator)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    along = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
    phase = 6.28 * torch.rand(count, 1, 1, generator=generator)
    waves = (2 * math.pi * along / length[:, None, None] + phase).sin()
    noise = torch.randn(count, 24, 24, generator=generator)
    return (waves + 1.2 * noise)[:, None], labels


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def channels() -> None:
    torch.manual_seed(0)
    model = resnet()
    x, y = textures(12000, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    steps = 4 * len(x) // 100
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(4):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    test, labels = textures(4000, seed=2)
    data = list(x[:1024].split(128))
    print("\n| ResNet less half its channels | accuracy | parameters |\n| --- | ---: | ---: |")

    def line(name: str, net: nn.Module) -> None:
        size = sum(p.numel() for p in net.parameters())
        print(f"| {name} | {accuracy(net, test, labels):.1%} | {size:,} |", flush=True)

    line("dense", model)
    for name in ("magnitude", "taylor"):
        net = copy.deepcopy(model)
        peer_channels(net, x[:1024], y[:1024], name)
        line(f"Torch-Pruning, group {name}", net)

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch[0]), net(batch[0]).detach().argmax(1))

    for score, refit in (("taylor", False), ("flap", False), ("flap", True)):
        net = copy.deepcopy(model)
        spec = ChannelSpec(0.5, score=score, refit=refit, loss=loss)
        torchprune.sparsify(net, spec, data, progress=False)
        torchprune.shrink(net, torchprune.plan_shrink(net, data[0]))
        line(f"ours, {score}{' with refit' if refit else ''}", net)


def peer_channels(net: nn.Module, x: Tensor, y: Tensor, name: str) -> None:
    import torch_pruning as tp

    importance: Any = tp.importance.GroupMagnitudeImportance()
    if name == "taylor":
        importance = tp.importance.GroupTaylorImportance()
    pruner = tp.pruner.BasePruner(
        net,
        x[:1],
        importance=importance,
        pruning_ratio=0.5,
        ignored_layers=[net[-1]],
        round_to=8,
    )
    if name == "taylor":
        F.cross_entropy(net(x), y).backward()
    pruner.step()
    net.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="groups,channels,neurons")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--evaluate", type=int, default=16)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if "groups" in options.only:
        groups()
    if "channels" in options.only:
        channels()
    if "neurons" in options.only:
        neurons(options.windows, options.evaluate)


if __name__ == "__main__":
    main()
