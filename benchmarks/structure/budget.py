"""One budget over neurons, heads and blocks of SmolLM2, beside uniform shares and single kinds.

Wikipedia articles to calibrate on, other articles and news to evaluate on; everything is refitted,
shrunk, and at most as large as the budget says. Perplexity is of the physically smaller model.

    python benchmarks/structure/budget.py --output budget.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import torch

import torchprune
from torchprune import BudgetSpec, HeadSpec, LayerSpec, NeuronSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import smollm2


def ways(model: torch.nn.Module, share: float) -> dict[str, list[object]]:
    """The specs, one after the other, that leave at most a share of a Llama's parameters."""
    config, block = model.config, model.model.layers[0]
    spare = (1 - share) * model.num_parameters()
    neuron = 3 * config.hidden_size * config.num_hidden_layers
    blocks = math.ceil(spare / sum(p.numel() for p in block.parameters()))
    groups = config.num_key_value_heads
    attention = sum(p.numel() for p in block.self_attn.parameters()) * config.num_hidden_layers

    def neurons(left: float) -> NeuronSpec:
        gone = 8 * math.ceil(left / neuron / 8)
        return NeuronSpec(sparsity=gone / config.intermediate_size)

    heads = HeadSpec(sparsity=1 / groups)
    return {
        "one budget": [BudgetSpec(parameters=share)],
        "uniform: one head group of three, and neurons": [
            heads,
            neurons(spare - attention / groups),
        ],
        "neurons alone": [neurons(spare)],
        "blocks alone": [LayerSpec(drop=blocks)],
    }


def main() -> None:
    """Run the cells; append each result to the output at once, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=16, help="calibration windows")
    parser.add_argument("--evaluate", type=int, default=10, help="held-out windows of each source")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.7])
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    tokenizer, dense = smollm2.load_tokenizer(), smollm2.load_model()
    calibration, held_out = smollm2.split(smollm2.wikipedia_articles())
    windows = smollm2.windows(tokenizer, calibration, options.windows, options.length, 0)
    count = options.evaluate * options.length
    texts = {
        "wikipedia": smollm2.tokens(tokenizer, held_out)[:count],
        "news": smollm2.tokens(tokenizer, smollm2.news_articles())[:count],
    }
    rows: list[dict[str, object]] = []

    def add(name: str, share: float, model: torch.nn.Module, seconds: float, notes: list) -> None:
        found = {
            source: torchprune.perplexity(model, ids, seqlen=options.length).perplexity
            for source, ids in texts.items()
        }
        size = model.num_parameters()
        row = {"what": name, "share": share, "parameters": size, **found}
        rows.append({**row, "cpu_seconds": round(seconds, 1), "notes": notes})
        print(json.dumps(rows[-1]), flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")

    add("dense", 1.0, dense, 0.0, [])
    for share in options.shares:
        for name, specs in ways(dense, share).items():
            if options.only not in name:
                continue
            model, start = copy.deepcopy(dense), time.process_time()
            for spec in specs:
                torchprune.sparsify(model, spec, windows.split(1), progress=False)
            seconds, noted = time.process_time() - start, torchprune.report(model).notes
            torchprune.shrink(model, torchprune.plan_shrink(model, windows[:1, :64]))
            assert model.num_parameters() <= share * dense.num_parameters()
            notes = [note for note in noted if "budget" in note]
            add(name, share, model, seconds, notes)
    print(table(rows))


def table(rows: list[dict[str, object]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| may stay | what goes | parameters | Wikipedia | news | CPU seconds |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        size, seconds = int(str(row["parameters"])) / 1e6, float(str(row["cpu_seconds"]))
        found = " | ".join(f"{float(str(row[s])):.2f}" for s in ("wikipedia", "news"))
        may = f"{float(str(row['share'])):.0%}"
        lines.append(f"| {may} | {row['what']} | {size:.1f} M | {found} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
