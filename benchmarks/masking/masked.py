"""What masks cost while they are on: SmolLM2-135M masked, beside dense, generating and training.

    python benchmarks/masking/masked.py [--turns 15] [--tokens 24] [--only REGEX] [--cpu-time]

Half of every linear layer's weights in the blocks are masked. Contenders take turns, in one process
and on the same inputs, and the ratio is of their medians: a busy machine hurts them alike. Where it
is too busy for that, `--cpu-time` counts the processor's seconds, in one thread. Memory is that of
all parameters and buffers; the peak while pruning is that of a process of its own, above what it
held after a forward pass of the same batches.
"""

import argparse
import copy
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, WandaSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import smollm2

LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--only", default="", help="of the lines to measure, a regular expression")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--peak", help="for the process of its own: a method")
    options = parser.parse_args()
    if options.peak:
        print(peak_of(options.peak))
        return
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    print("| SmolLM2-135M, half masked | dense | masked | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        if wanted(f"generate {name}", options.only):
            found = in_turns(generating(dtype, options.tokens), options.turns, clock)
            line(f"generate {options.tokens} tokens, {name}", found, "s")
    if wanted("train", options.only):
        found = in_turns(training(), options.turns, clock)
        line(f"training step of {LENGTH} tokens, float32", found, "s")
    for reversible in (True, False):
        if wanted("memory", options.only):
            sizes = [held / 2**20 for held in memory(reversible)]
            line(f"attached memory, bfloat16, reversible={reversible}", sizes, "MiB")
    for method in ("magnitude", "magnitude-irreversible", "wanda", "wanda-irreversible"):
        if wanted(f"peak {method}", options.only):
            command = [sys.executable, __file__, "--peak", method]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            before, added = (float(n) for n in told.split()[-2:])
            line(f"peak while pruning, bfloat16, {method}", [before, before + added], "MiB")


def wanted(name: str, only: str) -> bool:
    return re.search(only, name) is not None


def line(name: str, found: list[float], unit: str) -> None:
    dense, masked = found
    print(
        f"| {name} | {dense:.3f} {unit} | {masked:.3f} {unit} | {masked / dense:.3f} |", flush=True
    )


def in_turns(
    runs: list[Callable[[], object]], turns: int, clock: Callable[[], float]
) -> list[float]:
    """The median seconds of each run; the first two turns do not count."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(-2, turns):
        order = list(zip(runs, times, strict=True))
        for run, found in order if turn % 2 else reversed(order):
            start = clock()
            run()
            if turn >= 0:
                found.append(clock() - start)
    return [median(found) for found in times]


def both(dtype: torch.dtype) -> list[nn.Module]:
    """The model dense, and masked; both are copies, since the loaded one lies in a mapped file."""
    loaded = smollm2.load_model().to(dtype).eval()
    dense, masked = copy.deepcopy(loaded), copy.deepcopy(loaded)
    return [dense, torchprune.sparsify(masked, MagnitudeSpec(), progress=False)]


def windows() -> list[Tensor]:
    tokenizer = smollm2.load_tokenizer()
    mine, _ = smollm2.split(smollm2.news_articles())
    return list(smollm2.windows(tokenizer, mine, 8, LENGTH, seed=0).split(1))


def generating(dtype: torch.dtype, count: int) -> list[Callable[[], object]]:
    prompt = windows()[0][:, :64]
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": count,
        "min_new_tokens": count,
        "do_sample": False,
    }

    def run(model: nn.Module) -> Callable[[], object]:
        return lambda: model.generate(prompt, **options)

    return [run(model) for model in both(dtype)]


def training() -> list[Callable[[], object]]:
    ids = windows()[0]

    def run(model: nn.Module) -> Callable[[], object]:
        # Not the default kernels, whose square root of zero moments is slow, masked or not.
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()

        return step

    return [run(model) for model in both(torch.float32)]


def memory(reversible: bool) -> list[int]:
    dense = smollm2.load_model().to(torch.bfloat16).eval()
    before = held(dense)
    torchprune.sparsify(dense, MagnitudeSpec(), progress=False, reversible=reversible)
    return [before, held(dense)]


def held(model: nn.Module) -> int:
    return sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))


def peak_of(method: str) -> str:
    """MiB of the dense model, and what pruning added to what the process held at most before."""
    model = smollm2.load_model().to(torch.bfloat16).eval()
    batches = windows()
    with torch.no_grad():
        for batch in batches:
            model.model(input_ids=batch, use_cache=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    kind, _, rest = method.partition("-")
    spec, data = (WandaSpec(), batches) if kind == "wanda" else (MagnitudeSpec(), None)
    size = held(model) / 2**20
    ballast = _pinned_to_the_peak(before)
    torchprune.sparsify(model, spec, data, progress=False, reversible=not rest)
    del ballast
    return f"{size} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before}"


def _pinned_to_the_peak(peak: float) -> Tensor:
    """Memory that makes up for what the process held once and holds no more."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    now = int(next(y for y in status.splitlines() if y.startswith("VmRSS")).split()[1]) / 2**10
    return torch.ones(max(0, int((peak - now) * 2**20)), dtype=torch.uint8)


if __name__ == "__main__":
    main()
