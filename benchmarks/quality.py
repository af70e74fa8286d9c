"""How good at a given sparsity? Every method on SmolLM2, over draws of calibration windows.

Wikipedia articles to calibrate on; other articles, and news, to evaluate on. What is shown is
perplexity and r = (it - dense) / (SparseGPT's - dense), the share of SparseGPT's loss that is left.

    python benchmarks/quality.py --draws 3 --output quality.json   # resumes what the file lacks
    python benchmarks/quality.py --device cuda --windows 128

The peer's SparseGPT on the same windows is benchmarks/prune.py's business.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch

import torchprune
from torchprune import PCG, ADMMSpec, BestSpec, Reconstruct, RIASpec, SparseGPTSpec, WandaSpec
from torchprune.specs import Spec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import smollm2

GOALS = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
BASE = "SparseGPT"


def specs(goal: dict[str, object]) -> dict[str, Spec]:
    """Every method by the name that the table shows."""
    kinds: dict[str, tuple[type[Spec], dict[str, object]]] = {
        "Wanda": (WandaSpec, {}),
        "RIA": (RIASpec, {}),
        "Wanda, refit": (WandaSpec, {"refine": PCG()}),
        BASE: (SparseGPTSpec, {}),
        "SparseGPT, refit": (SparseGPTSpec, {"refine": PCG()}),
        "ADMM": (ADMMSpec, {}),
        "ADMM, alpha 0.5": (ADMMSpec, {"alpha": 0.5}),
        "ADMM, trained": (ADMMSpec, {"reconstruct": Reconstruct()}),
        "best, fast": (BestSpec, {"effort": "fast"}),
        "best, balanced": (BestSpec, {"effort": "balanced"}),
        "best, max": (BestSpec, {"effort": "max"}),
    }
    return {name: kind(**goal, **options) for name, (kind, options) in kinds.items()}  # type: ignore[arg-type]


def main() -> None:
    """Run what the arguments ask for; results are kept in the output as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--goals", default=",".join(GOALS))
    parser.add_argument("--methods", default="", help="names or parts of names, by commas")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--evaluate", type=int, default=40, help="held-out windows of each source")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1, help="calibration windows a batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model().to(options.device)
    calibration, held_out = smollm2.split(smollm2.wikipedia_articles())
    count = options.evaluate * options.length
    texts = {
        "Wikipedia": smollm2.tokens(tokenizer, held_out)[:count],
        "news": smollm2.tokens(tokenizer, smollm2.news_articles())[:count],
    }

    def measured(pruned: torch.nn.Module) -> dict[str, float]:
        folded = torchprune.fold(pruned)
        return {
            name: float(torchprune.perplexity(folded, ids, seqlen=options.length))
            for name, ids in texts.items()
        }

    draws = {
        str(draw): smollm2.windows(
            tokenizer, calibration, options.windows, options.length, draw
        ).split(options.batch)
        for draw in range(options.draws)
    }
    wanted = options.methods.split(",")
    chosen = {
        f"{name} | {goal}": spec
        for goal in options.goals.split(",")
        for name, spec in specs(GOALS[goal]).items()
        if name == BASE or any(part in name for part in wanted)
    }
    found = torchprune.compare(
        lambda: copy.deepcopy(model),
        chosen,
        draws,
        measured,
        max_batches=options.windows,
        path=options.output,
    )
    print(table(found))


def table(found: torchprune.Comparison) -> str:
    """Means over the draws, as Markdown; seconds are of single runs."""
    lines = [
        f"dense: {', '.join(f'{name} {value:.2f}' for name, value in (found.dense or {}).items())}",
        "",
        "| method | goal | Wikipedia | r | news | r | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    goals = dict.fromkeys(label.split(" | ")[1] for label in found.labels)
    for goal in goals:
        ratios = {m: found.ratio(m, f"{BASE} | {goal}") for m in ("Wikipedia", "news")}
        for label in found.labels:
            name, own = label.split(" | ")
            rows = [row for row in found.rows if row.label == label and row.error is None]
            if own != goal or not rows:
                continue
            cells = []
            for metric, ratio in ratios.items():
                mean = sum(row.metrics[metric] for row in rows) / len(rows)
                cells += [f"{mean:.2f}", f"{ratio[label].mean:.2f}"]
            seconds = sum(row.seconds or 0 for row in rows) / len(rows)
            lines.append(f"| {name} | {goal} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
