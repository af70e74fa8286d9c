"""What masks cost under inductor: a compiled stack of layers, dense, masked, folded.

    python benchmarks/lowering/compiled.py [--rows 1] [--width 2048] [--layers 8] [--repeats 60]

With frozen weights (`torch._inductor.config.freezing`, in `torch.no_grad`) masking is computed
once, when the model is compiled. Contenders take turns; medians are compared.
"""

import argparse
import copy
import time
from statistics import median

import torch
import torch._inductor.config as inductor
from torch import nn

import torchprune
from torchprune import MagnitudeSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    inductor.freezing = True
    width = options.width
    dense = nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(options.layers))
    ).eval()
    masked = torchprune.sparsify(copy.deepcopy(dense), MagnitudeSpec(), progress=False)
    folded = torchprune.fold(copy.deepcopy(masked))
    x = torch.randn(options.rows, width)
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        runs = {
            "dense, compiled": torch.compile(dense),
            "masked, compiled": torch.compile(masked),
            "folded, compiled": torch.compile(folded),
            "dense, eager": dense,
            "masked, eager": masked,
        }
        for turn in range(-3, options.repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run(x)
                if turn >= 0:
                    times.setdefault(name, []).append(time.perf_counter() - start)
    base = median(times["dense, compiled"])
    print(f"| {options.layers} layers of {width}, {options.rows} rows | ms | times dense |")
    print("| --- | ---: | ---: |")
    for name, found in times.items():
        print(f"| {name} | {median(found) * 1e3:.2f} | {median(found) / base:.3f} |")


if __name__ == "__main__":
    main()
