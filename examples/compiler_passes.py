"""Masks in graphs: passes over an exported program, and a backend for torch.compile.

python examples/compiler_passes.py         # compiles with inductor: needs a C++ compiler
python examples/compiler_passes.py --tiny  # without inductor, seconds
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import torchprune
from torchprune import MagnitudeSpec, WandaSpec, passes


def main(arguments: list[str] | None = None) -> None:
    """Prune a program, fold and pack it; compile a masked module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="no inductor")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    x = torch.randn(4, 64)

    program = torch.export.export(net, (x,))
    data = [torch.randn(4, 64) for _ in range(8)]
    pruned = torchprune.sparsify(program, WandaSpec(), data, progress=False)  # a new program
    by_hand = passes.insert_masks(program, {"0.weight": torch.rand(128, 64) < 0.5})
    print(by_hand)
    folded = passes.fold_masks(by_hand.program)
    print(folded)
    packed = passes.pack_linears(folded.program)
    print(packed)
    with torch.no_grad():
        expected = by_hand.program.module()(x)
        assert torch.equal(folded.program.module()(x), expected)
        torch.testing.assert_close(packed.program.module()(x), expected, rtol=1e-3, atol=1e-4)
        print(f"zeros by Wanda move outputs by {float((pruned.module()(x) - net(x)).std()):.3f}")

    torchprune.sparsify(net, MagnitudeSpec(), progress=False)
    rest = {"backend": "eager"} if options.tiny else {}
    fast = torch.compile(net, backend="torchprune", options=rest)  # the module keeps its masks
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-3, atol=1e-4)
    print("compiled: the masked module's outputs")


if __name__ == "__main__":
    main()
