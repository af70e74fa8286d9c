"""A plain CNN on handwritten digits, its channels pruned, trained on, and removed.

    python examples/cnn_channels.py          # about a minute on two cores
    python examples/cnn_channels.py --tiny   # seconds

First in one step, by hand: mask channels, remove them, fine-tune the smaller net. Then level by
level, as far as the accuracy stays within a point and a half of the dense net's, and removed last.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import torchprune
from torchprune.training import History, Within

Split = tuple[Tensor, Tensor]


def digits(test: int = 597) -> tuple[Split, Split]:
    """Images (n, 1, 8, 8) with mean 0 and deviation 1, and their digits: to train, to test."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x = ((images.float() - images.float().mean()) / images.float().std()).view(-1, 1, 8, 8)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], labels.long()[order]
    return (x[test:], y[test:]), (x[:test], y[:test])


def make_cnn() -> nn.Module:
    """Three convolutions with norms, and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def trainer(split: Split, epochs: int) -> Callable[[nn.Module], None]:
    """A plain training loop, which knows nothing of masks."""
    x, y = split

    def train(model: nn.Module) -> None:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(60):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()

    return train


def scorer(split: Split) -> Callable[[nn.Module], dict[str, float]]:
    """Accuracy on held-out digits."""
    x, y = split

    @torch.no_grad()
    def score(model: nn.Module) -> dict[str, float]:
        model.eval()
        return {"accuracy": float((model(x).argmax(1) == y).double().mean())}

    return score


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main(given: Sequence[str] | None = None) -> History:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, help="a directory that an interrupted run goes on in")
    parser.add_argument("--tiny", action="store_true", help="one epoch, to see it run")
    options = parser.parse_args(given)
    epochs = 1 if options.tiny else 6
    to_train, to_test = digits()
    train, score = trainer(to_train, epochs), scorer(to_test)
    batches = to_train[0][:256].split(64)

    torch.manual_seed(0)
    dense = make_cnn()
    train(dense)
    print(f"dense: {size_of(dense)} parameters, accuracy {score(dense)['accuracy']:.4f}")

    small = copy.deepcopy(dense).eval()
    torchprune.sparsify(small, torchprune.ChannelSpec(0.5), batches)
    torchprune.shrink(small, torchprune.plan_shrink(small, batches[0]))
    before = score(small)["accuracy"]
    train(small)
    after = score(small)["accuracy"]
    print(f"half of the channels: {size_of(small)} parameters, accuracy {before:.4f}, {after:.4f}")

    levels = [0.5, 0.75] if options.tiny else [0.25, 0.5, 0.625, 0.75, 0.875]
    history = torchprune.prune_iteratively(
        dense,
        torchprune.ChannelSpec(),
        levels,
        batches,
        train=train,
        evaluate=score,
        stop=Within(0.015),
        path=options.path,
    )
    print(history)
    masked = score(dense)["accuracy"]
    torchprune.shrink(dense, torchprune.plan_shrink(dense, batches[0]))
    removed = score(dense)["accuracy"]
    print(
        f"kept {history.kept.asked}: {size_of(dense)} parameters, accuracy {masked:.4f} masked, "
        f"{removed:.4f} removed"
    )
    return history


if __name__ == "__main__":
    main()
