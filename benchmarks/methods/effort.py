"""What does better cost? Seconds of BestSpec's efforts and of ADMM beside SparseGPT's.

SmolLM2 in float32, or its first blocks, and Wikipedia articles to calibrate on. The methods take
turns, round after round, so that a busy machine hurts them alike; what is shown is each method's
median and the median of its ratios to SparseGPT in the same round. The clock covers `sparsify`
alone. Training ends early where a block gains no more, which later blocks do more often than
earlier ones: a few blocks show the largest ratio.

    python benchmarks/methods/effort.py --goals "50 %,60 %,2:4"           # the whole model, once
    python benchmarks/methods/effort.py --goals "60 %" --blocks 6 --repeats 3 --output effort.json
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from quality import BASE, GOALS, specs
from tqdm import tqdm

import torchprune
from torchprune.checkpoint.whole_files import write_whole

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import smollm2


def main() -> None:
    """Run what the arguments ask for; all seconds so far are in the output after every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goals", default="60 %")
    parser.add_argument("--methods", default="ADMM;best, fast;best, balanced", help="by semicolons")
    parser.add_argument("--blocks", type=int, default=0, help="the first so many (default: all)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model()
    if options.blocks:
        model.model.layers = model.model.layers[: options.blocks]
    calibration, _ = smollm2.split(smollm2.wikipedia_articles())
    data = smollm2.windows(tokenizer, calibration, options.windows, options.length, 0).split(1)
    names = [BASE, *options.methods.split(";")]
    seconds: dict[str, dict[str, list[float]]] = {
        goal: {name: [] for name in names} for goal in options.goals.split(",")
    }
    rounds = [(goal, name) for goal in seconds for _ in range(options.repeats) for name in names]
    for goal, name in tqdm(rounds, unit="run"):
        pruned, spec = copy.deepcopy(model), specs(GOALS[goal])[name]
        start = time.perf_counter()
        torchprune.sparsify(pruned, spec, data, progress=False)
        seconds[goal][name].append(time.perf_counter() - start)
        if options.output:
            found = {"blocks": len(model.model.layers), "windows": options.windows}
            found |= {"threads": torch.get_num_threads(), "seconds": seconds}
            write_whole(options.output, json.dumps(found, indent=1) + "\n")
    print(table(seconds))


def table(seconds: dict[str, dict[str, list[float]]]) -> str:
    """Medians, as Markdown."""
    lines = ["| method | goal | seconds | of SparseGPT's |", "| --- | --- | ---: | ---: |"]
    for goal, runs in seconds.items():
        for name, own in runs.items():
            ratio = median(a / b for a, b in zip(own, runs[BASE], strict=True))
            lines.append(f"| {name} | {goal} | {median(own):.1f} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
