"""How fine should the calibration sequence be? Perplexity over several calibration draws.

For each method and pattern: `sequential="layer"` (each layer pruned on inputs from all pruned
layers before it), `"block"` (a block's statistics from its dense weights, then the block run again
pruned) and `"none"` (all statistics from the dense model), on the same windows. Wikipedia articles
to calibrate on, other articles to evaluate on.

    python benchmarks/calibration/sequence.py --draws 3 --output sequence.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import torchprune

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import smollm2

SPECS = {"wanda": torchprune.WandaSpec, "sparsegpt": torchprune.SparseGPTSpec}


def main() -> None:
    """Run what the arguments ask for; append each result to the output at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--methods", default="wanda,sparsegpt")
    parser.add_argument("--patterns", default="unstructured,2:4")
    parser.add_argument("--sequences", default="layer,block,none")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--evaluate", type=int, default=40, help="held-out windows")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    tokenizer, dense = smollm2.load_tokenizer(), smollm2.load_model()
    calibration, held_out = smollm2.split(smollm2.wikipedia_articles())
    ids = smollm2.tokens(tokenizer, held_out)[: options.evaluate * options.length]
    rows = []
    for draw in range(options.first_draw, options.first_draw + options.draws):
        windows = smollm2.windows(tokenizer, calibration, options.windows, options.length, draw)
        for method in options.methods.split(","):
            for pattern in options.patterns.split(","):
                for sequence in options.sequences.split(","):
                    model = copy.deepcopy(dense)
                    spec = SPECS[method](pattern=pattern, sequential=sequence)
                    start = time.process_time()
                    torchprune.sparsify(model, spec, windows.split(1), progress=False)
                    seconds = time.process_time() - start
                    result = torchprune.perplexity(
                        torchprune.fold(model), ids, seqlen=options.length
                    )
                    rows.append(
                        {
                            "draw": draw,
                            "method": method,
                            "pattern": pattern,
                            "sequence": sequence,
                            "perplexity": result.perplexity,
                            "cpu_seconds": seconds,
                        }
                    )
                    print(json.dumps(rows[-1]), flush=True)
                    if options.output:
                        options.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, object]]) -> str:
    """Mean perplexity of each sequence over the draws, and the range, as Markdown."""
    cells: dict[tuple[object, object], dict[object, list[float]]] = {}
    for row in rows:
        line = cells.setdefault((row["method"], row["pattern"]), {})
        line.setdefault(row["sequence"], []).append(float(str(row["perplexity"])))
    names = list(dict.fromkeys(row["sequence"] for row in rows))
    head = "| method | pattern | " + " | ".join(map(str, names)) + " |"
    lines = [head, "|" + "---|" * (2 + len(names))]
    for (method, pattern), line in cells.items():
        shown = [
            f"{statistics.mean(line[n]):.2f} ({min(line[n]):.2f} to {max(line[n]):.2f})"
            for n in names
            if n in line
        ]
        lines.append(f"| {method} | {pattern} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
