"""What removing structures saves in time: SmolLM2 less half its neurons and a third of its heads.

    python benchmarks/structure/shrink.py [--neurons 0.5] [--heads 0.334]
        [--length 512] [--repeats 15]

Dense and shrunk take turns; medians are compared, beside the ratio of floating point operations
that `plan_shrink` promises. Which units go does not matter for time, so the smallest do.
"""

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import onnxruntime
import torch
from torch import Tensor, nn

import torchprune
from torchprune import HeadSpec, NeuronSpec
from torchprune.export import to_onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import smollm2
from decoding import InRuntime, InTorch, race


def shrunk(
    dense: nn.Module, heads: float, neurons: float, tokens: Tensor
) -> tuple[nn.Module, float]:
    """The smaller model, and the share of floating point operations that is left."""
    model = copy.deepcopy(dense)
    for spec in (
        HeadSpec(heads, score="l2", refit=False),
        NeuronSpec(neurons, score="l2", refit=False),
    ):
        torchprune.sparsify(model, spec, [tokens[:, :16]], progress=False)
    plan = torchprune.plan_shrink(model, tokens)
    torchprune.shrink(model, plan)
    return model, plan.flops[1] / plan.flops[0]


def timed(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each; they take turns."""
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(-2, repeats):
        for run, seconds in zip(runs, found, strict=True):
            start = time.perf_counter()
            run()
            if turn >= 0:
                seconds.append(time.perf_counter() - start)
    return [median(seconds) for seconds in found]


def session_of(model: nn.Module, tokens: Tensor, folder: Path) -> onnxruntime.InferenceSession:
    report = to_onnx(model, folder / "model.onnx", tokens[:, :16], weights="dense")
    return onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])


def in_runtime(model: nn.Module, context: Tensor, folder: Path) -> InRuntime:
    report = to_onnx(
        model, folder / "cached.onnx", context[:, :8], weights="dense", with_cache=True
    )
    return InRuntime(report.path, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neurons", type=float, default=0.5)
    parser.add_argument("--heads", type=float, default=0.334)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-onnx", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dense = smollm2.load_model()
    tokens = torch.randint(
        10, 20000, (1, options.length), generator=torch.Generator().manual_seed(0)
    )
    small, share = shrunk(dense, options.heads, options.neurons, tokens)
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (dense, small)]
    print(
        f"SmolLM2 float32, {torch.get_num_threads()} threads: {sizes[0]:.1f} M -> {sizes[1]:.1f} M "
        f"parameters, FLOPs of 1 x {options.length} tokens {1 / share:.2f} times fewer\n"
    )
    print("| | dense ms | shrunk ms | times faster | of what the FLOPs promise |")
    print("| --- | ---: | ---: | ---: | ---: |")

    def line(name: str, seconds: list[float], promise: float | None) -> None:
        faster = seconds[0] / seconds[1]
        of = "" if promise is None else f"{faster / promise:.2f}"
        print(f"| {name} | {seconds[0] * 1e3:.1f} | {seconds[1] * 1e3:.1f} | {faster:.2f} | {of} |")

    with torch.no_grad():
        runs = [lambda m=m: m(tokens, use_cache=False) for m in (dense, small)]
        line(f"prefill 1 x {options.length}, torch", timed(runs, options.repeats), 1 / share)
        context = tokens[:, :64]
        found = race([InTorch(m, context) for m in (dense, small)], 48)
        line("decode, torch", found, sizes[0] / sizes[1])
    if options.no_onnx:
        return
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        folders = Path(one), Path(two)
        sessions = [session_of(m, tokens, f) for m, f in zip((dense, small), folders, strict=True)]
        inputs = {sessions[0].get_inputs()[0].name: tokens.numpy()}
        runs = [lambda s=s: s.run(None, inputs) for s in sessions]
        line(f"prefill 1 x {options.length}, ONNX Runtime", timed(runs, options.repeats), 1 / share)
        del sessions, runs
        cached = [in_runtime(m, context, f) for m, f in zip((dense, small), folders, strict=True)]
        line("decode, ONNX Runtime", race(cached, 48), sizes[0] / sizes[1])


if __name__ == "__main__":
    main()
