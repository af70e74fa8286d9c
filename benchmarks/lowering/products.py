"""Time of one linear layer's product on the CPU: bitmask weights against dense ones.

    python benchmarks/lowering/products.py [--shape 4096x4096] [--repeats 60]
        [--batches 1,2,4,8,16,32,64] [--form NAME] [--output FILE.json]

Weights rotate through sets that no cache holds, as they do when a model decodes. Contenders take
turns within one loop, so that a busy machine hurts them alike; medians are compared. "read" is
what reading that many bytes takes a sum over a large tensor: the memory's floor.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from torchprune import MagnitudeSpec, kernels, sparsify
from torchprune.lowering.bitmask import Bitmask

BEYOND_CACHES = 1 << 28  # bytes
SHARES = (0.0, 0.5, 0.7, 0.8)

Run = Callable[[Tensor, int], object]


def multiply(x: Tensor, packed: Bitmask) -> Tensor:
    """x W^T."""
    found: Tensor = torch.ops.torchprune.bitmask_linear(
        x, packed.bits, packed.values, packed.starts, packed.scales, None, packed.cols
    )
    return found


def pruned(weight: Tensor, pattern: str, share: float) -> Tensor:
    """The weight with its smallest values set to zero."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    spec = MagnitudeSpec(pattern=pattern, sparsity=share)
    return sparsify(torch.nn.Sequential(layer), spec, progress=False)[0].weight.detach()


def in_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded to int8 with a scale a row."""
    scales = weight.float().abs().amax(1) / 127
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def contenders(rows: int, cols: int) -> dict[str, tuple[Run, float]]:
    """Name -> product with the i-th set of weights, and the bytes of one set."""
    sets = max(2, min(8, BEYOND_CACHES // (rows * cols * 2)))
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(rows, cols, generator=generator) for _ in range(sets)]
    narrow = [w.bfloat16() for w in wide]
    eight = [in_int8(w) for w in narrow]
    scales = [s.bfloat16() for _, s in eight]
    size = rows * cols
    found: dict[str, tuple[Run, float]] = {
        "torch float32": (lambda x, i: F.linear(x.float(), wide[i % sets]), 4 * size),
        "torch bfloat16": (lambda x, i: F.linear(x, narrow[i % sets]), 2 * size),
        "torch int8": (
            lambda x, i: torch._weight_int8pack_mm(x, eight[i % sets][0], scales[i % sets]),
            size,
        ),
    }

    def add(name: str, packed: list[Bitmask]) -> None:
        found[name] = (lambda x, i: multiply(x, packed[i % sets]), packed[0].nbytes)

    for share in SHARES:
        sparse = [pruned(w, "unstructured", share) if share else w for w in narrow]
        add(f"bitmask bfloat16 {share:.0%}", [Bitmask.pack(w) for w in sparse])
    add("bitmask bfloat16 2:4", [Bitmask.pack(pruned(w, "2:4", 0.5)) for w in narrow])
    for share in SHARES[:2]:
        sparse = [pruned(w, "unstructured", share) if share else w for w in narrow]
        add(f"bitmask int8 {share:.0%}", [Bitmask.pack(*in_int8(w)) for w in sparse])
    return found


def measure(runs: dict[str, tuple[Run, float]], x: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-2, repeats):
        for name, (run, _) in runs.items():
            start = time.perf_counter()
            run(x, i)
            if i >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in times.items()}


def bandwidth() -> float:
    """Bytes a second that a sum over a large tensor reads."""
    large = torch.ones(BEYOND_CACHES // 4)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        large.sum()
        times.append(time.perf_counter() - start)
    return BEYOND_CACHES / median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096x4096", help="rows x columns of the weight")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64", help="rows of input")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--form", help="AVX-512 BF16, AVX-512, AVX2 or portable")
    parser.add_argument("--output", type=Path, help="write the medians to this JSON file")
    options = parser.parse_args()
    rows, cols = map(int, options.shape.split("x"))
    if options.form:
        kernels.use_form(options.form)
    speed = bandwidth()
    runs = contenders(rows, cols)
    print(f"{rows}x{cols}, {torch.get_num_threads()} threads, torch {torch.__version__}; ", end="")
    print(f"{kernels.native()}; memory reads {speed / 1e9:.1f} GB/s\n")
    batches = [int(b) for b in options.batches.split(",")]
    found = {}
    for batch in batches:
        x = torch.randn(batch, cols, generator=torch.Generator().manual_seed(1)).bfloat16()
        found[batch] = measure(runs, x, options.repeats)
    head = [f"{b} row{'s' * (b > 1)}" for b in batches]
    print(f"| milliseconds (times torch bfloat16) | of the floor | {' | '.join(head)} |")
    print("| --- |" + " ---: |" * (len(batches) + 1))
    for name, (_, size) in runs.items():
        floor = size / speed / found[batches[0]][name]
        cells = [
            f"{found[b][name] * 1e3:.2f} ({found[b]['torch bfloat16'] / found[b][name]:.2f})"
            for b in batches
        ]
        print(f"| {name} | {floor:.0%} | {' | '.join(cells)} |")
    if options.output:
        options.output.write_text(json.dumps({"bandwidth": speed, "seconds": found}, indent=2))


if __name__ == "__main__":
    main()
