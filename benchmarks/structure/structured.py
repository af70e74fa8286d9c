"""Whole neurons, heads and layers of SmolLM2: perplexity by score and by what makes up for them.

Nothing, the refit of the layers that read them, or the refit and then the training of each block.

Wikipedia articles to calibrate on, other articles and news to evaluate on. Every masked model is
shrunk, and its perplexity is of the physically smaller model.

    python benchmarks/structure/structured.py --output structured.json
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch

import torchprune
from torchprune import HeadSpec, LayerSpec, NeuronSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import smollm2

SCORES = ("l2", "activation", "flap")
WAYS: dict[str, dict[str, bool]] = {
    "alone": {"refit": False},
    "refit": {"refit": True},
    "trained": {"refit": True, "reconstruct": True},
}


def cells(only: str) -> list[tuple[str, object]]:
    """(name, spec) of every cell of the table."""
    found: list[tuple[str, object]] = []
    kinds = (("neurons 20%", NeuronSpec, 0.2), ("heads 33%", HeadSpec, 1 / 3))
    for name, kind, share in (*kinds, ("neurons 40%", NeuronSpec, 0.4)):
        for score in SCORES:
            for way, options in WAYS.items():
                if score == "flap" or way != "trained":
                    found.append((f"{name}|{score}|{way}", kind(share, score=score, **options)))
    for way, options in WAYS.items():
        spec = NeuronSpec(0.2, allocation="global", **options)
        found.append((f"neurons 20%, global|flap|{way}", spec))
    found.append(("layers 4|cosine|alone", LayerSpec(4)))
    found.append(("layers 4|loss|alone", LayerSpec(4, score="loss")))
    return [(name, spec) for name, spec in found if only in name]


def main() -> None:
    """Run the cells; append each result to the output at once, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--evaluate", type=int, default=24, help="held-out windows of each source")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    tokenizer, dense = smollm2.load_tokenizer(), smollm2.load_model().to(options.device)
    calibration, held_out = smollm2.split(smollm2.wikipedia_articles())
    windows = smollm2.windows(
        tokenizer, calibration, options.windows, options.length, options.draw
    ).to(options.device)
    count = options.evaluate * options.length
    texts = {
        "wikipedia": smollm2.tokens(tokenizer, held_out)[:count],
        "news": smollm2.tokens(tokenizer, smollm2.news_articles())[:count],
    }

    def measured(model: torch.nn.Module) -> dict[str, float]:
        return {
            name: torchprune.perplexity(model, ids, seqlen=options.length).perplexity
            for name, ids in texts.items()
        }

    rows = [{"cell": "dense||", "parameters": dense.num_parameters(), **measured(dense)}]
    print(json.dumps(rows[0]), flush=True)
    for name, spec in cells(options.only):
        model = copy.deepcopy(dense)
        start = time.process_time()
        # Layers by loss run the data once for every candidate: a few windows must do.
        data = windows[:2] if getattr(spec, "score", "") == "loss" else windows
        torchprune.sparsify(model, spec, data.split(1), progress=False)
        pruned = time.process_time() - start
        torchprune.shrink(model, torchprune.plan_shrink(model, windows[:1, :64]))
        row = {
            "cell": name,
            "parameters": model.num_parameters(),
            "cpu_seconds": round(pruned, 1),
            **measured(model),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, object]]) -> str:
    """Perplexity on both sources, by what makes up for the loss, as Markdown."""
    found: dict[tuple[str, str], dict[str, dict[str, object]]] = {}
    for row in rows:
        what, score, way = str(row["cell"]).split("|")
        found.setdefault((what, score), {})[way or "alone"] = row
    columns = [(source, way) for source in ("wikipedia", "news") for way in WAYS]
    heads = [f"{source}, {way}" for source, way in columns]
    lines = [
        f"| what goes | score | parameters | {' | '.join(heads)} |",
        "| --- | --- | ---: |" + " ---: |" * len(columns),
    ]
    for (what, score), ways in found.items():
        one = next(iter(ways.values()))
        shown = [f"{float(str(ways[w][s])):.2f}" if w in ways else "" for s, w in columns]
        size = f"{int(str(one['parameters'])) / 1e6:.1f} M"
        lines.append(f"| {what} | {score} | {size} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
