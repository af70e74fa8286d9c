"""How good at a given sparsity? Every method on SmolLM2, over draws of calibration windows.

Wikipedia articles to calibrate on; other articles, and news, to evaluate on. What is shown is
perplexity, bits a token, and r = (perplexity - dense) / (SparseGPT's - dense), the share of
SparseGPT's loss that is left; SparseGPT is ours or, with `--peer`, the better of ours and
llm-compressor's on the same windows.

    python benchmarks/methods/quality.py --draws 3 --output quality.json  # resumes
    python benchmarks/methods/quality.py --draws 3 --peer --output quality.json --table quality.md
    python benchmarks/methods/quality.py --device cuda --windows 128
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peer import Job
from prune import ROOT, peer_python, run
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import torchprune
from torchprune import PCG, ADMMSpec, BestSpec, Reconstruct, RIASpec, SparseGPTSpec, WandaSpec
from torchprune.checkpoint.whole_files import write_whole
from torchprune.specs.spec import Spec
from torchprune.study.comparison_rows import Row
from torchprune.study.results import Comparison

sys.path.insert(0, str(ROOT / "examples"))
import smollm2

GOALS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
BASE = "SparseGPT"
PEER = "SparseGPT of llm-compressor"


def specs(goal: dict[str, Any]) -> dict[str, Spec]:
    """Every method by the name that the table shows."""
    kinds: dict[str, tuple[type[Spec], dict[str, Any]]] = {
        "Wanda": (WandaSpec, {}),
        "RIA": (RIASpec, {}),
        "Wanda, refit": (WandaSpec, {"refine": PCG()}),
        BASE: (SparseGPTSpec, {}),
        "SparseGPT, refit": (SparseGPTSpec, {"refine": PCG()}),
        "ADMM": (ADMMSpec, {}),
        "ADMM, alpha 0.5": (ADMMSpec, {"alpha": 0.5}),
        "ADMM, alpha 0.25, trained": (ADMMSpec, {"alpha": 0.25, "reconstruct": Reconstruct()}),
        "Wanda, swaps": (WandaSpec, {"refine": "swaps"}),
        "ADMM, capped": (ADMMSpec, {"token_cap": 2.0}),
        "best, fast": (BestSpec, {"effort": "fast"}),
        "best, balanced": (BestSpec, {"effort": "balanced"}),
        "best, max": (BestSpec, {"effort": "max"}),
    }
    if "pattern" in goal:
        kinds |= {
            "ADMM, permuted": (ADMMSpec, {"permute": True}),
            "best and permuted": (BestSpec, {"permute": True}),
        }
    else:
        kinds |= {f"ADMM, {a}": (ADMMSpec, {"allocation": a}) for a in ("owl", "error", "search")}
        kinds |= {"best, search": (BestSpec, {"allocation": "search"})}
    return {name: kind(**goal, **options) for name, (kind, options) in kinds.items()}


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
    parser.add_argument("--peer", action="store_true", help="run llm-compressor's SparseGPT too")
    parser.add_argument("--output", type=Path, help="JSON of all runs so far")
    parser.add_argument("--table", type=Path, help="the table as Markdown")
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
    if options.peer:
        with tempfile.TemporaryDirectory() as directory:
            found = with_peer(found, options, draws, texts, Path(directory))
    print(table(found))
    if options.table:
        options.table.write_text(f"{heading(options)}\n\n{table(found)}\n")


def with_peer(
    found: Comparison,
    options: argparse.Namespace,
    draws: Mapping[str, Sequence[Tensor]],
    texts: Mapping[str, Tensor],
    directory: Path,
) -> Comparison:
    """And llm-compressor's SparseGPT on the same windows, where the output has it not yet."""
    earlier = Comparison((), None)
    if options.output:
        earlier = Comparison.from_json(options.output.read_text("utf-8"))
    judged = {
        name: ids[: len(ids) // options.length * options.length].view(-1, options.length)
        for name, ids in texts.items()
    }
    rows: list[Row] = []
    for row in tqdm(found.rows, desc=PEER, unit="row"):
        rows.append(row)
        if not row.label.startswith(f"{BASE} | "):
            continue
        wanted = replace(row, label=row.label.replace(BASE, PEER), spec="", notes=(), error=None)
        same = [y for y in earlier.rows if _run_of(y) == _run_of(wanted)]
        if not same:
            windows = directory / f"{row.draw}.safetensors"
            save_file({"calibration": torch.cat(list(draws[row.draw])), **judged}, windows)
            goal = GOALS[row.label.split(" | ")[1]]
            job = Job(
                model=str(smollm2.model_directory()),
                windows=str(windows),
                method="sparsegpt",
                threads=torch.get_num_threads(),
                **goal,
            )
            command = [str(peer_python()), str(ROOT / "benchmarks" / "methods" / "peer.py")]
            result = run([*command, json.dumps(asdict(job))], job.threads)
            same = [
                replace(
                    wanted,
                    sparsity=result.zeros / result.weights,
                    metrics=result.perplexity,
                    seconds=result.wall_seconds,
                    peak_held_bytes=0,
                )
            ]
            earlier = replace(earlier, rows=(*earlier.rows, *same))
            if options.output:
                write_whole(options.output, earlier.to_json() + "\n")
        rows += same
    return replace(found, rows=rows)


def _run_of(row: Row) -> tuple[str, str, str]:
    return row.label, row.draw, row.data


def better(found: Comparison) -> Comparison:
    """With rows by the label `base`: of each draw and source the lower of both SparseGPTs."""
    ran = [row for row in found.rows if row.error is None]
    bases = [row for row in ran if row.label.split(" | ")[0] in (BASE, PEER)]
    best: dict[tuple[str, str], Row] = {}
    for row in bases:
        goal = row.label.split(" | ")[1]
        one = best.setdefault((goal, row.draw), replace(row, label=f"base | {goal}"))
        low = {name: min(value, one.metrics[name]) for name, value in row.metrics.items()}
        best[goal, row.draw] = replace(one, metrics=low)
    return replace(found, rows=(*found.rows, *best.values()))


def heading(options: argparse.Namespace) -> str:
    """What the table's runs had in common."""
    return (
        f"SmolLM2-135M-Instruct, float32, {options.device}: {options.windows} windows of "
        f"{options.length} tokens of Wikipedia to calibrate on, {options.evaluate} of other "
        f"articles and as many of news to evaluate on; means over the draws. r is "
        f"(perplexity - dense) / ({BASE}'s - dense), draw by draw"
        + (f", {BASE} being the better of ours and llm-compressor's" if options.peer else "")
        + f". Seconds are the quickest run's, on {torch.get_num_threads()} threads of a machine as "
        "it was. By `benchmarks/methods/quality.py`."
    )


def table(found: torchprune.Comparison) -> str:
    """Means over the draws, as Markdown; the seconds of the quickest, on a machine as it was."""
    dense = [f"{value:.2f} | {math.log2(value):.3f} | 0" for value in (found.dense or {}).values()]
    lines = [
        "| method | goal | Wikipedia | bits | r | news | bits | r | draws | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| dense | | {' | '.join(dense)} | | |",
    ]
    goals = dict.fromkeys(label.split(" | ")[1] for label in found.labels)
    beside = better(found)
    for goal in goals:
        ratios = {m: beside.ratio(m, f"base | {goal}") for m in ("Wikipedia", "news")}
        for label in found.labels:
            name, own = label.split(" | ")
            rows = [row for row in found.rows if row.label == label and row.error is None]
            if own != goal or not rows:
                continue
            cells = []
            for metric, ratio in ratios.items():
                values = [row.metrics[metric] for row in rows]
                mean, bits = fmean(values), fmean(map(math.log2, values))
                cells += [f"{mean:.2f}", f"{bits:.3f}", f"{ratio[label].mean:.2f}"]
            cells += [f"{len(rows)}", f"{min(row.seconds or 0 for row in rows):.0f}"]
            lines.append(f"| {name} | {goal} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
