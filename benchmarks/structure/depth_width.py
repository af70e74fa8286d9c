"""Depth beside width: neurons, heads, blocks and their mix, at the same latency of SmolLM2.

Each row is one budget of milliseconds for a window, spent on one kind or on several; the model is
refitted, physically smaller, and then recovered with the dense one as its teacher. Milliseconds are
of processor time in one thread, so that a busy machine does not change them; all models are timed
in turns at the end. Wikipedia articles to calibrate and train on, others and news to evaluate on.

    OMP_NUM_THREADS=1 python benchmarks/structure/depth_width.py --output depth_width.json
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import torchprune
from torchprune import BudgetSpec, HeadSpec, LayerSpec, NeuronSpec
from torchprune.checkpoint.whole_files import write_whole
from torchprune.training import pace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import smollm2

WAYS: dict[str, tuple[Any, ...]] = {
    "neurons": (NeuronSpec,),
    "heads and neurons": (HeadSpec, NeuronSpec),
    "blocks": (LayerSpec,),
    "blocks and neurons": (LayerSpec, NeuronSpec),
    "all three": (NeuronSpec, HeadSpec, LayerSpec),
}
CORES = 2
"""Minutes of recovery are of so many cores wholly at work."""


def processor_ms(module: nn.Module, inputs: tuple[Any, ...], repeats: int = 7) -> float:
    """The median of several calls, after a first one, in milliseconds of processor time."""
    seconds = []
    with torch.no_grad():
        for turn in range(-1, repeats):
            start = time.process_time()
            module(*inputs)
            if turn >= 0:
                seconds.append(time.process_time() - start)
    return 1000 * median(seconds)


def main() -> None:
    """Run the ways that the output does not hold yet; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75])
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--minutes", type=float, default=2, help="of recovery, of two cores")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows")
    parser.add_argument("--evaluate", type=int, default=20, help="held-out windows of each source")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("depth_width.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    pace.clock = lambda: time.process_time() / CORES

    tokenizer, dense = smollm2.load_tokenizer(), smollm2.load_model()
    calibration, held_out = smollm2.split(smollm2.wikipedia_articles())
    windows = smollm2.windows(tokenizer, calibration, options.windows, options.length, 0)
    training = smollm2.consecutive_windows(tokenizer, calibration, options.length)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    count = options.evaluate * options.length
    texts = {
        "wikipedia": smollm2.tokens(tokenizer, held_out)[:count],
        "news": smollm2.tokens(tokenizer, smollm2.news_articles())[:count],
    }

    def worth(model: nn.Module) -> dict[str, float]:
        return {
            source: torchprune.perplexity(model, ids, seqlen=options.length).perplexity
            for source, ids in texts.items()
        }

    rows: list[dict[str, Any]] = []
    if options.output.is_file():
        rows = json.loads(options.output.read_text("utf-8"))

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_whole(options.output, json.dumps(rows, indent=1) + "\n")

    one = (windows[:1],)
    if not rows:
        size = sum(p.numel() for p in dense.parameters())
        took = processor_ms(dense, one, 15)
        add(
            {"share": 1.0, "way": "dense", "parameters": size, "ms": took, "refitted": worth(dense)}
        )
    for share in options.shares:
        for way in options.ways.split(","):
            if any((row["share"], row["way"]) == (share, way) for row in rows):
                continue
            model, start = copy.deepcopy(dense), time.process_time()
            spec = BudgetSpec(
                latency_ms=share * rows[0]["ms"], over=WAYS[way], runtime=processor_ms
            )
            torchprune.sparsify(model, spec, windows.split(1), progress=False)
            noted = torchprune.report(model).notes
            torchprune.shrink(model, torchprune.plan_shrink(model, windows[:1, :64]))
            row: dict[str, Any] = {
                "share": share,
                "way": way,
                "seconds": round(time.process_time() - start),
                "notes": noted,
                "parameters": sum(p.numel() for p in model.parameters()),
                "blocks": len(model.model.layers),
            }
            in_turns = [
                (processor_ms(dense, one, 1), processor_ms(model, one, 1)) for _ in range(9)
            ]
            row["ms"] = median(own for _, own in in_turns)
            row["of dense"] = row["ms"] / median(whole for whole, _ in in_turns)
            row["refitted"] = worth(model)
            if options.minutes:
                data = [training[i : i + 1] for i in order.tolist()]
                torchprune.recover(
                    model, data, teacher=dense, minutes=options.minutes, progress=False
                )
                row["recovered"] = worth(model)
            add(row)
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| what goes | parameters | blocks | milliseconds, of dense | Wikipedia | recovered | news "
        "| recovered |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row["way"], f"{row['parameters'] / 1e6:.1f} M", str(row.get("blocks", ""))]
        cells.append(f"{row.get('of dense', 1):.2f}")
        for source in ("wikipedia", "news"):
            cells.append(f"{row['refitted'][source]:.2f}")
            cells.append(f"{row['recovered'][source]:.2f}" if "recovered" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
