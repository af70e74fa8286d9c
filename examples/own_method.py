"""A score and a solver of your own, put through the same laws as the library's methods.

python examples/own_method.py    # seconds
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import torchprune
from torchprune import ScoreSpec, SolverSpec, WandaSpec
from torchprune.masking.projection import project
from torchprune.testing import check_laws


def by_variance(weight: Tensor, moments: Any) -> Tensor:
    """A weight is worth more where its input varies."""
    spread = moments.square / moments.rows - moments.mean.square()
    return weight.abs() * spread.clamp_min(0).sqrt()


def refitted(weight: Tensor, moments: Any, pattern: Any, sparsity: float) -> tuple[Tensor, Tensor]:
    """That mask, and what is kept of each row refitted to the row's outputs."""
    mask = project(by_variance(weight, moments), pattern, sparsity, "row")
    gram = moments.gram.double()
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    wanted, new = weight.double() @ gram, torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        new[row, kept] = torch.linalg.solve(gram[kept][:, kept], wanted[row, kept]).float()
    return new, mask


def make() -> nn.Module:
    """Stands for your model."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))


def main(arguments: list[str] | None = None) -> None:
    """Check the laws, and compare with Wanda."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the same: it is tiny")
    parser.parse_args(arguments)
    torch.manual_seed(1)
    data = [torch.randn(128, 32) * torch.linspace(0.1, 2, 32) + 1 for _ in range(4)]
    specs = {
        "wanda": WandaSpec(pattern="2:4"),
        "my score": ScoreSpec(score=by_variance, pattern="2:4"),
        "my solver": SolverSpec(solve=refitted, pattern="2:4"),
    }
    for spec in specs.values():
        check_laws(make, spec, data)
    dense = make()

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(data[0]) - dense(data[0])).square().mean())

    print(torchprune.compare(make, specs, data, error, progress=False))


if __name__ == "__main__":
    main()
