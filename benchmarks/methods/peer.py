"""Prune with llm-compressor, and the measuring protocol that both contenders share.

As a script this runs in the peer's own environment (``prune.py`` makes it):

    python benchmarks/methods/peer.py '{"model": "...", "windows": "...", "method": "wanda", ...}'

The argument is a :class:`Job`; the answer, a :class:`Result`, is the one line on standard output.
``prune.py`` imports :func:`measure` from here, so that both sides load, warm up, time and evaluate
through the same lines; ``quality.py`` asks for its perplexities. At the top this needs torch,
transformers and safetensors alone.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

Prune = Callable[[PreTrainedModel, Tensor], None]  # in place, with windows (count, length)
MASK_STRUCTURES = {"unstructured": "0:0"}  # others as they are: "2:4", "4:8"


@dataclass(frozen=True)
class Job:
    """What one process does."""

    model: str  # directory for from_pretrained
    windows: str  # safetensors: "calibration" and texts to judge by, (windows, length) int64
    method: str  # "wanda", "sparsegpt"; prune.py also knows "forward" and "magnitude"
    pattern: str = "unstructured"  # or n:m
    sparsity: float = 0.5
    threads: int = 1
    evaluate: bool = True


@dataclass(frozen=True)
class Result:
    """What one process found; times and memory are of the pruning alone."""

    processor_seconds: float  # all threads of the process
    wall_seconds: float
    resident_bytes: int  # just before: interpreter, libraries, model
    peak_bytes: int  # highest during
    zeros: int  # exact zeros in the linear layers of the blocks
    weights: int
    head_zeros: int  # nobody prunes the head: these are the dense model's
    perplexity: dict[str, float]  # of every text, or of none
    versions: dict[str, str]

    @property
    def judged(self) -> float | None:
        """Perplexity of the text called "evaluation", if there was one."""
        return self.perplexity.get("evaluation")


# --- Measuring -----------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def forget_peak() -> None:
    """Make the kernel's high-water mark start again from the memory resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes of the kernel's high-water mark of resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(directory: str) -> PreTrainedModel:
    """The float32 model in evaluation mode, its weights in memory of their own (not mapped)."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.train(False)
    return model


def block_linears(model: nn.Module) -> list[nn.Linear]:
    """Every linear layer but the head."""
    named = model.named_modules()
    return [m for name, m in named if isinstance(m, nn.Linear) and name != "lm_head"]


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """``exp`` of the mean next-token cross-entropy over (windows, length) tokens."""
    losses = [cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in windows]
    return float(torch.stack(losses).mean().exp())


def measure(job: Job, prune: Prune, versions: dict[str, str]) -> Result:
    """Load, run ``prune`` under the clock, count zeros and evaluate."""
    torch.set_num_threads(job.threads)
    windows = load_file(job.windows)
    model = load(job.model)
    with torch.no_grad():
        model(windows["calibration"][:1])  # the libraries' first-call costs are not the method's

    before = resident()
    forget_peak()
    wall, processor = time.perf_counter(), time.process_time()
    prune(model, windows["calibration"])
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    highest = peak()

    weights = [linear.weight.detach() for linear in block_linears(model)]
    texts = {name: rows for name, rows in windows.items() if name != "calibration" and job.evaluate}
    return Result(
        processor_seconds=processor,
        wall_seconds=wall,
        resident_bytes=before,
        peak_bytes=highest,
        zeros=sum(int((weight == 0).sum()) for weight in weights),
        weights=sum(weight.numel() for weight in weights),
        head_zeros=int((model.lm_head.weight == 0).sum()),
        perplexity={name: perplexity(model, rows) for name, rows in texts.items()},
        versions=versions | {name: version(name) for name in ("transformers", "torch")},
    )


# --- llm-compressor ------------------------------------------------------------------------------


def prune_with_peer(job: Job) -> Prune:
    """Its one-shot entry point with every default; imports and tokenizer are not timed."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[job.method]
    recipe = modifier(
        sparsity=job.sparsity,
        mask_structure=MASK_STRUCTURES.get(job.pattern, job.pattern),
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )

    def prune(model: PreTrainedModel, calibration: Tensor) -> None:
        rows = [{"input_ids": row} for row in calibration]
        batches: DataLoader[Any] = DataLoader(rows, batch_size=1)  # type: ignore[arg-type]
        oneshot(model=model, processor=tokenizer, dataset=batches, recipe=recipe)

    return prune


def main() -> None:
    """Do the job of the one argument; everything but the result goes to standard error."""
    answer, sys.stdout = sys.stdout, sys.stderr
    job = Job(**json.loads(sys.argv[1]))
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors")}
    result = measure(job, prune_with_peer(job), versions)
    print(json.dumps(asdict(result)), file=answer)


if __name__ == "__main__":
    main()
