"""Does the cheap sensitivity tell what the exact one finds, and does an allocation by it pay?

On SmolLM2: rank correlations of what one pass predicts with what pruning each layer alone does, and
perplexity of held-out articles after Wanda and magnitude with budgets shared by several rules.

    python benchmarks/study/sensitivity.py rank --levels 0.5 --output rank.json  # resumes
    python benchmarks/study/sensitivity.py allocate --output allocate.json  # resumes
    python benchmarks/study/sensitivity.py allocate --methods best --rules uniform,sensitivity
    python benchmarks/study/sensitivity.py heads --windows 32  # by the loss of numbers in the text
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchprune
from torchprune import BestSpec, HeadSpec, MagnitudeSpec, Sensitivity, WandaSpec
from torchprune.specs.allocation import OWL, LeastError, Uneven
from torchprune.specs.spec import Spec
from torchprune.study.costs.sensitivities import SensitivityResult

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402

METHODS: dict[str, type[Spec]] = {
    "magnitude": MagnitudeSpec,
    "wanda": WandaSpec,
    "best": BestSpec,
}
RULES: dict[str, str | Uneven] = {
    "uniform": "uniform",
    "owl": OWL(),
    "error": LeastError(),
    "squared": Sensitivity(cost="squared"),
    "sensitivity": Sensitivity(),
    "sensitivity 0.05": Sensitivity(spread=0.05),
    "sensitivity 0.2": Sensitivity(spread=0.2),
}
CHEAP = ("predicted", "error", "squared")


def ranks(values: Sequence[float]) -> Tensor:
    """(n,) float64 ranks from 0, equal values sharing their mean."""
    given = torch.tensor(values, dtype=torch.float64)
    less = (given[:, None] > given).sum(1)
    return less + ((given[:, None] == given).sum(1) - 1) / 2


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of ranks."""
    pair = torch.stack([ranks(one), ranks(other)])
    return float(torch.corrcoef(pair)[0, 1])


def rank_table(exact: SensitivityResult, cheap: SensitivityResult) -> str:
    """How each cheap cost ranks layers beside the exact KL and loss difference, as Markdown."""
    lines = [
        "| level | cost | with KL | within kinds | with loss difference |",
        "|---|---|---:|---:|---:|",
    ]
    found = {(row.name, row.level): row for row in cheap.rows}
    for level in exact.levels:
        rows = [row for row in exact.rows if row.level == level]
        kl = [row.kl.mean for row in rows if row.kl is not None]
        loss = [row.loss.mean for row in rows if row.loss is not None]
        for cost in CHEAP:
            values = [float(getattr(found[row.name, level], cost)) for row in rows]
            by_kind = []
            for kind in dict.fromkeys(row.kind for row in rows):
                own = [i for i, row in enumerate(rows) if row.kind == kind]
                by_kind.append(spearman([values[i] for i in own], [kl[i] for i in own]))
            within = sum(by_kind) / len(by_kind)
            lines.append(
                f"| {level} | {cost} | {spearman(values, kl):.3f} | {within:.3f} | "
                f"{spearman(values, loss):.3f} |"
            )
        own = [row for row in rows if row.loss is not None and row.kl is not None]
        lines.append(f"| {level} | exact KL | | | {spearman(kl, loss):.3f} |")
        assert len(own) == len(rows)
    return "\n".join(lines)


def rank(options: argparse.Namespace, model: nn.Module, seen: list[Tensor], unseen: Tensor) -> None:
    """Exact and cheap, and how they agree."""
    levels = [float(level) for level in options.levels.split(",")]
    judges = [unseen[i * 4096 :][: options.judged][None] for i in range(options.judges)]
    spec = WandaSpec()
    cheap = torchprune.sensitivity(model, seen, spec, levels=levels)
    exact = torchprune.sensitivity(
        model, seen, spec, levels=levels, mode="exact", windows=judges, path=options.output
    )
    print(rank_table(exact, cheap))
    for level in levels:
        pairs = [
            (float(c.predicted or 0), e.kl.mean)
            for c, e in zip(cheap.rows, exact.rows, strict=True)
            if e.kl is not None and e.level == f"{level:g}"
        ]
        ratio = torch.tensor([p / max(k, 1e-12) for p, k in pairs]).quantile(
            torch.tensor([0.1, 0.5, 0.9])
        )
        print(f"\npredicted / exact KL at {level:g}, tenth, half, nine tenths: {ratio.tolist()}")
    print("\nsums of exact KL by kind:")
    for kind, sums in exact.kinds("kl").items():
        print(f"  {kind}: {', '.join(f'{at} {value:.4f}' for at, value in sums.items())}")


def allocate(
    options: argparse.Namespace, model: nn.Module, seen: list[Tensor], unseen: Tensor
) -> None:
    """Perplexity of held-out articles by method, sparsity and rule."""
    judged = unseen[: options.evaluate * options.length]

    def measured(pruned: nn.Module) -> float:
        folded = torchprune.fold(pruned)
        return float(torchprune.perplexity(folded, judged, seqlen=options.length))

    wanted = options.rules.split(",")
    specs = {
        f"{method} {sparsity} {rule}": METHODS[method](
            sparsity=float(sparsity), allocation=RULES[rule]
        )
        for method in options.methods.split(",")
        for sparsity in options.levels.split(",")
        for rule in wanted
    }
    found = torchprune.compare(
        lambda: copy.deepcopy(model), specs, seen, measured, path=options.output
    )
    print(found.to_markdown())


def heads(
    options: argparse.Namespace, model: nn.Module, seen: list[Tensor], unseen: Tensor
) -> None:
    """Heads by a task's own loss: predicting the digits of a text, beside predicting all of it."""
    words = smollm2.load_tokenizer()
    digit = torch.tensor([words.decode([i]).strip().isdigit() for i in range(len(words))])

    def numbers(net: nn.Module, batch: Any) -> Tensor:
        ids = batch[0]
        return net(ids, labels=ids.masked_fill(~digit[ids], -100)).loss

    losses = {"all of the text": None, "its digits": numbers}
    costs = {}
    for name, loss in losses.items():
        rows = torchprune.sensitivity(model, seen, HeadSpec(), loss=loss).rows
        costs[name] = [float(row.taylor or 0) for row in rows]
    print(f"rank correlation of heads' costs by the two: {spearman(*costs.values()):.3f}\n")
    judged = unseen[: options.evaluate * options.length].view(-1, 1, options.length)
    print("| one of three head groups goes, by | loss of digits | of the rest |\n|---|---:|---:|")
    ways = {
        "nothing": None,
        **{f"Taylor, {n}": HeadSpec(0.34, score="taylor", loss=x) for n, x in losses.items()},
        "flap": HeadSpec(0.34),
    }
    for name, spec in ways.items():
        net = copy.deepcopy(model)
        if spec is not None:
            torchprune.sparsify(net, replace(spec, refit=False), seen, progress=False)
        total, count = torch.zeros(2), torch.zeros(2)
        with torch.no_grad():
            for ids in judged:
                found = torch.nn.functional.cross_entropy(
                    net(ids).logits[0, :-1], ids[0, 1:], reduction="none"
                )
                for at, which in enumerate((digit[ids[0, 1:]], ~digit[ids[0, 1:]])):
                    total[at] += found[which].sum()
                    count[at] += which.sum()
        print(
            f"| {name} | {' | '.join(f'{x:.3f}' for x in (total / count).tolist())} |", flush=True
        )


PARTS = {"rank": rank, "allocate": allocate, "heads": heads}


def main() -> None:
    """Run what the arguments ask for; results are kept in the output as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--levels", default="0.5,0.6,0.7", help="sparsities")
    parser.add_argument("--methods", default="magnitude,wanda", help="of allocate")
    parser.add_argument("--rules", default="uniform,owl,error,sensitivity", help="of allocate")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="their tokens, and of perplexity's")
    parser.add_argument("--judges", type=int, default=4, help="windows of the exact mode")
    parser.add_argument("--judged", type=int, default=128, help="their tokens")
    parser.add_argument("--evaluate", type=int, default=24, help="windows of perplexity")
    parser.add_argument("--output", type=Path, help="JSON of all results so far")
    options = parser.parse_args()

    tokenizer, model = smollm2.load_tokenizer(), smollm2.load_model()
    calibration, held_out = smollm2.split(smollm2.wikipedia_articles())
    seen = list(
        smollm2.windows(tokenizer, calibration, options.windows, options.length, 0).split(1)
    )
    unseen = smollm2.tokens(tokenizer, held_out)
    PARTS[options.part](options, model, seen, unseen)


if __name__ == "__main__":
    main()
