"""Prune any module on batches of your own: a net of two inputs, from a DataLoader of mappings.

    python examples/own_batches.py    # seconds

Tensors are passed positionally, tuples positionally, mappings as keywords; nothing is registered.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import torchprune
from torchprune import SparseGPTSpec


class TwoTowers(nn.Module):
    """How well a picture and a row of numbers go together."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(16 * 49, 32)
        )
        self.numbers = nn.Sequential(nn.Linear(12, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, *, picture: Tensor, row: Tensor) -> Tensor:
        return (self.image(picture) * self.numbers(row)).sum(-1)


def main(arguments: list[str] | None = None) -> None:
    """Prune, say what it cost, take it back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="fewer batches")
    count = 64 if parser.parse_args(arguments).tiny else 1024
    torch.manual_seed(0)
    model = TwoTowers()
    rows = [{"picture": torch.randn(3, 16, 16), "row": torch.randn(12)} for _ in range(count)]
    loader = DataLoader(rows, batch_size=16)

    batch = next(iter(loader))
    with torch.no_grad():
        dense = model(**batch)
    spec = SparseGPTSpec(0.7, ignore=["image.0"], overrides={"numbers.*": "2:4"})
    torchprune.sparsify(model, spec, loader, keep_dense=True)  # to be able to go back
    print(torchprune.report(model))
    with torch.no_grad():
        off = (model(**batch) - dense).square().mean() / dense.square().mean()
    print(f"outputs moved by {float(off):.1%}")

    torchprune.densify(model)
    assert isinstance(model.numbers[0], nn.Linear)
    print("dense again, parametrizations gone")


if __name__ == "__main__":
    main()
