"""Prune a net while it learns, in a plain loop: the digits of scikit-learn, 90 % of zeros.

    python examples/plain_loop.py

Needs pip install scikit-learn. One epoch takes about a second.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.training import Cubic


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 64) from 0 to 1 and their labels, to train on and to test on."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return images[train], labels[train], images[test], labels[test]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="two epochs, to see that it runs")
    options = parser.parse_args(arguments)
    epochs = 2 if options.tiny else options.epochs
    torch.manual_seed(0)
    train, labels, test, expected = digits()
    batches = len(train) // 50
    steps = epochs * batches

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    model.append(nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = Cubic(0.0, options.sparsity, start=steps // 10, end=steps * 2 // 3, every=10)
    pruner = torchprune.Pruner(model, MagnitudeSpec(options.sparsity), schedule)

    for epoch in range(epochs):
        for some in torch.randperm(len(train)).chunk(batches):
            loss = nn.functional.cross_entropy(model(train[some]), labels[some])
            loss.backward()
            optimizer.step()
            pruner.step(optimizer)
            optimizer.zero_grad()
        right = accuracy(model, test, expected)
        print(f"epoch {epoch + 1:2d}  sparsity {pruner.sparsity:.3f}  accuracy {right:.3f}")
    print(torchprune.report(model))
    torchprune.fold(model)  # plain modules again, zeros exact
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
