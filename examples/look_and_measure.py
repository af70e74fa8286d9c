"""Did it pay? Answers, speed and a page: a pruned model beside the dense one.

    python examples/look_and_measure.py [--output DIR]

A classifier of random clusters takes seconds: pruned by Wanda, asked the same questions as the
dense model with a test of whether the difference is chance, timed in turns, and put on one page.
The page needs pip install 'torchprune[page]'.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import nn

import torchprune
from torchprune.reports.page import joined, save_page


def classifier() -> tuple[nn.Module, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """A trained net, batches to calibrate on, and points with classes to judge by."""
    torch.manual_seed(0)
    centres = torch.randn(8, 64)
    classes = torch.randint(8, (1200,))
    points = centres[classes] + 2 * torch.randn(1200, 64)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(points[:800]), classes[:800]).backward()
        optimizer.step()
    return net.eval(), list(points[:800].split(100)), points[800:], classes[800:]


def main(arguments: list[str] | None = None) -> None:
    """Prune, ask both, time both, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("measured"), metavar="DIR")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    dense, batches, points, classes = classifier()
    net = copy.deepcopy(dense)
    torchprune.sparsify(net, torchprune.WandaSpec(0.7), batches, progress=False)

    def right(model: nn.Module) -> list[float]:
        """1 for each point that is classified as it should be: `evaluate` pairs them."""
        with torch.no_grad():
            return (model(points).argmax(1) == classes).float().tolist()

    answers = torchprune.evaluate(net, {"accuracy": right}, against=dense, progress=False)
    print(answers)
    speed = torchprune.profile(
        net,
        batches[0],
        against=dense,
        rows=(1, 64),
        forms=("eager", "bitmask"),
        seconds=0.05,
        prospects=False,
        progress=False,
    )
    print(speed)
    report = torchprune.report(net)
    save_page(joined("A pruned classifier", report, answers, speed), options.output / "page.html")
    print(f"wrote {options.output / 'page.html'}")


if __name__ == "__main__":
    main()
