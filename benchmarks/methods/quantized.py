"""Pruned and quantized: in one sweep, or one after the other?

SmolLM2 in float32, Wikipedia articles to calibrate on, other articles and news to evaluate on. Each
pattern and grid four ways: SparseGPT alone; then its weights rounded to the nearest value, as
torchao does; then GPTQ in a second calibration, on what the pruned model computes, with the zeros
kept as the usual tools keep them (only kept weights make up for an error); and SparseGPT's
`quantize=`, which is one sweep. The layers' error is the mean of what the reports say, against the
weights that came into the layer: for GPTQ, which prunes nothing, it is of rounding alone, and is
not shown.

    python benchmarks/methods/quantized.py --windows 16 --evaluate 16 --table quantized.md
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

import torchprune
from torchprune import SparseGPTSpec
from torchprune.checkpoint.whole_files import write_whole
from torchprune.masking.mask import masked_layers, original_of
from torchprune.methods.factor import factorise
from torchprune.methods.grid import plain_scale, rounded
from torchprune.specs.method import Solution, Task
from torchprune.specs.quantize import Grid
from torchprune.training import Int4, Int8

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import smollm2

GOALS: dict[str, tuple[dict[str, Any], Grid]] = {
    "2:4, int4 in groups of 32": ({"pattern": "2:4"}, Int4(group=32)),
    "2:4, int4 in groups of 64": ({"pattern": "2:4"}, Int4(group=64)),
    "50 %, int8 by row": ({"sparsity": 0.5}, Int8()),
    "50 %, int4 in groups of 64": ({"sparsity": 0.5}, Int4(group=64)),
}


@dataclass(frozen=True)
class GPTQAfter(SparseGPTSpec):
    """GPTQ of the weights that a mask keeps, column by column, as it is usually written down."""

    method: ClassVar[str] = "gptq after"

    def solution(self, task: Task) -> list[Solution]:
        """Each matrix by itself; what a mask pruned stays zero and makes up for nothing."""
        assert self.quantize is not None
        rows = task.moments.rows
        factor = factorise(task.moments.gram, rows, self.damping, task.moments.layer)
        found = []
        for weight, bar in zip(task.weights, task.barred, strict=True):
            assert bar is not None
            w, keep = weight.float().clone(), ~bar
            scale = plain_scale(w, self.quantize, weight.dtype)
            width = self.quantize.group or w.shape[1]
            for j in range(w.shape[1]):
                at = scale[:, j // width].unsqueeze(1)
                value = rounded(w[:, j : j + 1].contiguous(), at, replace(self.quantize, group=1))
                error = (w[:, j : j + 1] - value) / factor.upper[j, j]
                w[:, j + 1 :] -= (error * factor.upper[j, j + 1 :]) * keep[:, j + 1 :]
                w[:, j : j + 1] = value
            found.append(Solution(w, keep))
        return found


def to_nearest(model: nn.Module, grid: Grid) -> None:
    """Round every masked weight to the nearest value of a grid, in place."""
    with torch.no_grad():
        for layer, _ in masked_layers(model):
            weight = original_of(layer.module, layer.tensor)
            weight.copy_(rounded(weight, plain_scale(weight, grid, weight.dtype), grid))


def main() -> None:
    """Run what the arguments ask for; results are kept in the output as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goals", default=";".join(GOALS), help="by semicolons")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--evaluate", type=int, default=40, help="held-out windows of each source")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--output", type=Path, help="JSON of all runs so far")
    parser.add_argument("--table", type=Path, help="the table as Markdown")
    options = parser.parse_args()

    tokenizer, dense = smollm2.load_tokenizer(), smollm2.load_model()
    calibration, held_out = smollm2.split(smollm2.wikipedia_articles())
    count = options.evaluate * options.length
    texts = {
        "Wikipedia": smollm2.tokens(tokenizer, held_out)[:count],
        "news": smollm2.tokens(tokenizer, smollm2.news_articles())[:count],
    }
    data = smollm2.windows(tokenizer, calibration, options.windows, options.length, 0).split(1)
    found: dict[str, dict[str, float | None]] = {}
    if options.output and options.output.exists():
        found = json.loads(options.output.read_text("utf-8"))
    bar = tqdm(total=1 + 4 * len(options.goals.split(";")), unit="run")

    def note(name: str, model: nn.Module, seconds: float | None, error: float | None) -> None:
        whole = torchprune.fold(copy.deepcopy(model))
        found[name] = {"seconds": seconds, "error": error} | {
            name: float(torchprune.perplexity(whole, ids, seqlen=options.length))
            for name, ids in texts.items()
        }
        if options.output:
            write_whole(options.output, json.dumps(found, indent=1) + "\n")
        bar.update()

    def pruned(model: nn.Module, spec: SparseGPTSpec) -> tuple[nn.Module, float, float]:
        start = time.perf_counter()
        torchprune.sparsify(model, spec, data, progress=False)
        seconds = time.perf_counter() - start
        errors = [layer.error for layer in torchprune.report(model).layers]
        return model, seconds, fmean(e for e in errors if e is not None)

    if "dense" not in found:
        note("dense", dense, None, None)
    alone: dict[str, nn.Module] = {}
    for goal in options.goals.split(";"):
        options_of, grid = GOALS[goal]
        pattern = goal.split(", ")[0]
        if f"one sweep | {goal}" in found:
            bar.update(4)
            continue
        if pattern not in alone:
            alone = {pattern: (run := pruned(copy.deepcopy(dense), SparseGPTSpec(**options_of)))[0]}
            note(f"pruned alone | {pattern}", *run)
        after = copy.deepcopy(alone[pattern])
        to_nearest(after, grid)
        note(f"then nearest | {goal}", after, None, None)
        after = copy.deepcopy(alone[pattern])
        after, seconds, _ = pruned(after, GPTQAfter(**options_of, quantize=grid))
        note(f"then GPTQ | {goal}", after, seconds, None)
        note(
            f"one sweep | {goal}",
            *pruned(copy.deepcopy(dense), SparseGPTSpec(**options_of, quantize=grid)),
        )
    print(table(found))
    if options.table:
        options.table.write_text(f"{table(found)}\n")


def table(found: dict[str, dict[str, float | None]]) -> str:
    """Markdown."""
    lines = [
        "| weights | how | Wikipedia | news | layers' error | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, values in found.items():
        how, _, goal = name.partition(" | ")
        error, seconds = values["error"], values["seconds"]
        cells = [f"{values[text]:.2f}" for text in ("Wikipedia", "news")]
        cells.append("" if error is None else f"{error:.4f}")
        cells.append("" if seconds is None else f"{seconds:.0f}")
        lines.append(f"| {goal or 'dense'} | {how if goal else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
