"""Pruned and quantized: in one sweep, or one after the other?

SmolLM2 in float32, Wikipedia articles to calibrate on, other articles and news to evaluate on. Each
pattern and grid four ways: SparseGPT alone; then each layer's weights rounded to the nearest value,
as torchao does; then GPTQ of each layer with the zeros kept as tools usually keep them, so that
only kept weights make up for rounding; and SparseGPT's `quantize=`, which is one sweep. Each layer
is calibrated on what the pruned and quantized layers before it give. The error is the mean of the
layers' own, as the report has it.

    python benchmarks/methods/quantized.py --output quantized.json --table quantized.md  # resumes
    python benchmarks/methods/quantized.py --blocks 3 --windows 8      # layers' errors and seconds
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
from torch import Tensor
from tqdm import tqdm

import torchprune
from torchprune import SparseGPTSpec
from torchprune.checkpoint.whole_files import write_whole
from torchprune.methods.factor import factorise
from torchprune.methods.grid import plain_scale, rounded
from torchprune.specs.method import Solution, Task
from torchprune.specs.quantize import Grid
from torchprune.training import Int4, Int8

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import smollm2

_BLOCK = 64

GOALS: dict[str, tuple[dict[str, Any], Grid]] = {
    "2:4, int4 in groups of 32": ({"pattern": "2:4"}, Int4(group=32)),
    "2:4, int4 in groups of 64": ({"pattern": "2:4"}, Int4(group=64)),
    "50 %, int8 by row": ({"sparsity": 0.5}, Int8()),
    "50 %, int4 in groups of 64": ({"sparsity": 0.5}, Int4(group=64)),
}


@dataclass(frozen=True)
class ThenNearest(SparseGPTSpec):
    """SparseGPT, and then what is kept rounded to the nearest value."""

    method: ClassVar[str] = "sparsegpt then nearest"

    def solution(self, task: Task) -> list[Solution]:
        """Of each matrix by itself."""
        assert self.quantize is not None
        found = []
        for one in replace(self, quantize=None)._pruned(task):
            scale = plain_scale(one.weight, self.quantize, torch.float32)
            found.append(Solution(rounded(one.weight, scale, self.quantize), one.keep))
        return found

    def _pruned(self, task: Task) -> list[Solution]:
        return SparseGPTSpec.solution(self, task)


@dataclass(frozen=True)
class ThenGPTQ(ThenNearest):
    """SparseGPT, and then GPTQ of what is kept, as it is usually written down."""

    method: ClassVar[str] = "sparsegpt then gptq"

    def solution(self, task: Task) -> list[Solution]:
        """What a mask pruned stays zero and makes up for nothing."""
        solved = replace(self, quantize=None)._pruned(task)
        rows = task.moments.rows
        factor = factorise(task.moments.gram, rows, self.damping, task.moments.layer)
        return [Solution(self._gptq(s.weight, s.keep, factor.upper), s.keep) for s in solved]

    def _gptq(self, weight: Tensor, keep: Tensor, whole: Tensor) -> Tensor:
        assert self.quantize is not None
        w, scale = weight.clone(), plain_scale(weight, self.quantize, torch.float32)
        single, width = replace(self.quantize, group=1), self.quantize.group or w.shape[1]
        for start in range(0, w.shape[1], _BLOCK):
            now, later = slice(start, start + _BLOCK), slice(start + _BLOCK, None)
            panel, mine, upper = w[:, now], keep[:, now], whole[now, now]
            errors = torch.zeros_like(panel)
            for j in range(panel.shape[1]):
                at = scale[:, (start + j) // width].unsqueeze(1)
                value = rounded(panel[:, j : j + 1], at, single)
                errors[:, j : j + 1] = (panel[:, j : j + 1] - value) / upper[j, j]
                spread = errors[:, j : j + 1] * upper[j, j + 1 :]
                panel[:, j + 1 :] -= spread * mine[:, j + 1 :]
                panel[:, j : j + 1] = value
            w[:, later] -= (errors @ whole[now, later]) * keep[:, later]
        return w


def runs(goals: list[str]) -> dict[str, SparseGPTSpec]:
    """What is compared, by name; SparseGPT alone once for each pattern."""
    found: dict[str, SparseGPTSpec] = {}
    for goal in goals:
        given, grid = GOALS[goal]
        found[f"pruned alone | {goal.split(', ')[0]}"] = SparseGPTSpec(**given)
        found[f"then nearest | {goal}"] = ThenNearest(**given, quantize=grid)
        found[f"then GPTQ | {goal}"] = ThenGPTQ(**given, quantize=grid)
        found[f"one sweep | {goal}"] = SparseGPTSpec(**given, quantize=grid)
    return found


def main() -> None:
    """Run what the arguments ask for; results are kept in the output as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goals", default=";".join(GOALS), help="by semicolons")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--evaluate", type=int, default=40, help="held-out windows of each source")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--draw", type=int, default=0, help="seed of the calibration windows")
    parser.add_argument("--blocks", type=int, default=0, help="the first so many, not evaluated")
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
    if options.blocks:
        dense.model.layers, texts = dense.model.layers[: options.blocks], {}
    data = smollm2.windows(tokenizer, calibration, options.windows, options.length, options.draw)
    batches = data.split(1)
    found: dict[str, dict[str, float]] = {}
    if options.output and options.output.exists():
        found = json.loads(options.output.read_text("utf-8"))
    specs: dict[str, SparseGPTSpec | None] = {"dense": None, **runs(options.goals.split(";"))}
    for name, spec in tqdm(specs.items(), unit="run"):
        if name in found:
            continue
        model, own = copy.deepcopy(dense), dict[str, float]()
        if spec is not None:
            start = time.perf_counter()
            torchprune.sparsify(model, spec, batches, progress=False)
            own["seconds"] = time.perf_counter() - start
            errors = [layer.error for layer in torchprune.report(model).layers]
            own["error"] = fmean(error for error in errors if error is not None)
        torchprune.fold(model)
        for text, ids in texts.items():
            own[text] = float(torchprune.perplexity(model, ids, seqlen=options.length))
        found[name] = own
        if options.output:
            write_whole(options.output, json.dumps(found, indent=1) + "\n")
    print(table(found))
    if options.table:
        options.table.write_text(f"{table(found)}\n")


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = [
        "| weights | how | Wikipedia | news | layers' error | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    digits = {"Wikipedia": 2, "news": 2, "error": 4, "seconds": 0}
    for name, values in found.items():
        how, _, goal = name.partition(" | ")
        cells = [f"{values[k]:.{n}f}" if k in values else "" for k, n in digits.items()]
        lines.append(f"| {goal or 'dense'} | {how if goal else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
