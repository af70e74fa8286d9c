"""Sparse from the first step: a small net on handwritten digits, by each way to learn its zeros.

    python examples/from_scratch.py          # some two minutes
    python examples/from_scratch.py --tiny   # seconds

At 2:4 and at 95 % zeros: dense, masks of the random beginning that stay (static), masks that come
bit by bit (gradual), masks that exchange weights (SET, RigL), and weights that all go on learning
under masks (SR-STE). Each row is the mean error on test images over the seeds, with its deviation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, Pruner
from torchprune.training import SET, Constant, Cubic, OneShot, RigL, StraightThrough


@dataclass(frozen=True)
class Digits:
    """sklearn's 1797 images of 64 pixels, cut in two."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @staticmethod
    def load(test: int = 597) -> Digits:
        from sklearn.datasets import load_digits

        x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = x[order].float() / 16, y[order].long()
        return Digits(x[test:], y[test:], x[:test], y[:test])


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


Ways = dict[str, Callable[[int], dict[str, Any]]]
"""What a `Pruner` is given, by the number of steps of the whole training."""

HIDDEN = ["0", "2"]
"""The layers to prune; the last one is small and stays dense."""

GROUPS: Ways = {
    "2:4 static": lambda n: {"schedule": OneShot(0.5)},
    "2:4 gradual": lambda n: {"schedule": Cubic(0.0, 0.5, n // 10, n // 2, n // 40)},
    "2:4 SET": lambda n: {
        "schedule": Constant(0.5, end=3 * n // 4, every=n // 40),
        "regrow": SET(),
    },
    "2:4 RigL": lambda n: {
        "schedule": Constant(0.5, end=3 * n // 4, every=n // 40),
        "regrow": RigL(),
    },
    "2:4 SR-STE": lambda n: {"schedule": Constant(0.5), "regrow": StraightThrough()},
}
FREE: Ways = {
    "95 % static": lambda n: {"schedule": OneShot(0.95)},
    "95 % gradual": lambda n: {"schedule": Cubic(0.0, 0.95, n // 10, n // 2, n // 40)},
    "95 % SET": lambda n: {
        "schedule": Constant(0.95, end=3 * n // 4, every=n // 40),
        "regrow": SET(),
    },
    "95 % RigL": lambda n: {
        "schedule": Constant(0.95, end=3 * n // 4, every=n // 40),
        "regrow": RigL(),
    },
    "95 % SR-STE": lambda n: {"schedule": Constant(0.95), "regrow": StraightThrough()},
}


def learn(model: nn.Module, digits: Digits, steps: int, pruner: Pruner | None, seed: int) -> float:
    """Train, and give the error on the test images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(digits.x), (64,), generator=order)
        loss = nn.functional.cross_entropy(model(digits.x[some]), digits.y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if pruner is not None:
            pruner.step(optimizer)
    with torch.no_grad():
        wrong = model.eval()(digits.test_x).argmax(1) != digits.test_y
    return float(wrong.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few steps of each, in seconds")
    options = parser.parse_args()
    steps, seeds = (40, range(1)) if options.tiny else (1000, range(5))
    digits = Digits.load()
    specs: dict[str, tuple[Any, Any]] = {"dense": (None, None)}
    specs |= {name: (MagnitudeSpec(pattern="2:4", targets=HIDDEN), w) for name, w in GROUPS.items()}
    specs |= {name: (MagnitudeSpec(0.95, targets=HIDDEN), w) for name, w in FREE.items()}
    print(f"{'':14}{'test error':>12}{'deviation':>12}{'zeros':>9}")
    for name, (spec, way) in specs.items():
        errors, zeros = [], 0.0
        for seed in seeds:
            model = make(seed)
            pruner = None if spec is None else Pruner(model, spec, **way(steps))
            errors.append(learn(model, digits, steps, pruner, seed))
            zeros = torchprune.report(model).sparsity
        found = torch.tensor(errors)
        spread = float(found.std()) if len(found) > 1 else 0.0
        print(f"{name:14}{float(found.mean()):12.2%}{spread:12.2%}{zeros:9.2%}", flush=True)


if __name__ == "__main__":
    main()
