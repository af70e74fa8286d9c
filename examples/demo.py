"""Prune a real model, measure, save, reload, compare: what ``make demo`` runs.

    python examples/demo.py [--full] [--artifacts DIR]

SmolLM2-135M is calibrated on one half of a set of Wikipedia articles and measured on the other.
Every pruned model is saved, loaded again and must then have the very same perplexity, and its row
is shown at once; one is written as a plain transformers model, whose logits must be the same bit
for bit, lowered, and written as ONNX, and a second table shows what ships and how fast it decodes.
The exit code is 1 if anything differs. ``demo.md`` and ``demo.json`` beside the saved models hold
the tables. It takes about five minutes; with ``--full``, on more windows, by every method and with
2:4 too, about twenty.
"""

import argparse
import copy
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import calm  # noqa: F401  (before transformers)
import deployed
import smollm2
import torch
from deployed import Form, weight_bytes
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import torchprune
from torchprune import export
from torchprune.structure.plan import ShrinkPlan
from torchprune.study.tasks.evaluation import Perplexity

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 512
PROMPT = "The history of the bicycle begins"
SPECS = {
    "magnitude": torchprune.MagnitudeSpec,
    "wanda": torchprune.WandaSpec,
    "sparsegpt": torchprune.SparseGPTSpec,
    "best, fast": partial(torchprune.BestSpec, effort="fast"),
}
BEST = ("best, fast", "unstructured")
REMOVED = torchprune.NeuronSpec(sparsity=0.2)
"""Structures that are really gone: a fifth of every MLP's neurons."""


@dataclass(frozen=True)
class Size:
    """How much of everything a run does."""

    calibration: int  # windows of LENGTH tokens
    evaluation: int  # windows at the most
    decoded: int  # tokens by each form that ships
    goals: tuple[tuple[str, str], ...]  # (method, pattern)


SHORT = Size(12, 4, 8, (("wanda", "unstructured"), ("sparsegpt", "unstructured"), BEST))
FULL = Size(32, 12, 32, tuple((m, p) for m in SPECS for p in ("unstructured", "2:4")))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        sparsity: pruned weights of all weights in the pruned layers, counted; where neurons were
            removed, parameters gone of all parameters.
        seconds: pruning alone.
        megabytes: the weights' file as saved; relative to the dense one.
        identical: whether the reloaded model has exactly this perplexity; None for the dense row.
    """

    method: str
    pattern: str
    sparsity: float
    perplexity: float
    bits_per_token: float
    seconds: float
    megabytes: float
    relative: float
    identical: bool | None = None


# --- The steps -----------------------------------------------------------------------------------


def prune(
    dense: PreTrainedModel, method: str, pattern: str, calibration: Tensor
) -> tuple[PreTrainedModel, float]:
    """A pruned copy, at 50 %, and the seconds that pruning took."""
    model = copy.deepcopy(dense)
    spec = SPECS[method](pattern=pattern)
    data = [window[None] for window in calibration] if spec.needs_data else None
    started = time.perf_counter()
    torchprune.sparsify(model, spec, data, progress=False)
    return model, time.perf_counter() - started


def directory_of(artifacts: Path, method: str, pattern: str) -> Path:
    """Where a pruned model is saved."""
    return artifacts / f"{method}-{pattern}".replace(", ", "-").replace(":", "of")


def measure(model: PreTrainedModel, tokens: Tensor) -> Perplexity:
    """Perplexity of the held-out tokens, four windows at a time."""
    return torchprune.perplexity(model, tokens, seqlen=LENGTH, batch_size=4)


def pruned_share(model: PreTrainedModel) -> float:
    """The share of weights that the masks prune, of all weights in the pruned layers."""
    masks = torchprune.masks(model).values()
    kept, size = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
    return (size - kept) / size


def continuation(model: PreTrainedModel, tokenizer: Any) -> str:
    """What the model writes after the prompt, always the likeliest token."""
    start = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    with torch.no_grad():
        ids = model.generate(**start, do_sample=False, max_new_tokens=32)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())


def remove(
    dense: PreTrainedModel, calibration: Tensor
) -> tuple[PreTrainedModel, float, ShrinkPlan]:
    """A copy with fewer neurons, the seconds that took, and the plan of the removal."""
    model = copy.deepcopy(dense)
    started = time.perf_counter()
    data = [window[None] for window in calibration]
    torchprune.sparsify(model, REMOVED, data, progress=False)
    plan = torchprune.plan_shrink(model, calibration[:1])
    torchprune.shrink(model, plan)
    return model, time.perf_counter() - started, plan


def same_logits(model: PreTrainedModel, other: PreTrainedModel, window: Tensor) -> bool:
    """Whether two models agree in every bit of every logit."""
    with torch.no_grad():
        return torch.equal(model(window[None]).logits, other(window[None]).logits)


def as_row(
    method: str,
    pattern: str,
    sparsity: float,
    result: Perplexity,
    seconds: float,
    stored: int,
    dense: int,
) -> Row:
    """A row from what was measured, sizes in bytes."""
    figures = (result.perplexity, result.bits_per_token, seconds, stored / 1e6, stored / dense)
    return Row(method, pattern, sparsity, *figures)


# --- The whole -----------------------------------------------------------------------------------


def run(
    size: Size, artifacts: Path, say: Callable[[str], None], show: Callable[[Row], None]
) -> tuple[list[Row], list[Form], dict[str, Any]]:
    """All rows and all forms, the dense one first, and what was checked and written besides.

    Each row is shown as soon as it is known.
    """
    logging.disable_progress_bar()
    say("loading SmolLM2-135M and Wikipedia (the first time they are unpacked)")
    dense, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    mine, held_out = smollm2.split(smollm2.wikipedia_articles())
    calibration = smollm2.windows(tokenizer, mine, size.calibration, LENGTH, seed=0)
    tokens = smollm2.tokens(tokenizer, held_out)[: size.evaluation * LENGTH]
    dense_bytes = weight_bytes(smollm2.model_directory())

    say(f"dense: measuring on {len(tokens) // LENGTH} windows of {LENGTH} held-out tokens")
    rows = [as_row("dense", "", 0.0, measure(dense, tokens), 0.0, dense_bytes, dense_bytes)]
    show(rows[-1])
    for method, pattern in size.goals:
        say(f"{method} {pattern}: pruning, measuring, saving, loading, measuring again")
        directory = directory_of(artifacts, method, pattern)
        model, seconds = prune(dense, method, pattern, calibration)
        result = measure(model, tokens)
        torchprune.save(model, directory, tokenizer=tokenizer)
        again = measure(torchprune.load(directory), tokens)
        stored = weight_bytes(directory)
        row = as_row(method, pattern, pruned_share(model), result, seconds, stored, dense_bytes)
        rows.append(replace(row, identical=again == result))
        show(rows[-1])

    say("flap neurons: pruning, removing, measuring, saving, loading, measuring again")
    smaller, seconds, plan = remove(dense, calibration)
    result = measure(smaller, tokens)
    torchprune.save(smaller, artifacts / "neurons", tokenizer=tokenizer)
    again = measure(torchprune.load(artifacts / "neurons"), tokens)
    gone = 1 - plan.parameters[1] / plan.parameters[0]
    stored = weight_bytes(artifacts / "neurons")
    row = as_row("flap", "neurons 20 %", gone, result, seconds, stored, dense_bytes)
    rows.append(replace(row, identical=again == result))
    show(rows[-1])

    halves = [r for r in rows if r.pattern == "unstructured"]
    best = min(halves, key=lambda r: r.perplexity)
    say(f"{best.method} {best.pattern}: writing a plain transformers model, loading it, comparing")
    saved = directory_of(artifacts, best.method, best.pattern)
    pruned = torchprune.load(saved)
    plain = artifacts / "transformers"
    export.to_hf(pruned, plain, tokenizer=tokenizer)
    reloaded = AutoModelForCausalLM.from_pretrained(plain)
    say("lowering it, writing it as ONNX, and letting all forms decode in turns")
    forms, written = deployed.compare(
        dense,
        smollm2.model_directory(),
        saved,
        plain,
        artifacts,
        tokens[None, :64],
        size.decoded,
    )
    extras = {
        "onnx_relative_difference": written.relative,
        "onnx_load_seconds": written.load_seconds,
        "transformers_logits_equal": same_logits(pruned, reloaded, tokens[:LENGTH]),
        "best": best.method,
        "shrunk_flops": plan.flops[1] / plan.flops[0],
        "dense_writes": continuation(dense, tokenizer),
        "best_writes": continuation(reloaded, tokenizer),
    }
    return rows, forms, extras


def cells(row: Row) -> tuple[str, ...]:
    """One line as text."""
    return (
        row.method,
        row.pattern,
        f"{row.sparsity:.4%}",
        f"{row.perplexity:.2f}",
        f"{row.bits_per_token:.3f}",
        f"{row.seconds:.0f}" if row.pattern else "",
        f"{row.megabytes:.1f}",
        f"{row.relative:.1%}",
        {None: "", True: "equal", False: "DIFFERS"}[row.identical],
    )


CAPTION = (
    "ppl: perplexity on held-out Wikipedia; bits per token; s: seconds to prune; MB of weights as "
    "saved, size beside the dense file; reloaded: whether the loaded model's perplexity is equal; "
    "neurons are removed, the other rows have zeros"
)
HEADS = ("method", "pattern", "pruned", "ppl", "bits", "s", "MB", "size", "reloaded")
WIDTHS = (10, 12, 8, 6, 5, 3, 5, 6, 8)


def form_cells(form: Form) -> tuple[str, ...]:
    """One line of the second table as text."""
    return (
        form.name,
        form.note,
        f"{form.megabytes:.1f}",
        f"{form.relative_size:.1%}",
        f"{form.tokens_per_second:.1f}",
        f"{form.relative_speed:.2f}",
    )


FORM_CAPTION = (
    "what ships: MB of weights on disk, size beside the dense file; tokens a second, one by one, "
    "in float32 on this machine's CPU"
)
FORM_WIDTHS = (11, 12, 6, 6, 8, 11)
FORM_HEADS = ("form", "runs in", "MB", "size", "tokens/s", "times dense")


def as_markdown(
    rows: list[Row], forms: list[Form], extras: dict[str, Any], settings: dict[str, Any]
) -> str:
    """The tables and the two continuations."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * 2 + "---:|" * (len(HEADS) - 2)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += [
        "",
        CAPTION + ".",
        "",
        ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in settings.items()),
    ]
    lines += ["", "| " + " | ".join(FORM_HEADS) + " |", "|---|---|" + "---:|" * 4]
    lines += ["| " + " | ".join(form_cells(form)) + " |" for form in forms]
    lines += ["", f"Dense: *{extras['dense_writes']}*", ""]
    lines += [f"{extras['best']}, half of the weights: *{extras['best_writes']}*"]
    return "\n".join(lines) + "\n"


def as_line(texts: tuple[str, ...], widths: tuple[int, ...]) -> str:
    """A line of a table for a terminal, which can be shown before the next is known."""
    pairs = zip(texts, widths, strict=True)
    aligned = [f"{text:<{w}}" if i < 2 else f"{text:>{w}}" for i, (text, w) in enumerate(pairs)]
    return "  ".join(aligned).rstrip()


def failures(rows: list[Row], extras: dict[str, Any]) -> list[str]:
    """What must be equal and is not."""
    found = [
        f"{r.method} {r.pattern}: reloaded perplexity differs" for r in rows if r.identical is False
    ]
    if not extras["onnx_relative_difference"] < 1e-3:
        found.append("ONNX Runtime computes otherwise")
    if not extras["transformers_logits_equal"]:
        found.append("the plain transformers model gives other logits")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all methods, 2:4 too, more windows")
    parser.add_argument("--artifacts", type=Path, default=ROOT / "artifacts", metavar="DIR")
    options = parser.parse_args(arguments)
    size = FULL if options.full else SHORT
    console, started = Console(highlight=False, markup=False, soft_wrap=True), time.perf_counter()

    with console.status("") as status:

        def say(text: str) -> None:
            """What is being done: on a terminal one line that changes, else lines of a log."""
            text = f"[{time.perf_counter() - started:4.0f} s] {text}"
            status.update(text) if console.is_terminal else print(text, flush=True)

        def show(row: Row) -> None:
            if not row.pattern:
                console.print(as_line(HEADS, WIDTHS))
            console.print(as_line(cells(row), WIDTHS))

        rows, forms, extras = run(size, options.artifacts, say, show)

    settings = {
        "calibration_windows": size.calibration,
        "evaluation_windows": size.evaluation,
        "window_tokens": LENGTH,
        "torch": torch.__version__,
        "machine": f"{platform.machine()} with {os.cpu_count()} cores",
        "total_seconds": round(time.perf_counter() - started),
    }
    record = {
        "settings": settings,
        "rows": [asdict(row) for row in rows],
        "forms": [asdict(form) for form in forms],
        **extras,
    }
    (options.artifacts / "demo.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    (options.artifacts / "demo.md").write_text(as_markdown(rows, forms, extras, settings), "utf-8")
    console.print(CAPTION, "", as_line(FORM_HEADS, FORM_WIDTHS), sep="\n")
    for form in forms:
        console.print(as_line(form_cells(form), FORM_WIDTHS))
    console.print(FORM_CAPTION, "", f"dense:  {extras['dense_writes']}", sep="\n")
    console.print(f"{extras['best']}:  {extras['best_writes']}")
    seconds = time.perf_counter() - started
    console.print(f"{seconds:.0f} s; models, demo.json and demo.md are in {options.artifacts}")
    wrong = failures(rows, extras)
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
