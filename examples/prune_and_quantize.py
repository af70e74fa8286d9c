"""Two of every four weights gone and the rest in four bits, in one sweep or one after the other.

    python examples/prune_and_quantize.py    # a random net, seconds

Needs pip install 'torchprune[quant]'.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn
from torchao.quantization import quantize_

import torchprune
from torchprune import SparseGPTSpec
from torchprune.training import Int4, lost_zeros


def main(arguments: list[str] | None = None) -> None:
    """Prune and quantize both ways, and compare what each moves outputs by."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="fewer batches")
    count = 4 if parser.parse_args(arguments).tiny else 64
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))
    mixed = torch.randn(128, 128) / 8  # inputs that go together, as real ones do
    data = [torch.randn(64, 128) @ mixed for _ in range(count)]
    grid = Int4(group=32)

    joint = torchprune.sparsify(
        copy.deepcopy(dense), SparseGPTSpec(pattern="2:4", quantize=grid), data, progress=False
    )
    after = torchprune.sparsify(
        copy.deepcopy(dense), SparseGPTSpec(pattern="2:4"), data, progress=False
    )
    for name, model in {"one sweep": joint, "one after the other": after}.items():
        masks = torchprune.masks(model)
        quantize_(torchprune.fold(model), grid.torchao())
        assert lost_zeros(model, masks) == {}
        with torch.no_grad():
            wanted = dense(data[0])
            off = (model(data[0]) - wanted).square().mean() / wanted.square().mean()
        print(f"{name:20} outputs moved by {float(off):.2%}, every zero kept")


if __name__ == "__main__":
    main()
