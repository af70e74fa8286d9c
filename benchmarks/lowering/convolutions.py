"""Convolutions lowered to a bitmask against dense ones, by shape, positions and zeros.

Processor time of one thread, dense and lowered in turns, float32, batch 1; shapes of ResNet-50.
A ratio below 1 is faster.

    python benchmarks/lowering/convolutions.py --sparsity 0.5 0.8 0.95
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.lowering.kernels import operators

SHAPES = [  # in, out, kernel, side of the output
    (512, 512, 3, 7),
    (2048, 512, 1, 7),
    (512, 2048, 1, 7),
    (256, 256, 3, 14),
    (1024, 256, 1, 14),
    (128, 128, 3, 28),
    (64, 64, 3, 56),
]


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.95])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(operators.native())
    shares = " | ".join(f"{share:.0%} zero" for share in options.sparsity)
    print(f"| convolution | positions | dense, ms | {shares} | bytes at 50 % |")
    print("| --- | ---: | ---: |" + " ---: |" * (len(options.sparsity) + 1))
    for inner, out, kernel, side in SHAPES:
        conv = nn.Conv2d(inner, out, kernel, padding=kernel // 2, bias=False)
        dense = nn.Sequential(conv).eval()
        x, cells, took = torch.randn(1, inner, side, side), [], 0.0
        for share in options.sparsity:
            pruned = copy.deepcopy(dense)
            torchprune.sparsify(pruned, MagnitudeSpec(share), progress=False)
            torchprune.fold(pruned)
            lowered = torchprune.lower(copy.deepcopy(pruned), "bitmask", targets="0")
            with torch.no_grad():
                assert torch.allclose(lowered(x), pruned(x), atol=1e-3)
                times: list[tuple[float, float]] = [
                    (seconds(lambda: pruned(x)), seconds(lambda: lowered(x)))  # noqa: B023
                    for _ in range(options.rounds)
                ]
            took, ours = (median(some) for some in zip(*times, strict=True))
            cells.append(f"{ours / took:.2f}")
        half = torchprune.sparsify(copy.deepcopy(dense), MagnitudeSpec(0.5), progress=False)
        (plan,) = torchprune.plan_lowering(half, "bitmask", targets="0").layers
        name = f"{inner} to {out}, {kernel}x{kernel}"
        size = f"{plan.after / plan.before:.3f}"
        print(f"| {name} | {side**2} | {1e3 * took:.2f} | {' | '.join(cells)} | {size} |")


if __name__ == "__main__":
    main()
