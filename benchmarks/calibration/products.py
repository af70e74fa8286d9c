"""What does it cost to watch a forward's products? `sparsify` beside itself with module hooks.

SmolLM2 in float32, or its first blocks, and Wikipedia articles to calibrate on. Products are
watched by a torch function mode; with hooks each layer's input is taken where its module is called,
which sees only modules. Both take turns, round after round; what is shown is each one's median and
the median of their ratios in the same round. The masks must be equal to the bit.

    python benchmarks/calibration/products.py --blocks 6 --repeats 5
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import torchprune
from torchprune import SparseGPTSpec, WandaSpec
from torchprune.masking.reading import Reading

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import smollm2

SPECS = {
    "Wanda": WandaSpec(),
    "Wanda 2:4": WandaSpec(pattern="2:4"),
    "SparseGPT": SparseGPTSpec(),
    "SparseGPT by layers": SparseGPTSpec(sequential="layer"),
}


@contextmanager
def hooks() -> Iterator[None]:
    """Have every layer be observed where its module is called."""
    module = sys.modules["torchprune.sparsify"]
    make_plan = module.make_plan  # type: ignore[attr-defined]

    def hooked(*args: Any) -> Any:
        plan = make_plan(*args)
        targets = [replace(t, reading=Reading(t.view, hooked=True)) for t in plan.targets]
        return replace(plan, targets=targets)

    module.make_plan = hooked  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.make_plan = make_plan  # type: ignore[attr-defined]


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(SPECS))
    parser.add_argument("--blocks", type=int, default=0, help="the first so many (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--cpu-time", action="store_true", help="of all threads: on a busy machine")
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter

    tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model()
    if options.blocks:
        model.model.layers = model.model.layers[: options.blocks]
    calibration, _ = smollm2.split(smollm2.wikipedia_articles())
    data = smollm2.windows(tokenizer, calibration, options.windows, options.length, 0).split(1)
    ways = {"hooks": hooks, "products": nullcontext}
    for name in options.methods.split(","):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        masks: list[dict[str, torch.Tensor]] = []
        for turn in tqdm(range(options.repeats), desc=name):
            for way in list(ways)[:: 1 if turn % 2 else -1]:
                pruned = copy.deepcopy(model)
                with ways[way]():
                    start = clock()
                    torchprune.sparsify(pruned, SPECS[name], data, progress=False)
                    seconds[way].append(clock() - start)
                masks.append({k: v.clone() for k, v in torchprune.masks(pruned).items()})
        same = all(torch.equal(m[k], masks[0][k]) for m in masks for k in masks[0])
        ratio = median(b / a for a, b in zip(*seconds.values(), strict=True))
        print(
            f"{name}: hooks {median(seconds['hooks']):.1f} s, products "
            f"{median(seconds['products']):.1f} s, ratio {ratio:.3f}; masks "
            + ("equal to the bit" if same else "DIFFER")
        )


if __name__ == "__main__":
    main()
