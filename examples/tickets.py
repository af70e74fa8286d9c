"""Lottery tickets on handwritten digits: sparse nets that train as well as the whole.

    python examples/tickets.py            # some minutes on two cores; writes tickets/
    python examples/tickets.py --tiny     # seconds

A perceptron of 64-300-100-10 (LeNet-300-100 on scikit-learn's 8x8 digits) is trained, pruned by
magnitude, taken back to its first weights and trained again, round after round. Each round's
masks are also tried with new weights, and as many random ones with the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import torchprune
from torchprune.training import Tickets

Split = tuple[Tensor, Tensor]


def digits(test: int = 597) -> tuple[Split, Split]:
    """Images as (n, 64) floats with mean 0 and deviation 1, and their digits: to train, to test."""
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    x = (images.float() - images.float().mean()) / images.float().std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], labels.long()[order]
    return (x[test:], y[test:]), (x[:test], y[:test])


def make_model() -> nn.Module:
    """LeNet-300-100 for 8x8 images."""
    return nn.Sequential(
        nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def search(
    rounds: int, seeds: int, epochs: int, last: float, path: Path | None, lr: float = 1.2e-3
) -> Tickets:
    """Train all nets."""
    (x, y), (x_test, y_test) = digits()

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(60):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()

    @torch.no_grad()
    def accuracy(model: nn.Module) -> dict[str, float]:
        right = model(x_test).argmax(1) == y_test
        return {"accuracy": float(right.double().mean())}

    return torchprune.find_ticket(
        make_model,
        train,
        torchprune.MagnitudeSpec(last),
        evaluate=accuracy,
        rounds=rounds,
        seeds=seeds,
        path=path,
    )


STYLE = """<style>
  .paper { fill: #ffffff } text { fill: #1f2328 }
  @media (prefers-color-scheme: dark) { .paper { fill: #0d1117 } text { fill: #f0f6fc } }
</style>
<rect class="paper" width="100%" height="100%"/>
"""


def draw(found: Tickets, path: Path) -> None:
    """The figure as a small SVG that follows the reader's light or dark mode."""
    from matplotlib import rc_context

    figure = found.figure()
    (axes,) = figure.axes
    axes.legend(fontsize="small", frameon=False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tickets"}):
        figure.savefig(path, transparent=True, metadata={"Date": None})
    text = path.read_text("utf-8").replace("#000000", "#8c959f")
    head, tag, rest = text.partition("<metadata>")
    path.write_text(head + STYLE + tag + rest, "utf-8")


def main(given: Sequence[str] | None = None) -> Tickets:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("tickets"))
    parser.add_argument("--tiny", action="store_true", help="two rounds, to see it run")
    options = parser.parse_args(given)
    sizes = (2, 2, 1, 0.75) if options.tiny else (8, 5, 15, 0.99)
    found = search(*sizes, path=options.output)
    print(found)
    draw(found, options.output / "tickets.svg")
    return found


if __name__ == "__main__":
    main()
