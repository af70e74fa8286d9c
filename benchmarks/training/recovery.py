"""How much of a pruned SmolLM2 comes back, by what is trained, how long, and toward what.

The masks are `BestSpec()`'s, from 32 windows of Wikipedia; what is trained on are all windows of
the same half of the articles; what is evaluated on are articles of the other half, and news, as in
`benchmarks/methods/quality.py`. A minute is one of two cores wholly at work: 120 seconds of
processor time, all threads counted, teacher, judging and all, so that a busy machine does not tell.

    python benchmarks/training/recovery.py --goals 2:4 --methods recommended --minutes 15
    python benchmarks/training/recovery.py --output recovery.json --table recovery.md  # resumes
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import torchprune
from torchprune import BestSpec
from torchprune.checkpoint.whole_files import write_whole
from torchprune.reports.report import runs_of
from torchprune.training import KL, MaskLoRA, OwnLoss, SquareHead, pace

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import smollm2

GOALS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
}
SPARSEGPT = {"2:4": (70.39, 149.06), "50 %": (37.10, 66.66), "60 %": (70.93, 145.80)}
"""Perplexity on Wikipedia and news, of docs/results/quality.md."""

EVALUATED = 20 * 512
"""Tokens of each text."""

CORES = 2

METHODS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "own loss": {"objective": OwnLoss()},
    "distilled": {"objective": KL()},
    "SquareHead": {"objective": SquareHead()},
    "MaskLoRA": {"train": MaskLoRA()},
    "norms and biases": {"train": "norms"},
}


def pruned(goal: str) -> torch.nn.Module:
    """SmolLM2 by `BestSpec()`; made once, and kept in the cache."""
    name = goal.replace(":", "-").removesuffix(" %")
    model, place = smollm2.load_model(), smollm2.cache_directory() / "recovery" / f"best-{name}"
    if not place.is_dir():
        calibration, _ = smollm2.split(smollm2.wikipedia_articles())
        windows = smollm2.windows(smollm2.load_tokenizer(), calibration, 32, 512, 0)
        torchprune.sparsify(model, BestSpec(**GOALS[goal]), windows.split(1))
        torchprune.save(model, place)
        return model
    torchprune.load_into(model, place)
    return model


def measured(model: torch.nn.Module, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Perplexity on each text, of the folded model."""
    folded = torchprune.fold(model)
    return {
        name: float(torchprune.perplexity(folded, ids, seqlen=512)) for name, ids in texts.items()
    }


def main() -> None:
    """Run what the arguments ask for and the output does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goals", default="2:4")
    parser.add_argument("--methods", default="recommended", help="names, by commas; 'none' too")
    parser.add_argument("--minutes", default="15", help="of two cores, by commas")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", type=Path, help="the table as Markdown")
    parser.add_argument("--rate", type=float, help="another rate than the default")
    options = parser.parse_args()

    tokenizer, dense = smollm2.load_tokenizer(), smollm2.load_model()
    calibration, held_out = smollm2.split(smollm2.wikipedia_articles())
    texts = {
        "Wikipedia": smollm2.tokens(tokenizer, held_out)[:EVALUATED],
        "news": smollm2.tokens(tokenizer, smollm2.news_articles())[:EVALUATED],
    }
    data = list(smollm2.consecutive_windows(tokenizer, calibration, 512).split(1))
    data = [data[i] for i in torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    pace.clock = lambda: time.process_time() / CORES

    rows = json.loads(options.output.read_text()) if options.output.is_file() else []
    plan = [("dense", "", 0.0)]
    for goal in options.goals.split(","):
        plan.append((goal, "none", 0.0))
        plan += [
            (goal, method, float(minutes))
            for minutes in options.minutes.split(",")
            for method in options.methods.split(",")
            if method != "none"
        ]
    for goal, method, minutes in plan:
        if any([goal, method, minutes] == [r["goal"], r["method"], r["minutes"]] for r in rows):
            continue
        model = smollm2.load_model() if goal == "dense" else pruned(goal)
        row: dict[str, Any] = {"goal": goal, "method": method, "minutes": minutes}
        if minutes:
            options_of = METHODS[method] | ({} if options.rate is None else {"rate": options.rate})
            place = smollm2.cache_directory() / "recovery" / f"{goal} {method} {minutes:g}"
            start = time.monotonic(), time.process_time()
            torchprune.recover(
                model, data, teacher=dense, minutes=minutes, path=place, **options_of
            )
            row["seconds"] = round(time.monotonic() - start[0])
            row["processor seconds"] = round(time.process_time() - start[1])
            row["note"] = runs_of(model)[-1].notes[-1]
        row |= measured(model, texts)
        print(row, flush=True)
        rows = json.loads(options.output.read_text()) if options.output.is_file() else []
        write_whole(options.output, json.dumps([*rows, row], indent=1) + "\n")
    rows = json.loads(options.output.read_text())
    print(table(rows))
    if options.table:
        options.table.write_text(table(rows) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """All rows, as Markdown; r is the share of SparseGPT's loss that is left."""
    (dense,) = [row for row in rows if row["goal"] == "dense"]
    lines = [
        "| goal | recovery | minutes | tokens | Wikipedia | r | news | r |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| dense | | | | {dense['Wikipedia']:.2f} | 0 | {dense['news']:.2f} | 0 |",
    ]
    for goal in SPARSEGPT:
        own = [row for row in rows if row["goal"] == goal]
        for row in sorted(own, key=lambda row: (row["minutes"], row["Wikipedia"])):
            cells = [goal, row["method"], f"{row['minutes']:g}" if row["minutes"] else ""]
            cells.append(row["note"].partition(" tokens")[0].split()[-1] if "note" in row else "")
            for name, base in zip(("Wikipedia", "news"), SPARSEGPT[goal], strict=True):
                share = (row[name] - dense[name]) / (base - dense[name])
                cells += [f"{row[name]:.2f}", f"{share:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
